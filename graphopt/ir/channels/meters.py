"""What a graph costs at any allocation, without building it: FLOPs and parameters.

Every part of the cost is a product of powers of what stays of axes, so all allocations that are asked
for are counted at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from graphopt.ir.builder import Builder
from graphopt.ir.channels.labels import FIXED, Labels, Layers, Vector
from graphopt.ir.ops.base import hint

if TYPE_CHECKING:
    from graphopt.ir.channels.groups import Groups

Floats = NDArray[np.float64]
Lost = NDArray[np.bool_]  # allocations x labels


class Axes:
    """The axes that groups run along; those with the same labels count as one."""

    def __init__(self, groups: Groups) -> None:
        self.classes = groups.classes
        self.layers: list[Layers] = []
        self._numbers: dict[tuple[bytes, ...], int] = {}

    def of(self, labels: Any) -> dict[int, int]:
        """The numbers of the axes of a value, where it loses entries with any group."""
        found = {}
        for axis, given in labels.axes.items() if isinstance(labels, Labels) else ():
            layers = tuple(self.classes[one] for one in given)
            if any((one != FIXED).any() for one in layers):
                key = tuple(sorted(one.tobytes() for one in layers))
                found[axis] = self._numbers.setdefault(key, len(self.layers))
                self.layers += [layers] * (found[axis] == len(self.layers))
        return found

    def with_any(self, labels: Vector) -> list[int]:
        """The axes along which any of these groups run."""
        return [
            number for number, layers in enumerate(self.layers)
            if any(np.isin(one, labels).any() for one in layers)
        ]  # fmt: skip

    def logs(self, lost: Lost, numbers: Iterable[int]) -> Floats:
        """The logarithm of the part of every axis that stays: allocations x axes."""
        found: list[Floats] = []
        for number in numbers:
            layers = self.layers[number]
            away = np.logical_or.reduce([lost[:, one] for one in layers])
            found.append(np.maximum(len(layers[0]) - away.sum(1), 1) / len(layers[0]))
        logs: Floats = np.log(np.array(found).reshape(-1, len(lost)).T)
        return logs


Part = tuple[float, Mapping[int, float]]  # what it costs in full, the power of every axis in it


class Meter:
    """What a graph costs at any allocation: the sum of its parts, which are products of powers of what
    stays of axes, or lie on a curve over these."""

    def __init__(self, axes: Axes, parts: Sequence[Part]) -> None:
        self.axes = axes
        self.full = np.array([full for full, _ in parts])
        self.powers = np.zeros((len(parts), len(axes.layers)))
        for row, (_, powers) in zip(self.powers, parts, strict=True):
            row[list(powers)] = list(powers.values())
        self.curves: list[tuple[Floats, Floats]] | None = None

    def parts(self, logs: Floats) -> Floats:
        """Every part by itself, before any curve: allocations x parts."""
        found: Floats = self.full * np.exp(logs @ self.powers.T)
        return found

    def total(self, logs: Floats) -> Floats:
        found = self.parts(logs)
        if self.curves is not None:
            found = np.stack(
                [np.interp(one, *curve) for one, curve in zip(found.T, self.curves, strict=True)], 1
            )
        total: Floats = found.sum(1)
        return total

    def totals(self, lost: Lost) -> Floats:
        """What is left at every allocation."""
        return self.total(self.axes.logs(lost, range(len(self.axes.layers))))

    def of(self, lost: Lost) -> float:
        return float(self.totals(lost)[0])


def parameters(groups: Groups) -> Meter:
    """Counts the elements of all parameters."""
    axes, parts = Axes(groups), []
    for name, state in groups.graph.states.items():
        if state.kind == "parameter":
            powers = Counter(axes.of(groups.states.get(name)).values())
            parts.append((float(state.tensor.numel()), powers))
    return Meter(axes, parts)


def flops(groups: Groups) -> Meter:
    """Counts the FLOPs of `graphopt.ir.cost`."""
    axes = Axes(groups)
    found = [arithmetic(groups, axes, node) for node in groups.graph.calls]
    return Meter(axes, [part for part in found if part is not None])


def arithmetic(groups: Groups, axes: Axes, node: fx.Node) -> Part | None:
    """The FLOPs of an op; None if it has none.

    They are a product of sizes: to what power the size of an axis is in it shows when it is doubled in
    all that the op reads and makes.
    """
    near = [one for one in (node, *node.all_input_nodes) if is_tensor(one)]
    shapes = {one: [hint(size) for size in one.meta["val"].shape] for one in near}
    numbers = {one: axes.of(groups.trace.labels[one]) for one in near}
    builder = Builder(groups.graph, node)
    once = _flops(builder, node, shapes)
    if not once:
        return None
    powers = {}
    for number in {number for found in numbers.values() for number in found.values()}:
        doubled = {
            one: [size << (numbers[one].get(axis) == number) for axis, size in enumerate(shape)]
            for one, shape in shapes.items()
        }
        powers[number] = float(np.log2(_flops(builder, node, doubled) / once))
    return once, powers


def _flops(builder: Builder, node: fx.Node, shapes: Mapping[fx.Node, Sequence[int]]) -> float:
    """The FLOPs of an op between values of other shapes."""
    known = {one: one.meta["val"] for one in shapes}
    try:
        for one, shape in shapes.items():
            one.meta["val"] = torch.empty(shape, dtype=known[one].dtype, device="meta")
        op = builder.view(node)
        return 0.0 if op is None else op.flops
    finally:
        for one, value in known.items():
            one.meta["val"] = value


def is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)
