"""Spiking networks in plain PyTorch, in the style of MPBN (Guo et al., arXiv 2308.08359).

    u <- decay u + x,    spike = norm(u) / threshold > 0.5,    u <- u (1 - spike)  or  u - threshold spike

The norm is MPBN's: per channel, per element, or none. Convolutions are followed by a norm of their own: an
ordinary one, over all steps (`bn`, `bn3d`), with the threshold in its scale (`td`, arXiv 2011.05280), one for
every step (`bntt`, arXiv 2010.01729), or one with a factor for every step (`te`, Duan et al., NeurIPS 2022).

A net runs layer by layer, each layer over all steps of `[T, N, ...]`, or step by step, with the membrane
potentials kept from one to the next; the two compute the same.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

FORMS = ("layers", "steps")
NORMS = ("bn", "bn3d", "td", "bntt", "te")
MPBN = ("channel", "element", "")
SHARPNESS = 3.0


class SurrogateSpike(torch.autograd.Function):
    """z > 0.5, with the gradient of (tanh(k (clamp(z, 0, 1) - 0.5)) + tanh(k/2)) / (2 tanh(k/2))."""

    @staticmethod
    def forward(context: Any, z: Tensor) -> Tensor:
        context.save_for_backward(z)
        return (z > 0.5).to(z.dtype)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (z,) = context.saved_tensors
        slope = 1 - torch.tanh(SHARPNESS * (z - 0.5)) ** 2
        inside = ((z >= 0) & (z <= 1)).to(z.dtype)
        return gradient * inside * slope * SHARPNESS / (2 * math.tanh(SHARPNESS / 2))


def straight_through(z: Tensor) -> Tensor:
    """The same, as published code writes it: the gradient is that of what is added and taken away."""
    soft = torch.tanh(SHARPNESS * (torch.clamp(z, 0, 1) - 0.5)) + math.tanh(SHARPNESS / 2)
    soft = soft / (2 * math.tanh(SHARPNESS / 2))
    return ((z > 0.5).to(z.dtype) - soft).detach() + soft


@dataclasses.dataclass(frozen=True)
class Style:
    """What all layers of a net have in common."""

    steps: int = 4
    mpbn: str = "channel"
    norm: str = "bn"
    reset: str = "hard"
    decay: float = 0.25
    threshold: float = 1.0
    surrogate: str = "function"

    def __post_init__(self) -> None:
        for value, known in ((self.mpbn, MPBN), (self.norm, NORMS), (self.reset, ("hard", "soft")),
                             (self.surrogate, ("function", "straight through"))):  # fmt: skip
            if value not in known:
                raise ValueError(f"expected one of {known}, found {value!r}")


class Run:
    """What lasts over the steps of one run: membrane potentials by neuron, and the number of the step."""

    def __init__(self) -> None:
        self.step = 0
        self.potentials: dict[nn.Module, Tensor] = {}


def over(layer: nn.Module, x: Tensor) -> Tensor:
    """A stateless layer on `[N, ...]`, or on every step of `[T, N, ...]` at once."""
    if x.ndim < 5:
        return layer(x)  # type: ignore[no-any-return]
    y: Tensor = layer(x.flatten(0, 1))
    return y.unflatten(0, (x.shape[0], -1))


class ElementNorm(nn.Module):
    """A batch norm with statistics, scale and shift of its own for every element of `[C, H, W]`."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(math.prod(shape))

    def forward(self, u: Tensor) -> Tensor:
        return self.norm(u.flatten(1)).unflatten(1, u.shape[1:])  # type: ignore[no-any-return]


class Fire(nn.Module):
    """What decides about spikes, from the potential in units of the threshold."""

    def __init__(self, surrogate: str) -> None:
        super().__init__()
        self.surrogate = surrogate

    def forward(self, z: Tensor) -> Tensor:
        if self.surrogate == "function":
            return SurrogateSpike.apply(z)  # type: ignore[no-any-return, no-untyped-call]
        return straight_through(z)


