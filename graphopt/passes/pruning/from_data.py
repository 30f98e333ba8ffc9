"""Reconstruction from activations: the graph with all channels beside the one without, map after map."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, fx

from graphopt.ir.channels.remove import remove
from graphopt.ir.interpret import MEMORY_LIMIT, Evaluator
from graphopt.passes.pruning.evidence import Evidence
from graphopt.passes.pruning.maps import LinearMap, constant, is_own, maps, rows_of

PART = 1 << 24  # elements of patches at once
ZERO = torch.zeros(())


class _SideBySide:
    """The graph with all channels and the one without, on the same batches. States that are set hold
    for all that is evaluated later."""

    def __init__(self, evidence: Evidence, gone: Collection[int], needed_by: str) -> None:
        batches = [inputs for inputs, _ in evidence.batches(needed_by)]
        self.groups, self.lost = evidence.groups, evidence.groups.lost(gone)
        self.source, self.pruned = evidence.graph, remove(evidence.groups, gone)
        self.values: dict[str, Tensor] = {}
        limit = MEMORY_LIMIT // (2 * len(batches))
        self.runs = [
            tuple(Evaluator(one, inputs, False, limit) for one in (self.source, self.pruned))
            for inputs in batches
        ]

    def maps(self) -> Iterator[tuple[LinearMap, LinearMap]]:
        """The maps that lose inputs, in both graphs, in the order of evaluation."""
        for wide, narrow in zip(maps(self.source), maps(self.pruned), strict=True):
            if wide.into in self.groups.kept(wide.weight, self.lost):
                yield wide, narrow

    def kept(self, state: fx.Node, axis: int) -> Tensor:
        found = self.groups.kept(state, self.lost).get(axis)
        value = self.value(state)
        return torch.arange(value.shape[axis]) if found is None else torch.from_numpy(found)

    def value(self, state: fx.Node) -> Tensor:
        name = str(state.target)
        return self.values.get(name, self.source.states[name].tensor.detach())

    def set(self, state: fx.Node, value: Tensor) -> None:
        name = str(state.target)
        old = self.pruned.states[name]
        self.values[name] = value = value.to(self.value(state))
        for axis in self.groups.kept(state, self.lost):
            value = value.index_select(axis, self.kept(state, axis).to(value.device))
        self.pruned.states[name] = dataclasses.replace(old, tensor=value, exact=None)

    def restore_mean(self, wide: LinearMap, narrow: LinearMap) -> None:
        """The mean of every output over the data becomes that of the source."""
        held = constant(self.source, wide)
        if held is None or wide.out is None:
            return
        (state, sign), axis = held, wide.out
        count, total = 0, torch.zeros(())
        for source, pruned in self.runs:
            expected = rows_of(source.evaluate(wide.node), axis)
            found = rows_of(pruned.evaluate(narrow.node), axis)
            kept = self.kept(state, 0).to(found.device)
            count += len(found)
            total = total.to(found) + (expected[:, kept] - found).sum(0)
            pruned.forget([narrow.node])
        value = self.value(state).double().clone()
        value[kept] += sign * total / count
        self.set(state, value)

    def fit(self, wide: LinearMap, narrow: LinearMap, ridge: float) -> None:
        """The weight becomes `W M`, with M the least-squares solution of `x ~ M x'`."""
        n, sum_x, sum_y, yy, yx = 0, ZERO, ZERO, ZERO, ZERO
        for x, y in self.read(wide, narrow):
            n += x.shape[1]
            sum_x, sum_y = sum_x + x.sum(1, keepdim=True), sum_y + y.sum(1, keepdim=True)
            yy, yx = yy + y.mT @ y, yx + y.mT @ x
        if constant(self.source, wide) is not None:
            yy, yx = yy - sum_y.mT @ sum_y / n, yx - sum_y.mT @ sum_x / n
        kept, taps = self.kept(wide.weight, wide.into), torch.arange(wide.taps)
        plain = torch.zeros_like(yx)
        plain[:, range(yy.shape[1]), (kept[:, None] * wide.taps + taps).flatten()] = 1
        damping = ridge * yy.diagonal(dim1=1, dim2=2).mean() + torch.finfo(yy.dtype).tiny
        damped = yy + damping * torch.eye(yy.shape[1]).to(yy)
        m = plain + torch.linalg.solve(damped, yx - yy @ plain)
        value = self.value(wide.weight).double().clone()
        columns = wide.columns(value)
        at = columns.ndim - 1 - len(wide.kernel)
        made = columns.reshape(wide.groups, -1, m.shape[2]) @ m.mT.to(value)
        shape = (*columns.shape[:at], len(kept), *wide.kernel)
        columns.index_copy_(at, kept.to(value.device), made.reshape(shape))
        self.set(wide.weight, value)

    def read(self, wide: LinearMap, narrow: LinearMap) -> Iterator[tuple[Tensor, Tensor]]:
        """What the map is given in both graphs, part by part."""
        for source, pruned in self.runs:
            x, y = source.evaluate(wide.input), pruned.evaluate(narrow.input)
            count = len(x)
            if wide.channels > 0:
                count = max(PART * count // (x.numel() * wide.taps), 1)
            for a, b in zip(x.split(count), y.split(count), strict=True):
                yield wide.read(a), narrow.read(b)


def least_squares(
    evidence: Evidence, gone: Collection[int], ridge: float = 0.01
) -> dict[str, Tensor]:
    """The combination of kept channels that is nearest to every channel on the data:

        min over M of  sum over the data |x - M x'|^2 + ridge s |M - M_plain|^2,

    with x from the source, x' from the graph without the channels as corrected so far, both centred where
    a bias can hold the mean, and s the mean of the eigenvalues of the sum of x' x'^T. Without the ridge
    `W M x'` is nearest to `W x`, whatever W is: the reconstruction of He et al. (arXiv 1707.06168),
    for all x that the kernel of a convolution sees.

    Raises:
        EvidenceError: without data.
    """
    pair = _SideBySide(evidence, gone, "least-squares")
    for wide, narrow in pair.maps():
        if is_own(wide.weight):
            pair.fit(wide, narrow, ridge)
        pair.restore_mean(wide, narrow)
    return pair.values


def bias_correction(evidence: Evidence, gone: Collection[int]) -> dict[str, Tensor]:
    """The mean output of every map over the data and all positions becomes what it was in the source,
    by `b += E[y] - E[y']` (Nagel et al., arXiv 1906.04721), one map after the other. At
    padded borders the mean is right, single positions are not.

    Raises:
        EvidenceError: without data.
    """
    pair = _SideBySide(evidence, gone, "bias-correction")
    for wide, narrow in pair.maps():
        pair.restore_mean(wide, narrow)
    return pair.values
