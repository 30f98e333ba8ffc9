"""Channels that are zero, and that may be removed with no change to any output.

    conv2(relu(gamma (conv1(x) - mean) / sigma + beta)),  rows of conv1, gamma, beta = 0  =>  remove

The entries of parameters that make the channels of a group are its producers; a group is zero-invariant if
removing it is exact once these are zero, whatever its other entries are (OTO, arXiv 2107.07467). Both are
found by running the graph on generic values in float64; no op has a rule, but for what a statistic counts:

- an entry of a parameter is a producer if the first values it meets the input in change in the channels
  of its group, and in no others;
- with the producers of some groups zero, none of the channels that stay may depend on those of these
  groups, and no statistic may count them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from graphopt.ir import ops
from graphopt.ir.builder import Builder
from graphopt.ir.channels import Groups, Labels
from graphopt.ir.channels.labels import FIXED, Vector
from graphopt.ir.graph import Graph, is_random
from graphopt.ir.interpret import Interpreter
from graphopt.ir.ops.base import hint
from graphopt.ir.storage import states_of
from graphopt.passes.pruning.evidence import Evidence, Scores

Axis = tuple[str, int]  # of a parameter, by name

_TOLERANCE = 1e-9  # a generic change is many orders larger, rounding many smaller


@dataclasses.dataclass(frozen=True)
class ZeroInvariant:
    """What makes the channels of every group, and the groups for which its being zero is not enough.

    `producers` are axes of parameters; `refused` gives the reason for labels of groups.
    """

    groups: Groups
    producers: frozenset[Axis]
    refused: dict[int, str]

    def pairs(self, axis: Axis) -> tuple[Vector, Vector]:
        """Entries of an axis, and the labels of the zero-invariant groups they belong to."""
        entries, labels = _pairs(self.groups, axis)
        stay = ~np.isin(labels, list(self.refused))
        return entries[stay], labels[stay]

    def norms(self, states: Mapping[str, Tensor]) -> Scores:
        """For every label, the l2 norm of its producers; infinite for what is not zero-invariant."""
        squares = np.full(self.groups.trace.coupling.count, np.inf)
        for name, axis in self.producers:
            entries, labels = self.pairs((name, axis))
            squares[labels] = np.where(np.isinf(squares[labels]), 0.0, squares[labels])
            value = states[name].detach().double().square()
            others = [one for one in range(value.ndim) if one != axis]
            along = (value.sum(others) if others else value).cpu().numpy()
            np.add.at(squares, labels, along[entries])
        norms: Scores = np.sqrt(squares)
        return norms


def zeros(evidence: Evidence) -> Scores:
    """The norm of what makes the channels of a group (arXiv 2107.07467): 0 where removing it is exact
    at the values at hand; larger than all others where it would not be even with that zero."""
    norms = zero_invariant(evidence.groups).norms(evidence.parameters)
    norms[np.isinf(norms)] = 2 * norms[np.isfinite(norms)].max(initial=1.0)
    return norms


def zero_invariant(groups: Groups, inputs: Sequence[Any] | None = None) -> ZeroInvariant:
    """Which groups are zero-invariant, and what their producers are. Takes about five runs of the graph.

    Args:
        groups: those of a graph in eval mode; the values of its parameters do not matter.
        inputs: flat inputs; by default generic ones, of the sizes of the example.
    """
    generator = torch.Generator().manual_seed(0)
    states = generic_states(groups.graph, generator)
    inputs = generic_inputs(groups.graph, generator) if inputs is None else inputs
    families = [family.labels.tolist() for family in groups.families()]
    several = [family for family in families if len(family) > 1]
    halves = [[label for family in several for label in family[start::2]] for start in (0, 1)]
    found: dict[int, str] = {}
    with torch.no_grad():
        roles = _Roles(groups, states[0], halves[0])
        roles.run(inputs)
        known = frozenset(roles.found)
        for half, values in zip(halves, states, strict=True):
            probe = _Probe(groups, _zeroed(groups, values, known, half), half)
            probe.run(inputs)
            found.update(probe.refused)
    made = {int(label) for axis in known for label in _pairs(groups, axis)[1]}
    refused: dict[int, str] = {}
    for family in families:
        # One of a family stands for all: whether it is zero may depend on signs.
        reason = next((found[label] for label in family if label in found), "")
        if len(family) == 1:
            reason = "it is the only group of its family"
        for label in family:
            if reason or label not in made:
                refused[label] = reason or "no parameter makes its channels"
    return ZeroInvariant(groups, known, refused)


# -- generic values --------------------------------------------------------------------------------


def generic_states(
    graph: Graph, generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every state in float64, twice: moved a little, so that nothing is zero by chance, and with signs
    drawn anew, the other way round in the second. What is positive throughout stays so, and variances."""
    plain, one, other = Interpreter(graph, lifted=True), {}, {}
    positive = _variances(graph)
    for name, state in graph.states.items():
        one[name] = other[name] = value = plain.state(name).detach()
        if state.kind == "constant" or value.dtype != torch.float64:
            continue
        drawn = torch.rand(3, *value.shape, generator=generator, dtype=torch.float64)
        drawn = drawn.to(value.device)
        moved = value.abs() * (1 + 0.1 * drawn[0]) + 0.01 * drawn[1]
        if name in positive or bool((value > 0).all()):
            one[name] = other[name] = moved
        else:
            one[name] = torch.where(drawn[2] < 0.5, moved, -moved)
            other[name] = -one[name]
    return one, other