class Neuron(nn.Module):
    """Leaky integrate-and-fire neurons for currents of `shape` = (C, H, W)."""

    def __init__(self, shape: tuple[int, int, int], style: Style) -> None:
        super().__init__()
        self.style = style
        self.norm: nn.Module = nn.Identity()
        if style.mpbn:
            per_channel = style.mpbn == "channel"
            self.norm = nn.BatchNorm2d(shape[0]) if per_channel else ElementNorm(shape)
        self.fire = Fire(style.surrogate)

    def step(self, current: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Spikes of one step, and the potential after it."""
        u = u * self.style.decay + current
        spike = self.fire(self.norm(u) / self.style.threshold)
        u = u * (1 - spike) if self.style.reset == "hard" else u - self.style.threshold * spike
        return spike, u

    def forward(self, x: Tensor, run: Run) -> Tensor:
        if x.ndim < 5:
            u = run.potentials.get(self)
            spike, run.potentials[self] = self.step(x, torch.zeros_like(x) if u is None else u)
            return spike
        u, spikes = torch.zeros_like(x[0]), []
        for current in x:
            spike, u = self.step(current, u)
            spikes.append(spike)
        return torch.stack(spikes)


class ThresholdNorm(nn.BatchNorm2d):
    """tdBN as the code of MPBN has it: gamma * threshold * (x - mean) / sigma + beta."""

    threshold = 0.5

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, 1, 1)
        assert self.running_mean is not None and self.running_var is not None
        if self.training:
            axes = tuple(axis for axis in range(x.ndim) if axis != x.ndim - 3)
            mean, var = x.mean(axes), x.var(axes, unbiased=False)
            self.running_mean.lerp_(mean.detach(), 0.1)
            self.running_var.lerp_(var.detach(), 0.1)
        else:
            mean, var = self.running_mean, self.running_var
        sigma = torch.sqrt(var.reshape(shape) + self.eps)
        x = self.threshold * (x - mean.reshape(shape)) / sigma
        return x * self.weight.reshape(shape) + self.bias.reshape(shape)


class ConvNorm(nn.Module):
    """A convolution and its norm."""

    def __init__(self, inside: int, out: int, kernel: int, stride: int, style: Style) -> None:
        super().__init__()
        self.style = style
        self.conv = nn.Conv2d(inside, out, kernel, stride, kernel // 2, bias=False)
        self.norm: Any
        if style.norm == "bn3d":
            self.norm = nn.BatchNorm3d(out)
        elif style.norm == "td":
            self.norm = ThresholdNorm(out)
        elif style.norm == "bntt":
            self.norm = nn.ModuleList(nn.BatchNorm2d(out) for _ in range(style.steps))
            for one in self.norm:
                one.register_parameter("bias", None)
        else:
            self.norm = nn.BatchNorm2d(out)
            if style.norm == "te":
                self.factor = nn.Parameter(torch.linspace(1.2, 0.8, style.steps))

    def forward(self, x: Tensor, run: Run) -> Tensor:
        y, kind, layered = over(self.conv, x), self.style.norm, x.ndim == 5
        if kind == "bn3d":
            if not layered:
                return self.norm(y.unsqueeze(2)).squeeze(2)  # type: ignore[no-any-return]
            z = self.norm(y.permute(1, 2, 0, 3, 4)).permute(2, 0, 1, 3, 4)
            return z.contiguous()  # type: ignore[no-any-return]
        if kind == "td":
            return self.norm(y)  # type: ignore[no-any-return]
        if kind == "bntt":
            if not layered:
                return self.norm[run.step](y)  # type: ignore[no-any-return]
            return torch.stack([norm(one) for norm, one in zip(self.norm, y, strict=True)])
        z = over(self.norm, y)
        if kind == "te":
            z = z * (self.factor.view(-1, 1, 1, 1, 1) if layered else self.factor[run.step])
        return z


class Block(nn.Module):
    """Two convolutions beside a shortcut, as in ResNet-20 (arXiv 1512.03385), with neurons for ReLUs."""

    def __init__(self, inside: int, out: int, stride: int, size: int, style: Style) -> None:
        super().__init__()
        self.conv1 = ConvNorm(inside, out, 3, stride, style)
        self.neuron1 = Neuron((out, size, size), style)
        self.conv2 = ConvNorm(out, out, 3, 1, style)
        self.neuron2 = Neuron((out, size, size), style)
        self.shortcut: nn.Module | None = None
        if stride > 1 or inside != out:
            self.shortcut = ConvNorm(inside, out, 1, stride, style)

    def forward(self, x: Tensor, run: Run) -> Tensor:
        y = self.conv2(self.neuron1(self.conv1(x, run), run), run)
        shortcut = x if self.shortcut is None else self.shortcut(x, run)
        return self.neuron2(y + shortcut, run)  # type: ignore[no-any-return]


class Pool(nn.Module):
    """Means of 2x2, or with `whole` of everything."""

    def __init__(self, whole: bool = False) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1) if whole else nn.AvgPool2d(2)

    def forward(self, x: Tensor, run: Run) -> Tensor:
        return over(self.pool, x)


class SpikingNet(nn.Module):
    """Layers, then a linear readout averaged over the steps.

    Input: `[N, C, H, W]`, presented at every step, or `[N, T, C, H, W]`. Output: `[N, classes]`.
    """

    def __init__(self, layers: list[nn.Module], width: int, style: Style, form: str) -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"expected one of {FORMS}, found {form!r}")
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(width, 10)
        self.style = style
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            x = x.repeat(self.style.steps, 1, 1, 1, 1)
        else:
            x = x.permute(1, 0, 2, 3, 4)
        run = Run()
        if self.form == "layers":
            return self._through(x, run).mean(0)
        found = []
        for run.step in range(self.style.steps):
            found.append(self._through(x[run.step], run))
        return torch.stack(found).mean(0)

    def _through(self, x: Tensor, run: Run) -> Tensor:
        for layer in self.layers:
            x = layer(x, run)
        return self.head(x.flatten(-3))  # type: ignore[no-any-return]


def resnet(
    style: Style, blocks: tuple[int, ...] = (3, 3, 3), width: int = 8, size: int = 16,
    form: str = "layers", channels: int = 1,
) -> SpikingNet:  # fmt: skip
    """A spiking residual network for `size` x `size` images: ResNet-20 with blocks (3, 3, 3), ResNet-19
    as MPBN's code has it with (3, 3, 2)."""
    layers: list[nn.Module] = [ConvNorm(channels, width, 3, 1, style),
                               Neuron((width, size, size), style)]  # fmt: skip
    inside = width
    for stage, count in enumerate(blocks):
        for number in range(count):
            stride, out = (2 if stage and not number else 1), width << stage
            size = size // stride
            layers.append(Block(inside, out, stride, size, style))
            inside = out
    return SpikingNet([*layers, Pool(whole=True)], inside, style, form)


def vgg(
    style: Style, widths: tuple[int, ...] = (8, 16, 0, 16, 32, 0, 32), size: int = 16,
    form: str = "layers", channels: int = 1,
) -> SpikingNet:  # fmt: skip
    """A chain of convolutions and neurons; a width of 0 is a pooling."""
    layers: list[nn.Module] = []
    inside = channels
    for out in widths:
        if not out:
            layers.append(Pool())
            size //= 2
            continue
        layers += [ConvNorm(inside, out, 3, 1, style), Neuron((out, size, size), style)]
        inside = out
    return SpikingNet(layers, inside * size * size, style, form)


class Recorded(nn.Module):
    """A model that returns its spikes too: what every module of these classes returned, in order."""

    def __init__(self, model: nn.Module, kinds: tuple[type, ...] = (Neuron,)) -> None:
        super().__init__()
        self.model = model
        self.kinds = kinds

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        kept: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            kept.append(output[0] if isinstance(output, tuple) else output)

        found = [one for one in self.model.modules() if isinstance(one, self.kinds)]
        handles = [one.register_forward_hook(keep) for one in found]
        try:
            return (self.model(x), *kept)
        finally:
            for handle in handles:
                handle.remove()
