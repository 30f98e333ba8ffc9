"""The nets: what each is called, how it is made, and what optimization makes of it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import graphopt
from benchmarks.digits import Digits
from benchmarks.spiking.exact import norms, scaling, seconds
from benchmarks.spiking.libraries import SPIKES, Snn, jelly_resnet, jelly_vgg
from benchmarks.spiking.nets import Neuron, Recorded, Style, resnet, vgg
from benchmarks.spiking.train import accuracy, encode, mix_signs, trained


@dataclasses.dataclass(frozen=True)
class Net:
    """How to make a net and to train it; `make` takes the number of steps."""

    make: Callable[..., nn.Module]
    epochs: int = 4
    encoding: str = "direct"

    def trained(self, name: str, data: Digits, steps: int = 4) -> nn.Module:
        make = functools.partial(self.make, steps=steps)
        return trained(name, make, data, self.epochs, self.encoding, steps)


def _plain(build: Callable[..., nn.Module], form: str = "layers", **more: Any) -> Any:
    def make(steps: int) -> nn.Module:
        shape = {key: more[key] for key in ("blocks", "width") if key in more}
        style = {key: value for key, value in more.items() if key not in shape}
        return build(Style(steps=steps, **style), form=form, **shape)

    return make


NETS: dict[str, Net] = {
    "MPBN ResNet-20": Net(_plain(resnet), 6),
    "MPBN ResNet-20, soft reset": Net(_plain(resnet, reset="soft"), 6),
    "MPBN ResNet-20, straight-through": Net(_plain(resnet, surrogate="straight through"), 6),
    "MPBN ResNet-19": Net(_plain(resnet, blocks=(3, 3, 2)), 6),
    "MPBN VGG": Net(_plain(vgg)),
    "MPBN VGG, rate": Net(_plain(vgg), encoding="rate"),
    "MPBN VGG by steps": Net(_plain(vgg, "steps")),
    "MPBN VGG by steps, soft reset": Net(_plain(vgg, "steps", reset="soft")),
    "MPBN VGG, per element": Net(_plain(vgg, mpbn="element")),
    "MPBN VGG, straight-through": Net(_plain(vgg, surrogate="straight through")),
    "MPBN VGG, 3-d norms": Net(_plain(vgg, norm="bn3d")),
    "VGG, tdBN": Net(_plain(vgg, mpbn="", norm="td")),
    "VGG, BNTT": Net(_plain(vgg, mpbn="", norm="bntt")),
    "VGG by steps, BNTT": Net(_plain(vgg, "steps", mpbn="", norm="bntt")),
    "VGG, TEBN": Net(_plain(vgg, mpbn="", norm="te")),
    "SpikingJelly LIF": Net(functools.partial(jelly_vgg, "lif", "m")),
    "SpikingJelly LIF by steps": Net(functools.partial(jelly_vgg, "lif", "s")),
    "SpikingJelly LIF, soft reset": Net(functools.partial(jelly_vgg, "soft lif", "m")),
    "SpikingJelly IF by steps": Net(functools.partial(jelly_vgg, "if", "s")),
    "SpikingJelly PLIF": Net(functools.partial(jelly_vgg, "plif", "m")),
    "SpikingJelly MPBN": Net(functools.partial(jelly_vgg, "mpbn", "m")),
    "SpikingJelly MPBN, soft reset": Net(functools.partial(jelly_vgg, "soft mpbn", "s")),
    "SpikingJelly spiking ResNet": Net(functools.partial(jelly_resnet, "spiking")),
    "SpikingJelly SEW ResNet by steps": Net(functools.partial(jelly_resnet, "sew", mode="s")),
    "snnTorch Leaky": Net(functools.partial(Snn, "leaky")),
    "snnTorch Leaky, reset to zero": Net(functools.partial(Snn, "leaky", reset="zero")),
    "snnTorch Synaptic": Net(functools.partial(Snn, "synaptic")),
    "snnTorch Leaky, hidden state": Net(functools.partial(Snn, "leaky", hidden=True)),
}


@dataclasses.dataclass
class Row:
    """What optimization makes of one net; spikes are those of the test images, in float64, of a copy
    with scales of both signs and zeros."""

    net: str
    accuracy: list[float] = dataclasses.field(default_factory=list)  # source, optimized
    captured: str = ""
    dynamic: bool = False
    norms: str = ""
    scales: int = 0
    spikes: int = 0
    differ: int = 0
    largest: float = 0.0  # difference of the logits
    optimizing: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)
    error: str = ""


def measure(name: str, data: Digits, steps: int = 4) -> Row:
    """One row; an exception is its error."""
    row, net = Row(name), NETS[name]
    try:
        _measure(row, net, net.trained(name, data, steps), data, steps)
    except Exception as error:
        row.error = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return row


@torch.no_grad()
def _measure(row: Row, net: Net, model: nn.Module, data: Digits, steps: int) -> None:
    x = encode(data.test_x, net.encoding, steps, torch.Generator().manual_seed(1))
    start = time.perf_counter()
    fast = graphopt.optimize(copy.deepcopy(model), (x[:3],))
    whole = time.perf_counter() - start
    row.optimizing = f"{seconds(fast)}; {whole:.1f} in all"
    row.captured, row.notes = fast.report.capture.method, list(fast.report.capture.notes)
    row.norms = norms(fast)
    if fast.graph_module is not None:
        row.scales = scaling(fast.graph_module)
        (given,) = fast.graph_module.graph.find_nodes(op="placeholder")
        row.dynamic = not isinstance(given.meta["type"]["shape"][0], int)
    run = fast if row.dynamic else None
    row.accuracy = [accuracy(model, x, data.test_y, 45)]
    if run is not None:
        row.accuracy.append(accuracy(run, x, data.test_y, 45))
    some = x[:45].double()
    source: nn.Module = Recorded(mix_signs(copy.deepcopy(model)).double(), (Neuron, *SPIKES))
    truth = source(some)
    found = graphopt.optimize(source, (some,))(some)
    row.spikes = sum(one.numel() for one in truth[1:])
    row.differ = sum(int((_fired(a) != _fired(b)).sum())
                     for a, b in zip(truth[1:], found[1:], strict=True))  # fmt: skip
    row.largest = float((truth[0] - found[0]).abs().max())


def _fired(spikes: Tensor) -> Tensor:
    """A spike that a straight-through estimator computes is 1 but for rounding."""
    return spikes > 0.5
