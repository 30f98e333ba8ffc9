"""Whether spikes stay what they are: those of every layer, on 10,000 digits, in float64 and in float32.

In float32 the source and what is made of it may round differently, and a potential that close to its
threshold ends on the other side. A sample's first such spikes (all there is before them being equal) have
to be that: the source's value no further from its threshold than rounding can move it. With

    |fl(x) - x| <= g M,    g = (n + 8 t + 24) u,    u = 2^-24

where M is the sum of the absolute values of all terms, n the longest sum of a convolution and t the number of
steps (Higham, Accuracy and Stability of Numerical Algorithms, 3.1), twice, as both sides round. What follows
from a spike that is there or not is no rounding any more, and only counted.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

import graphopt
from benchmarks.digits import Digits
from benchmarks.spiking.nets import Fire, Neuron, Recorded
from benchmarks.spiking.train import accuracy, many, mix_signs

CHUNK = 125
_BY_PARAMETER = re.compile(r"aten\.(?:mul|div)\.Tensor\([^)]*\bw\d+\b")


@dataclasses.dataclass
class Exact:
    """One net; counts of spikes are over all layers, steps and samples."""

    net: str
    samples: int = 0
    layers: int = 0
    spikes: int = 0
    rate: str = ""  # of spikes, the lowest and the highest of the layers
    signs: str = ""  # scales of the norms of membrane potentials: positive, negative, zero
    norms: str = ""  # before and after
    scales: int = 0  # multiplications and divisions by parameters that are left
    differ64: int = 0
    differ32: int = 0
    samples32: int = 0
    first32: int = 0  # spikes that are the first to differ in their sample
    explained: int = 0  # of these, those within rounding of the threshold
    margin: float = 0.0  # the largest distance from the threshold of any of them
    ratio: float = 0.0  # the largest of such a distance over its bound
    accuracy: list[float] = dataclasses.field(default_factory=list)  # trained: source, optimized
    accuracy_mixed: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    optimizing: str = ""


def measure(net: str, model: nn.Module, data: Digits, samples: int = 10_000) -> Exact:
    """`model` is trained; the spikes are those of a copy with scales of both signs and zeros."""
    start = time.perf_counter()
    row = Exact(net, samples)
    x, y = many(data.test_x, data.test_y, samples)
    fast = graphopt.optimize(copy.deepcopy(model), (x[:2],))
    row.optimizing = seconds(fast)
    row.accuracy = [accuracy(one, x, y) for one in (model, fast)]
    mixed = mix_signs(copy.deepcopy(model))
    weights = [_scales(one.norm) for one in mixed.modules() if isinstance(one, Neuron)]
    every = torch.cat([one.flatten() for one in weights])
    row.signs = f"{int((every > 0).sum())} / {int((every < 0).sum())} / {int((every == 0).sum())}"
    source = Recorded(copy.deepcopy(mixed).double())
    fast = graphopt.optimize(source, (x[:2].double(),))
    row.norms, row.scales = norms(fast), scaling(fast.graph_module)
    total: Any = 0.0
    with torch.no_grad():
        for chunk in x.double().split(CHUNK):
            truth, found = source(chunk)[1:], fast(chunk)[1:]
            row.differ64 += sum(
                int(((a > 0.5) != (b > 0.5)).sum()) for a, b in zip(truth, found, strict=True)
            )
            row.spikes += sum(one.numel() for one in truth)
            total = total + torch.tensor([float(one.mean()) * len(chunk) for one in truth])
    row.layers = len(total)
    row.rate = f"{float(total.min()) / samples:.3f} to {float(total.max()) / samples:.3f}"
    _in_float32(row, Recorded(mixed), x, y)
    row.seconds = time.perf_counter() - start
    return row


@torch.no_grad()
def _in_float32(row: Exact, source: Recorded, x: Tensor, y: Tensor) -> None:
    fast = graphopt.optimize(source, (x[:2],))
    right = [0, 0]
    for chunk, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        truth, found = source(chunk), fast(chunk)
        for side, (logits, *_) in enumerate((truth, found)):
            right[side] += int((logits.argmax(1) == labels).sum())
        flips = [(a > 0.5) != (b > 0.5) for a, b in zip(truth[1:], found[1:], strict=True)]
        row.differ32 += sum(int(one.sum()) for one in flips)
        axes = [tuple(axis for axis in range(one.ndim) if axis != 1) for one in flips]
        wrong = torch.stack([one.any(axis) for one, axis in zip(flips, axes, strict=True)])
        rows = wrong.any(0).nonzero().flatten()
        row.samples32 += len(rows)
        if len(rows):
            some = [one[:, rows] for one in truth[1:]]
            _explain(row, source.model, chunk[rows], some, [one[:, rows] for one in flips])
    row.accuracy_mixed = [100 * one / len(x) for one in right]


def _explain(
    row: Exact, model: nn.Module, x: Tensor, spikes: list[Tensor], flips: list[Tensor]
) -> None:
    """Adds the first flips of these samples, of `[T, N, ...]` for every layer, to the row."""
    values, sizes = _compared(model, x), _sizes(model, x, spikes)
    steps = len(spikes[0])
    longest = max(
        (one.in_channels * one.kernel_size[0] * one.kernel_size[1] for one in model.modules()
         if isinstance(one, nn.Conv2d)),
    )  # fmt: skip
    for sample in range(len(x)):
        step, layer = next(
            (step, layer) for step in range(steps) for layer in range(len(flips))
            if flips[layer][step, sample].any()
        )  # fmt: skip
        first = flips[layer][step, sample]
        margin = (values[layer][step][sample][first] - 0.5).abs().double()
        bound = 2 * (longest + 8 * steps + 24) * 2.0**-24 * sizes[layer][step][sample][first]
        row.first32 += int(first.sum())
        row.explained += int((margin <= bound).sum())
        row.margin = max(row.margin, float(margin.max()))
        row.ratio = max(row.ratio, float((margin / bound).max()))


def _compared(model: nn.Module, x: Tensor) -> list[list[Tensor]]:
    """What every layer compares with the threshold, a tensor for every step."""
    return _seen(model, x, [one for one in model.modules() if isinstance(one, Fire)])


def _seen(model: nn.Module, x: Tensor, layers: list[nn.Module]) -> list[list[Tensor]]:
    kept: dict[nn.Module, list[Tensor]] = {one: [] for one in layers}
    handles = [
        one.register_forward_hook(lambda one, inputs, output: kept[one].append(inputs[0]))
        for one in layers
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return list(kept.values())


class _Silent(nn.Module):
    """Never fires, so that nothing is taken from a potential."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.zeros_like(z)


