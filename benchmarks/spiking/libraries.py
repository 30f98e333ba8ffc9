"""Spiking networks built with SpikingJelly 2.0 and snnTorch 1.0, for small images of one channel.

Each is wrapped as a user would wrap it, from an image to a mean over T steps: SpikingJelly keeps membrane
potentials in its modules, which are reset before; snnTorch hands them out, or keeps them as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import snntorch
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

from graphopt.torchvision_ops import declare_missing_ops

declare_missing_ops()  # SpikingJelly's models import torchvision
from spikingjelly.activation_based.model import sew_resnet, spiking_resnet  # noqa: E402

Node = Callable[..., nn.Module]


class Jelly(nn.Module):
    """A net of SpikingJelly's over T steps: `[N, C, H, W]` at every step, or `[N, T, C, H, W]`.

    `mode` "m" runs every layer over all steps, "s" every step through all layers.
    """

    def __init__(self, net: nn.Module, steps: int, mode: str) -> None:
        super().__init__()
        self.net = net
        self.steps = steps
        self.mode = mode
        functional.set_step_mode(net, mode)

    def forward(self, x: Tensor) -> Tensor:
        functional.reset_net(self.net)
        if x.ndim == 4:
            x = x.unsqueeze(0).repeat(self.steps, 1, 1, 1, 1)
        else:
            x = x.transpose(0, 1)
        if self.mode == "m":
            return self.net(x).mean(0)  # type: ignore[no-any-return]
        total: Any = 0.0
        for step in range(self.steps):
            total = total + self.net(x[step])
        return total / self.steps  # type: ignore[no-any-return]


def lif(channels: int = 0) -> nn.Module:
    """Leaky integrate-and-fire with SpikingJelly's defaults."""
    return neuron.LIFNode(surrogate_function=surrogate.ATan(), detach_reset=True)


def soft_lif(channels: int = 0) -> nn.Module:
    return neuron.LIFNode(v_reset=None, surrogate_function=surrogate.ATan())


def integrate(channels: int = 0) -> nn.Module:
    return neuron.IFNode(surrogate_function=surrogate.ATan())


def parametric(channels: int = 0) -> nn.Module:
    return neuron.ParametricLIFNode(surrogate_function=surrogate.ATan())


def mpbn(channels: int = 0) -> nn.Module:
    """SpikingJelly's MPBN neuron, whose state is overwritten with what the norm makes of it."""
    return neuron.MPBNLIFNode(out_channels=channels, surrogate_function=surrogate.ATan())


def soft_mpbn(channels: int = 0) -> nn.Module:
    return neuron.MPBNLIFNode(
        out_channels=channels, v_reset=None, surrogate_function=surrogate.ATan()
    )


NODES: dict[str, Node] = {
    "lif": lif, "soft lif": soft_lif, "if": integrate, "plif": parametric, "mpbn": mpbn,
    "soft mpbn": soft_mpbn,
}  # fmt: skip


def jelly_vgg(
    node: str = "lif", mode: str = "m", steps: int = 4, size: int = 16,
    widths: tuple[int, ...] = (16, 0, 32, 0, 32),
) -> Jelly:  # fmt: skip
    """A chain of convolutions, norms and neurons; a width of 0 is a pooling."""
    layers: list[nn.Module] = []
    inside = 1
    for out in widths:
        if not out:
            layers.append(layer.MaxPool2d(2))
            size //= 2
            continue
        layers += [layer.Conv2d(inside, out, 3, padding=1, bias=False), layer.BatchNorm2d(out),
                   NODES[node](out)]  # fmt: skip
        inside = out
    layers += [layer.Flatten(), layer.Linear(inside * size * size, 10)]
    return Jelly(nn.Sequential(*layers), steps, mode)


def jelly_resnet(
    kind: str = "spiking", node: str = "lif", mode: str = "m", steps: int = 4
) -> Jelly:
    """One block for each of the four stages; 64 to 512 channels are fixed by the library."""
    made: nn.Module
    if kind == "spiking":
        made = spiking_resnet.SpikingResNet(
            spiking_resnet.BasicBlock, [1, 1, 1, 1], num_classes=10, spiking_neuron=NODES[node]
        )
    else:
        made = sew_resnet.SEWResNet(
            sew_resnet.BasicBlock, [1, 1, 1, 1], num_classes=10, spiking_neuron=NODES[node],
            cnf="ADD",
        )  # fmt: skip
    made.conv1 = layer.Conv2d(1, 64, 3, 1, 1, bias=False)
    return Jelly(made, steps, mode)


class Snn(nn.Module):
    """Two convolutions and a linear layer with snnTorch's neurons, the output the mean of spikes.

    `neuron` is "leaky" or "synaptic"; with `hidden`, neurons keep their state themselves.
    """

    def __init__(
        self, neuron: str = "leaky", steps: int = 4, size: int = 16, hidden: bool = False,
        reset: str = "subtract",
    ) -> None:  # fmt: skip
        super().__init__()
        self.steps = steps
        self.hidden = hidden

        def fire() -> nn.Module:
            settings: Any = {"beta": 0.5, "init_hidden": hidden, "reset_mechanism": reset}
            if neuron == "leaky":
                return snntorch.Leaky(**settings)
            return snntorch.Synaptic(alpha=0.5, **settings)

        self.conv1, self.norm1, self.fire1 = nn.Conv2d(1, 12, 5), nn.BatchNorm2d(12), fire()
        self.conv2, self.norm2, self.fire2 = nn.Conv2d(12, 32, 3), nn.BatchNorm2d(32), fire()
        inside = ((size - 4) // 2 - 2) // 2
        self.linear, self.fire3 = nn.Linear(32 * inside * inside, 10), fire()

    def forward(self, x: Tensor) -> Tensor:
        states: list[tuple[Tensor, ...]] = [(), (), ()]
        neurons: list[Any] = [self.fire1, self.fire2, self.fire3]
        if self.hidden:
            for one in neurons:
                one.reset_mem()
        else:
            states = [_state(one.reset_mem()) for one in neurons]

        def fire(number: int, current: Tensor) -> Tensor:
            found = neurons[number](current, *states[number])
            if not self.hidden:
                states[number] = tuple(found[1:])
                found = found[0]
            return found.to(x.dtype)  # type: ignore[no-any-return]  # its spikes are float32

        found = []
        for step in range(self.steps):
            current = x if x.ndim == 4 else x[:, step]
            y = fire(0, nn.functional.max_pool2d(self.norm1(self.conv1(current)), 2))
            y = fire(1, nn.functional.max_pool2d(self.norm2(self.conv2(y)), 2))
            found.append(fire(2, self.linear(y.flatten(1))))
        return torch.stack(found).mean(0)


def _state(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


SPIKES: tuple[type, ...] = (neuron.BaseNode, snntorch.SpikingNeuron)