def _variances(graph: Graph) -> set[str]:
    """The states that norms read as variances."""
    builder = Builder(graph, graph.output)
    views = map(builder.view, graph.calls)
    norms = (one for one in views if isinstance(one, (ops.BatchNorm, ops.InstanceNorm)))
    read = (getattr(one, "running_var", None) for one in norms)
    return {str(one.node.target) for one in read if one is not None}


def generic_inputs(graph: Graph, generator: torch.Generator) -> list[Any]:
    """Normal draws for floating inputs, ones for others: a token, or a mask that lets all pass."""
    found: list[Any] = []
    for node, given in zip(graph.inputs, graph.signature.inputs, strict=True):
        fake = node.meta.get("val")
        if given is not None or not isinstance(fake, Tensor):
            found.append(given)
            continue
        shape = [hint(size) for size in fake.shape]
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        value = drawn if fake.dtype.is_floating_point else torch.ones(shape)
        found.append(value.to(fake.device, fake.dtype))
    return found


def _zeroed(
    groups: Groups, states: Mapping[str, Tensor], producers: Iterable[Axis], gone: Sequence[int]
) -> dict[str, Tensor]:
    """The states with the producers of some groups zero."""
    found = dict(states)
    for name, axis in producers:
        entries, labels = _pairs(groups, (name, axis))
        index = torch.from_numpy(np.unique(entries[np.isin(labels, gone)]))
        found[name] = found[name].index_fill(axis, index.to(found[name].device), 0.0)
    return found


def _pairs(groups: Groups, axis: Axis) -> tuple[Vector, Vector]:
    """Entries of an axis of a parameter and labels of their groups, each pair once."""
    layers = groups.states[axis[0]].axes.get(axis[1], ())
    given = [np.stack([np.arange(len(layer)), layer]) for layer in layers]
    pairs = np.unique(np.concatenate([*given, np.zeros((2, 0), np.int64)], axis=1), axis=1)
    entries, labels = pairs[:, pairs[1] != FIXED]
    return entries, labels


# -- runs ------------------------------------------------------------------------------------------


class _Run(Interpreter):
    """A run with other states; `look` sees every value that depends on an input."""

    def __init__(self, groups: Groups, states: Mapping[str, Tensor], gone: Sequence[int]) -> None:
        super().__init__(groups.graph, lifted=True, writes=False)
        self.groups, self.states = groups, states
        self.lost = groups.lost(gone)

    def state(self, name: str, rows: slice | None = None) -> Tensor:
        return self.states[name] if rows is None else self.states[name][rows]

    def call(self, node: fx.Node, env: Any) -> Any:
        value = super().call(node, env)
        if not self.graph.is_constant(node) and not is_random(node):
            self.look(node, env, value)
        return value

    def again(self, node: fx.Node, env: Any, other: Mapping[fx.Node, Any]) -> Any:
        """The value of a call with some inputs replaced."""
        return super().call(node, {**{one: env[one] for one in node.all_input_nodes}, **other})

    def look(self, node: fx.Node, env: Any, value: Any) -> None:
        raise NotImplementedError

    def differ_outside(self, node: fx.Node, one: Any, other: Any) -> bool:
        """Whether two values of a node differ in entries that stay."""
        kept = self.groups.kept(node, self.lost)
        if isinstance(kept, list):
            return any(map(_differ, map(_selected, one, kept), map(_selected, other, kept)))
        return _differ(_selected(one, kept), _selected(other, kept))


class _Roles(_Run):
    """Finds the axes of parameters along which entries produce the channels of their own group."""

    def __init__(self, groups: Groups, states: Mapping[str, Tensor], gone: Sequence[int]) -> None:
        super().__init__(groups, states, gone)
        self.found: set[Axis] = set()

    def look(self, node: fx.Node, env: Any, value: Any) -> None:
        for operand in filter(self.graph.is_constant, node.all_input_nodes):
            for axis in self._axes(operand):
                other = self.again(node, env, {operand: self._changed(operand, axis)})
                if not self.differ_outside(node, value, other) and _differ(value, other):
                    self.found.add(axis)

    def _axes(self, operand: fx.Node) -> Iterator[Axis]:
        for one in [operand] if operand.op == "get_attr" else states_of(operand):
            name = str(one.target)
            if self.graph.states[name].kind == "parameter":
                for axis, layers in self.groups.states[name].axes.items():
                    if (name, axis) not in self.found and any(
                        self.lost[one].any() for one in layers
                    ):
                        yield name, axis

    def _changed(self, operand: fx.Node, axis: Axis) -> Any:
        """The value of a parameter-only node where the entries that go away are others."""
        name, dim = axis
        entries = np.zeros(self.states[name].shape[dim], dtype=bool)
        for layer in self.groups.states[name].axes[dim]:
            entries |= self.lost[layer]
        shape = [-1 if i == dim else 1 for i in range(self.states[name].ndim)]
        where = torch.from_numpy(entries).view(shape).to(self.states[name].device)
        changed = torch.where(where, 2 * self.states[name] + 1, self.states[name])
        plain = Interpreter(self.graph, lifted=True, writes=False)
        env: dict[fx.Node, Any] = {}
        for one in sorted(_upstream(operand)):
            if one.op == "get_attr":
                env[one] = changed if one.target == name else self.states[str(one.target)]
            else:
                env[one] = plain.call(one, env)
        return env[operand]