def _sizes(model: nn.Module, x: Tensor, spikes: list[Tensor]) -> list[list[Tensor]]:
    """The sums of absolute values behind every value compared, in float64: the model with absolute
    parameters and the spikes of the source, its potentials never reset."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        for one in model.modules():
            for tensor in one.parameters(recurse=False):
                tensor.abs_()
            if (mean := getattr(one, "running_mean", None)) is not None:
                mean.abs_().neg_()
    neurons = [one for one in model.modules() if isinstance(one, Neuron)]
    given = dict(zip(neurons, spikes, strict=True))
    for neuron in neurons:
        neuron.fire = _Silent()  # type: ignore[assignment]
        neuron.register_forward_hook(lambda one, inputs, output: given[one].double())
    return _seen(model, x.double().abs(), [one.fire for one in neurons])


def _scales(norm: nn.Module) -> Tensor:
    found = [one.weight.detach() for one in norm.modules() if hasattr(one, "running_var")]
    return found[0] if found else torch.zeros(0)


def norms(fast: graphopt.OptimizedModule) -> str:
    """The norms of the captured graph and of the optimized one."""
    report = fast.report
    assert report.before is not None and report.after is not None
    return f"{report.before.batch_norms} -> {report.after.batch_norms}"


def scaling(module: Any) -> int:
    """Multiplications and divisions of values by parameters, signs among them; one in the step of a
    scan counts once."""
    found = 0
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        if str(node.target).startswith("graphopt.scan"):
            found += len(_BY_PARAMETER.findall(str(node.args[0])))
        elif str(node.target).startswith(("aten.mul", "aten.div")):
            found += any(one.op == "get_attr" for one in node.all_input_nodes)
    return found


def seconds(fast: graphopt.OptimizedModule) -> str:
    report = fast.report
    spent = sum(seconds for _, seconds in report.passes)
    return (
        f"capture {report.capture.seconds:.1f}, passes {spent:.1f}, "
        f"checks {report.validation_seconds:.1f}"
    )


def refusals(fast: graphopt.OptimizedModule, rewrite: str) -> dict[str, int]:
    """The reasons for which a rewrite was refused, how often each."""
    return dict(Counter(one.reason for one in fast.report.refused if one.rewrite == rewrite))
