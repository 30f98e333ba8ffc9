"""Labels of axes, and what couples them.

The labels of an axis come in layers, each a vector with one label for each entry: an entry of an axis
that two others were merged into carries a label of each. An axis without layers is fixed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from torch import Tensor

FIXED = 0  # the label that never goes away

Vector = NDArray[np.int64]
Layers = tuple[Vector, ...]


@dataclasses.dataclass
class Labels:
    """The layers of every axis of a value. `fresh` are axes of a parameter that nothing has met yet:
    they take on the layers of the first axis they meet. `reasons` say why an axis got none."""

    shape: tuple[int, ...]
    axes: dict[int, Layers] = dataclasses.field(default_factory=dict)
    fresh: set[int] = dataclasses.field(default_factory=set)
    reasons: dict[int, str] = dataclasses.field(default_factory=dict)

    def layers(self, axis: int) -> Layers:
        return self.axes.get(axis % len(self.shape), ()) if self.shape else ()


class Coupling:
    """Hands out labels, and remembers which are coupled, and why labels are fixed."""

    def __init__(self) -> None:
        self.count = 1
        self._edges: list[tuple[Vector, Vector]] = []
        self.reasons: dict[int, str] = {}
        self._known: Vector | None = None

    def new(self, size: int) -> Vector:
        found = np.arange(self.count, self.count + size, dtype=np.int64)
        self.count += size
        return found

    def couple(self, a: Vector, b: Vector) -> None:
        """Entry by entry; one of them may be a single label."""
        a, b = np.broadcast_arrays(a, b)
        different = a != b
        if different.any():
            self._edges.append((a[different], b[different]))
            self._known = None

    def fix(self, layers: Iterable[Vector], reason: str) -> None:
        for one in layers:
            for label in one[one != FIXED].tolist():
                self.reasons.setdefault(label, reason)
            self.couple(one, np.zeros_like(one))

    def classes(self) -> Vector:
        """For every label, the smallest one that it is coupled with."""
        if self._known is None or len(self._known) < self.count:
            if self._edges:
                a, b = (np.concatenate(side) for side in zip(*self._edges, strict=True))
            else:
                a = b = np.zeros(0, dtype=np.int64)
            graph = scipy.sparse.coo_matrix(
                (np.ones(len(a), dtype=np.int8), (a, b)), shape=(self.count, self.count)
            )
            _, found = scipy.sparse.csgraph.connected_components(graph, directed=False)
            first = np.full(int(found.max()) + 1, self.count, dtype=np.int64)
            np.minimum.at(first, found, np.arange(self.count))
            self._known = first[found]
        return self._known

    # -- axes that meet -----------------------------------------------------------------------

    def materialize(self, labels: Labels) -> None:
        """Labels of its own for every axis that is still fresh."""
        for axis in list(labels.fresh):
            labels.axes[axis] = (self.new(labels.shape[axis]),)
        labels.fresh.clear()

    def join(self, sides: Sequence[tuple[Labels, int]], reason: str) -> Layers:
        """The layers of axes whose entries meet one by one."""
        known = [(one, axis) for one, axis in sides if axis not in one.fresh]
        if not known:
            labels, axis = sides[0]
            labels.axes[axis] = (self.new(labels.shape[axis]),)
            labels.fresh.discard(axis)
            return self.join(sides, reason)
        layers = [one.layers(axis) for one, axis in known]
        found = layers[0]
        if any(len(one) != len(found) for one in layers):
            for one in layers:
                self.fix(one, reason)
            found = ()
        for others in layers[1:]:
            for a, b in zip(found, others, strict=False):
                self.couple(a, b)
        for labels, axis in sides:
            if axis in labels.fresh:
                labels.fresh.discard(axis)
                labels.axes[axis] = found
                if not found:
                    labels.reasons[axis] = reason
        return found

    # -- data movement ------------------------------------------------------------------------

    def moved(
        self, labels: Labels, run: Callable[[Tensor], Any], shapes: Sequence[tuple[int, ...]]
    ) -> list[Labels]:
        """The labels after data movement, which is executed on them; `run` moves a tensor."""
        self.materialize(labels)
        found = [Labels(shape) for shape in shapes]
        for axis, layers in labels.axes.items():
            for layer in layers:
                view = [1] * len(labels.shape)
                view[axis] = -1
                spread = torch.from_numpy(layer).view(view).expand(labels.shape)
                results = run(spread)
                results = results if isinstance(results, (list, tuple)) else [results]
                for one, result in zip(found, results, strict=True):
                    self._place(one, result)
        return found

    def _place(self, labels: Labels, spread: Tensor) -> None:
        """Add a layer to the axis along which labels vary."""
        if not spread.numel():
            return
        axes = [axis for axis in range(spread.ndim) if varies(spread, axis)]
        if len(axes) > 1:
            index = tuple(slice(None if axis in axes else 1) for axis in range(spread.ndim))
            spread = torch.from_numpy(self.classes()[spread[index].numpy()])
            axes = [axis for axis in axes if varies(spread, axis)]
        if len(axes) > 1:
            axes = [self._rectangular(spread.numpy(), axes)]
        if not axes:
            label = spread.flatten()[:1].numpy()
            self.fix([label], "all of a value would go away with it")
            return
        (axis,) = axes
        vector = _along(spread, axis)
        if (vector != FIXED).any():
            labels.axes[axis] = (*labels.axes.get(axis, ()), vector)

    def _rectangular(self, spread: Vector, axes: list[int]) -> int:
        """Couple labels until they vary along one axis only: the one that leaves most of them apart,
        and each entry its own."""
        rows = {axis: np.moveaxis(spread, axis, 0).reshape(spread.shape[axis], -1) for axis in axes}
        apart = {axis: _left_apart(self.count, one) for axis, one in rows.items()}
        best = max(axes, key=lambda axis: (apart[axis] == len(rows[axis]), apart[axis], axis))
        self.couple(rows[best][:, 1:], rows[best][:, :1])
        return best


def _left_apart(count: int, rows: Vector) -> int:
    """How many labels are left apart if those of each row are coupled, not counting the fixed one."""
    first = np.repeat(rows[:, :1], rows.shape[1] - 1, axis=1).ravel()
    graph = scipy.sparse.coo_matrix(
        (np.ones(len(first), dtype=np.int8), (first, rows[:, 1:].ravel())), shape=(count, count)
    )
    _, found = scipy.sparse.csgraph.connected_components(graph, directed=False)
    kept = np.unique(found[rows])
    return int((kept != found[FIXED]).sum())


def varies(spread: Tensor, axis: int) -> bool:
    """Whether entries along an axis differ anywhere."""
    if spread.shape[axis] == 1 or spread.stride(axis) == 0:
        return False
    return bool((spread != spread.narrow(axis, 0, 1)).any())


def _along(spread: Tensor, axis: int) -> Vector:
    index: list[Any] = [0] * spread.ndim
    index[axis] = slice(None)
    found: Vector = spread[tuple(index)].contiguous().numpy()
    return found