class _Probe(_Run):
    """Finds out, where the producers of groups are zero, which of these groups still matter."""

    def __init__(self, groups: Groups, states: Mapping[str, Tensor], gone: Sequence[int]) -> None:
        super().__init__(groups, states, gone)
        self.refused: dict[int, str] = {}
        self._builder = Builder(groups.graph, groups.graph.output)

    def look(self, node: fx.Node, env: Any, value: Any) -> None:
        place = f"{node.name} ({self.graph.where(node)})"
        read = {
            one: self.groups.trace.labels[one] for one in node.all_input_nodes
            if not self.graph.is_constant(one) and isinstance(env[one], Tensor)
        }  # fmt: skip
        if node in self.groups.trace.statistics:
            op = self._builder.view(node)
            for labels in read.values():
                for axis in _counted(op, len(labels.shape)):
                    self._refuse(
                        labels, axis, None, f"{place}: {self.groups.trace.statistics[node]}"
                    )
        masked = {one: self._masked(one, env[one]) for one in read}
        masked = {one: value for one, value in masked.items() if value is not None}
        if masked and self.differ_outside(node, value, self.again(node, env, masked)):
            for one in masked:
                for axis in read[one].axes:
                    self._refuse(
                        read[one], axis, env[one], f"{place} reads it where it is not zero"
                    )

    def _masked(self, node: fx.Node, value: Tensor) -> Tensor | None:
        """A value without the entries that go away; None if they are all zero."""
        kept = self.groups.kept(node, self.lost)
        found = value
        for axis, entries in kept.items():
            stay = torch.zeros(value.shape[axis], dtype=torch.bool, device=value.device)
            stay[torch.from_numpy(entries).to(value.device)] = True
            shape = [-1 if i == axis else 1 for i in range(value.ndim)]
            found = found.where(stay.view(shape), torch.zeros((), dtype=value.dtype))
        return None if torch.equal(found, value) else found

    def _refuse(self, labels: Labels, axis: int, value: Tensor | None, reason: str) -> None:
        """Refuse the groups of an axis that should go away; of a value, those that are not zero."""
        axis %= len(labels.shape)
        for layer in labels.layers(axis):
            found = self.lost[layer]
            if value is not None:
                nonzero = (value != 0).movedim(axis, 0).flatten(1).any(1)
                found = found & nonzero.cpu().numpy()
            for label in np.unique(self.groups.classes[layer[found]]).tolist():
                self.refused.setdefault(label, reason)


def _counted(op: Any, ndim: int) -> Sequence[int]:
    """The axes whose entries a statistic counts; where it is not known better, all."""
    if isinstance(op, (ops.LayerNorm, ops.RMSNorm)):
        return range(-len(op.normalized_shape), 0)
    if isinstance(op, (ops.Softmax, ops.LogSoftmax)):
        return (op.dim,)
    if isinstance(op, ops.GroupNorm):
        return (1,)
    return op.dims if isinstance(op, ops.Mean) else range(ndim)


def _upstream(node: fx.Node) -> set[fx.Node]:
    seen, stack = {node}, [node]
    while stack:
        for one in stack.pop().all_input_nodes:
            if one not in seen:
                seen.add(one)
                stack.append(one)
    return seen


def _selected(value: Any, kept: Mapping[int, Vector]) -> Any:
    for axis, entries in kept.items():
        value = value.index_select(axis, torch.from_numpy(entries).to(value.device))
    return value


def _differ(one: Any, other: Any) -> bool:
    """Whether two values are not the same up to rounding; what is not a number is like nothing."""
    if isinstance(one, (tuple, list)):
        return any(map(_differ, one, other))
    if not isinstance(one, Tensor) or not one.is_floating_point():
        return not torch.equal(one, other) if isinstance(one, Tensor) else bool(one != other)
    scale = one.abs().nan_to_num(0.0, 0.0, 0.0).amax() if one.numel() else 0.0
    return not bool(((one == other) | ((one - other).abs() <= _TOLERANCE * scale)).all())
