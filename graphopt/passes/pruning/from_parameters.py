"""Reconstruction without data: channels as combinations of others, by the parameters that write them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from torch import Tensor, fx

from graphopt.ir.builder import Builder
from graphopt.ir.channels import Groups
from graphopt.ir.channels.labels import Vector
from graphopt.ir.graph import Graph
from graphopt.passes.pruning.evidence import Evidence, EvidenceError
from graphopt.passes.pruning.maps import PRODUCTS, LinearMap, is_own, maps_of, norm_behind

Matrix = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class _Family:
    """Groups of one width. `slots` are (state, axis, entries `[groups, entries of each]`)."""

    slots: list[tuple[str, int, Vector]]
    away: NDArray[np.bool_]  # for every group


def _families(groups: Groups, gone: Collection[int]) -> Iterator[_Family]:
    """The families of which some groups go and some stay."""
    lost = groups.lost(gone)
    for family in groups.families():
        away = lost[family.labels]
        if away.any() and not away.all():
            slots = [
                (one.name, one.axis, np.array([group.members[i].entries for group in family]))
                for i, one in enumerate(family[0].members)
            ]
            yield _Family(slots, away)


class _Parameters:
    """Float64 values of the states of a graph, with batch norms merged into the maps before them, and
    which axes of weights read channels: all other axes write them."""

    def __init__(self, groups: Groups) -> None:
        self.graph = groups.graph
        self.new: dict[str, Tensor] = {}
        self.readers: dict[tuple[str, int], list[fx.Node]] = {}
        self.left: set[str] = set()  # read by a product, but not as they are
        builder = Builder(self.graph, self.graph.output)
        for node in self.graph.calls:
            op = builder.view(node)
            for found in (read := list(maps_of(op))):
                self.readers.setdefault((found.name, found.into), []).append(found.input)
                self._merge_norm(found)
            if not read and isinstance(op, PRODUCTS):
                constant = filter(self.graph.is_constant, node.all_input_nodes)
                self.left |= self.above(list(constant))

    def __getitem__(self, name: str) -> Tensor:
        known = self.new.get(name)
        return self.graph.states[name].tensor.detach().double() if known is None else known

    def above(self, nodes: list[fx.Node]) -> set[str]:
        """The states that nodes are computed from."""
        seen, stack = set(nodes), list(nodes)
        while stack:
            more = set(stack.pop().all_input_nodes) - seen
            seen |= more
            stack += more
        return {str(one.target) for one in seen if one.op == "get_attr"}

    def _merge_norm(self, found: LinearMap) -> None:
        """The map with the scale and shift of the batch norm behind, which then does nothing."""
        norm = norm_behind(self.graph, found)
        if (
            norm is None
            or not is_own(found.weight)
            or not (found.bias is None or is_own(found.bias))
        ):
            return
        inner, out = found.bias, 1 - found.into
        gain, outer, mean, var = (
            None if one is None else one.node
            for one in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        )

        def value(node: fx.Node | None) -> Any:
            return None if node is None else self[str(node.target)]

        scale = (value(var) + norm.eps).rsqrt() * (1 if gain is None else value(gain))
        shift = ((0 if inner is None else value(inner)) - value(mean)) * scale
        shift = shift if outer is None else shift + value(outer)
        nothing, one = torch.zeros_like(shift), torch.ones_like(shift)
        self.new[found.name] = (self[found.name].movedim(out, -1) * scale).movedim(-1, out)
        for node, new in (
            (gain, one), (var, one - norm.eps), (inner, nothing), (outer, shift),
            (mean, -shift if outer is None else nothing),
        ):  # fmt: skip
            if node is not None:
                self.new[str(node.target)] = new

    def writing(self, family: _Family, within: set[str]) -> tuple[Matrix, Matrix]:
        """What writes the channels of every group, each `[groups, n]`: rows of weights, and what has one
        number for a channel, from these states. What is the same for all groups is left out."""
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        for name, axis, entries in family.slots:
            if name in within and name not in self.left and (name, axis) not in self.readers:
                value = self[name]
                rows = value.movedim(axis, 0)[torch.from_numpy(entries)].flatten(1)
                if (rows != rows[:1]).any():
                    found[value.ndim == 1].append(rows)
        nothing = torch.zeros(len(family.away), 0)
        weights, single = (torch.cat([nothing, *(one.cpu() for one in side)], 1) for side in found)
        return weights.numpy(), single.numpy()


def _combined(value: Tensor, axis: int, entries: Vector, family: _Family, mix: Matrix) -> Tensor:
    """`value` with the entries of groups that stay replaced by combinations of those of all groups;
    `mix` is `[groups that stay, groups]`."""
    moved = value.movedim(axis, 0).clone()
    rows = moved[torch.from_numpy(entries)]
    made = torch.tensordot(torch.from_numpy(mix).to(rows), rows, 1)
    moved[torch.from_numpy(entries[~family.away])] = made
    return moved.movedim(0, axis)


def _as_stored(graph: Graph, values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(graph.states[name].tensor.detach()) for name, value in values.items()}


def data_free(
    evidence: Evidence, gone: Collection[int], ridge: float = 0.1, shifts: float = 1.0
) -> dict[str, Tensor]:
    """A channel is the combination of kept channels that its parameters are nearest to:

        min over m of  |f_r - sum_k m_k f_k|^2 + shifts |v_r - sum_k m_k v_k|^2 + ridge s |m|^2

    f are the rows of all weights that write the channel before the map in question, scaled by the batch
    norm behind, v biases and shifts, s the mean square of the kept channels (after UDFC, Bai et al.,
    arXiv 2308.07209; ridge and shifts are in other units here). Activations are passed over: the
    combination is exact for duplicates, and for all linear dependencies where there are none.
    """
    graph, parameters = evidence.graph, _Parameters(evidence.groups)
    values: dict[str, Tensor] = {}
    for family in _families(evidence.groups, gone):
        for name, axis, entries in family.slots:
            if (name, axis) not in parameters.readers or name in parameters.left:
                continue
            above = parameters.above(parameters.readers[name, axis])
            rows, single = parameters.writing(family, above)
            features = np.concatenate([rows, np.sqrt(shifts) * single], 1)
            kept, lost = features[~family.away], features[family.away]
            one = np.eye(len(kept))
            gram = kept @ kept.T
            damping = ridge * np.trace(gram) / len(kept) + np.finfo(float).tiny
            mix = np.zeros((len(kept), len(features)))
            mix[:, ~family.away] = one
            mix[:, family.away] = np.linalg.solve(gram + damping * one, kept @ lost.T)
            value = values.get(name, graph.states[name].tensor.detach().double())
            values[name] = _combined(value, axis, entries, family, mix)
    return _as_stored(graph, values)


def optimal_transport(
    evidence: Evidence, gone: Collection[int], fuse: bool = True
) -> dict[str, Tensor]:
    """Channels that go are fused into those that stay (Intra-Fusion, Theus et al., arXiv 2402.07839,
    section 3). The plan T moves the mass of all channels, the same for each, to those that stay, at the
    l1 distance of the normalized parameters that write them, batch norms merged. What reads kept channel
    k gains the share T_ik / sum_k T_ik of what reads i; with `fuse`, what writes k becomes the mean of what
    writes all channels i, by weights T_ik. The paper normalizes T over k in both places, which doubles
    duplicates; this way they fuse exactly.
    """
    try:
        import ot  # takes seconds
    except ImportError as error:
        raise EvidenceError(
            "optimal-transport needs POT: pip install graphopt[transport]"
        ) from error

    graph, parameters = evidence.graph, _Parameters(evidence.groups)
    for family in _families(evidence.groups, gone):
        features = np.concatenate(parameters.writing(family, set(graph.states)), 1)
        features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-300)
        count, stay = len(family.away), int((~family.away).sum())
        cost = cdist(features, features[~family.away], "cityblock")
        plan = ot.emd(np.full(count, 1 / count), np.full(stay, 1 / stay), cost).T
        for name, axis, entries in family.slots:
            reads = (name, axis) in parameters.readers
            if name not in parameters.left and (reads or fuse):
                mix = plan * (count if reads else stay)
                parameters.new[name] = _combined(parameters[name], axis, entries, family, mix)
    return _as_stored(graph, parameters.new)
