"""The graph of one step, from one whose loops over time are scans.

A value is followed with the place that time has in it (`Place`); scans become one step with states that are
given and handed on, and the axis of time, what takes steps apart and what puts them together go away.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import ChainMap
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from graphopt.ir import ops
from graphopt.ir.builder import Builder
from graphopt.ir.graph import is_random
from graphopt.ir.many import Pointwise, acting, slots
from graphopt.ir.ops.base import Op
from graphopt.ir.recurrence.operator import SCAN
from graphopt.ir.recurrence.repeated import REPEATING, infer, repetition
from graphopt.ir.rows import Form, form

aten = torch.ops.aten


class StreamingError(ValueError):
    """A model that cannot go one step at a time; the message names what hinders it."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where time is in a value. `kind`:

    none: nowhere; stacked: along `axis`; flat: the slow part of axis 0, `[T * rows, ...]`;
    step: it is the value of the steps `steps`, one of them; sum: the sum over `steps`.
    """

    kind: str
    axis: int = 0
    steps: frozenset[int] = frozenset()


NONE, FLAT = Place("none"), Place("flat")
SAME = "whose steps are no steps of an input"


class OneStep:
    """The graph of one step, and that of the states before the first one."""

    def __init__(
        self, module: fx.GraphModule, steps: int, inputs: Sequence[Place], repeated: bool = False
    ) -> None:
        self.module, self.steps, self.inputs = module, steps, inputs
        self.repeated = (
            repeated  # what is repeated as often as there are steps is repeated over time
        )
        self.graph = fx.Graph()
        self.twins: dict[fx.Node, fx.Node] = {}
        self.places: dict[fx.Node, Place] = {}
        self.states: list[tuple[fx.Node, fx.Node, fx.Node]] = []  # (placeholder, first, next)
        self._known: dict[Any, fx.Node] = {}
        self._results: dict[Any, list[tuple[fx.Node, Place]]] = {}  # of a scan
        self._time: fx.Node | None = None  # the number of the step, once something reads it
        self._constant: set[fx.Node] = set()  # parameters, and what is made of them alone

    def build(self) -> tuple[fx.Graph, fx.Graph, int, list[Place], bool]:
        """(start, step, number of states, where time is in the outputs of the whole, whether start and
        step take the number of the step, after the inputs: they have parameters for every step)."""
        nodes = list(self.module.graph.nodes)
        try:
            infer(self.module)
            return self._built(nodes)
        except StreamingError:
            raise
        except (RuntimeError, ValueError) as error:  # in torch's words, and those of a scan
            raise StreamingError(f"not for every batch size: {error}") from error
        finally:
            for node in nodes:
                node.meta.pop("val", None)

    def _built(self, nodes: list[fx.Node]) -> tuple[fx.Graph, fx.Graph, int, list[Place], bool]:
        feed = iter(self.inputs)
        for node in nodes:
            if node.op == "placeholder":
                self._set(node, self.graph.placeholder(node.name), next(feed))
        given = list(self.twins.values())
        scans: list[Any] = [one for one in nodes if one.target is SCAN]
        for number in range(sum(len(one.args[2]) for one in scans)):
            self.states.append((self.graph.placeholder(f"state_{number}"),) * 3)
        self._free = iter(range(len(self.states)))
        for node in nodes:
            fixed = self._constant.issuperset(node.all_input_nodes) and not is_random(node)
            if node.op == "get_attr" or (node.op == "call_function" and fixed):
                self._constant.add(node)
            if node.op == "placeholder":
                continue
            if node.op == "get_attr":
                self._set(node, self.graph.get_attr(str(node.target)), NONE)
            elif node.op == "call_function":
                self._call(node)
            else:
                leaves = pytree.tree_leaves(node.args[0])
                places = [self._returned(one) for one in leaves]
                results = [self.twins[one] for one in leaves]
        held, first, after = map(list, zip(*self.states, strict=True))
        given += [] if self._time is None else [self._time]
        start = self._cut(given, first, dict(zip(held, first, strict=True)))
        step = self._cut([*given, *held], [results, after], {})
        return start, step, len(self.states), places, self._time is not None

    def _cut(
        self, inputs: list[fx.Node], results: Any, instead: Mapping[fx.Node, fx.Node]
    ) -> fx.Graph:
        """The part of the graph that computes some results; `instead`: what stands for what."""
        found = fx.Graph()
        mapping = {node: found.node_copy(node) for node in inputs}
        stack = list(reversed(pytree.tree_leaves(results)))
        while stack:
            node = stack[-1]
            needed = [instead[node]] if node in instead else node.all_input_nodes
            missing = [one for one in needed if one not in mapping]
            if node not in mapping and not missing:
                mapping[node] = (
                    mapping[instead[node]] if node in instead
                    else found.node_copy(node, mapping.__getitem__)
                )  # fmt: skip
            stack += missing
            if not missing:
                stack.pop()
        found.output(fx.map_arg(results, mapping.__getitem__))
        return found

    def _returned(self, node: Any) -> Place:
        if not isinstance(node, fx.Node):
            raise StreamingError(f"the model returns {node!r}, which is no tensor")
        place = self.places[node]
        whole = place.kind == "sum" and len(place.steps) == self.steps
        last = place.kind == "step" and place.steps == {self.steps - 1}
        if not (whole or last or place.kind in ("none", "stacked", "flat")):
            raise StreamingError(f"{node.name} ({node.target}) returns single steps")
        return place

    # -- one call ---------------------------------------------------------------------------------

    def _emit(self, target: Any, args: tuple[Any, ...], kwargs: Any = None) -> fx.Node:
        """A call of the step's graph; the same call twice is one."""
        key = (target, repr(args), repr(kwargs or {}))
        if key not in self._known:
            self._known[key] = self.graph.call_function(target, args, kwargs or {})
        return self._known[key]

    def _copied(self, node: fx.Node, instead: Mapping[fx.Node, fx.Node] | None = None) -> fx.Node:
        twins = ChainMap(dict(instead or {}), self.twins)
        args, kwargs = fx.map_arg((node.args, node.kwargs), twins.__getitem__)
        return self._emit(node.target, args, kwargs)

    def _now(self, node: fx.Node, axis: int) -> fx.Node:
        """The entry for this step of a parameter that has one for each."""
        if self._time is None:
            with self.graph.inserting_before(next(iter(self.graph.nodes))):
                self._time = self.graph.placeholder("time")
        return self._emit(aten.select.int, (self.twins[node], axis, self._time))

    def _set(self, node: fx.Node, twin: fx.Node, place: Place) -> None:
        self.twins[node], self.places[node] = twin, place

    def _refuse(self, node: fx.Node, why: str) -> StreamingError:
        where = node.meta.get("where")
        return StreamingError(f"{node.name} ({node.target}){f' at {where}' if where else ''} {why}")

    def _call(self, node: fx.Node) -> None:
        if node.target is SCAN:
            return self._scan(node)
        if node.target is operator.getitem and node.args[0] in self._results:  # type: ignore[operator]
            twin, place = self._results[node.args[0]][node.args[1]]  # type: ignore[index]
            return self._set(node, twin, place)
        reads = node.all_input_nodes
        kinds = {self.places[one].kind for one in reads} - {"none"}
        builder = Builder(None, node)  # type: ignore[arg-type]
        if not kinds:
            return self._apart(node, builder)
        if node.target is aten.sym_size.int and kinds <= {"stacked", "flat"}:
            return self._sized(node)
        op = acting(node, builder)
        if kinds == {"stacked"} or kinds == {"flat"}:
            return self._together(node, op)
        if kinds == {"step"} and isinstance(op, (ops.Stack, ops.Cat)):
            return self._joined(node, op)
        moments = {self.places[one].steps for one in reads if self.places[one].kind != "none"}
        if kinds == {"step"} and len(moments) == 1:
            return self._set(node, self._copied(node), Place("step", 0, moments.pop()))
        return self._summed(node, op)

    def _sized(self, node: fx.Node) -> None:
        """A size, where it is not that of time."""
        source, dim = node.args
        assert isinstance(source, fx.Node) and isinstance(dim, int)
        place = self.places[source]
        dim %= source.meta["val"].ndim
        if dim == place.axis:
            raise self._refuse(node, "asks for the number of steps")
        dim -= place.kind == "stacked" and dim > place.axis
        self._set(node, self._emit(node.target, (self.twins[source], dim)), NONE)

    def _apart(self, node: fx.Node, builder: Builder) -> None:
        """A call that reads nothing of any step; what it repeats may be for the steps to read."""
        op = builder.view(node) if self.repeated else None
        axis = repetition(op, self.steps) if isinstance(op, REPEATING) else None
        if axis is None:
            return self._set(node, self._copied(node), NONE)
        if axis or not isinstance(op, (ops.Repeat, ops.Expand)):
            one = self._emit(aten.select.int, (self._copied(node), axis, 0))
        else:
            one = self.twins[op.input.node]
            if op.input.ndim == op.out.ndim:
                one = self._emit(aten.select.int, (one, 0, 0))
        self._set(node, one, Place("stacked", axis))

    def _scan(self, node: fx.Node) -> None:
        operands: Any = node.args
        body, _, states, xs, others = operands
        for one in xs:
            if self.places[one] != Place("stacked", 0) and one not in self._constant:
                raise self._refuse(node, f"reads {one.name}, {SAME}")
        for one in (*others, *states):
            place = self.places[one]
            first = one in states and place == Place("step", 0, frozenset({0}))
            if place != NONE and not first:
                raise self._refuse(node, f"reads {one.name} of more than one step")
        own = [next(self._free) for _ in states]
        held = [self.states[one][0] for one in own]
        entries = [self._now(one, 0) if one in self._constant else self.twins[one] for one in xs]
        now = [self._emit(aten.unsqueeze.default, (one, 0)) for one in entries]
        scan = self._emit(SCAN, (body, 1, held, now, [self.twins[one] for one in others]))
        count = len(node.meta["val"]) - len(held)
        parts = [self._emit(operator.getitem, (scan, i)) for i in range(count + len(held))]
        found = [
            (self._emit(aten.select.int, (one, 0, 0)), Place("stacked", 0)) for one in parts[:count]
        ]
        for slot, after, one in zip(own, parts[count:], states, strict=True):
            self.states[slot] = (self.states[slot][0], self.twins[one], after)
            found.append((after, Place("step", 0, frozenset({self.steps - 1}))))
        self._results[node] = found
        self._set(node, scan, NONE)

    def _joined(self, node: fx.Node, op: Any) -> None:
        parts = [one.node for one in op.tensors]
        order = [self.places[one].steps for one in parts]
        if order != [frozenset({t}) for t in range(self.steps)]:
            raise self._refuse(node, "joins some of the steps")
        if len({self.twins[one] for one in parts}) > 1:
            raise self._refuse(node, "joins steps that are not computed alike")
        stack = isinstance(op, ops.Stack)
        if not stack and op.dim:
            raise self._refuse(node, "joins steps along another axis than the first")
        place = Place("stacked", op.dim % op.out.ndim) if stack else FLAT
        self._set(node, self.twins[parts[0]], place)

    def _summed(self, node: fx.Node, op: Op | None) -> None:
        """A sum over steps, which leads to the output."""
        reads = [one for one in node.all_input_nodes if self.places[one].kind != "none"]
        alike = len({self.twins[one] for one in reads}) == 1
        places = [self.places[one] for one in reads]
        if isinstance(op, ops.Add) and len(reads) == 2 and alike:
            one, two = (place.steps for place in places)
            if not one & two and all(place.kind in ("step", "sum") for place in places):
                return self._set(node, self.twins[reads[0]], Place("sum", 0, one | two))
        scaled = isinstance(op, (ops.Mul, ops.Div)) and len(node.all_input_nodes) == 1
        if scaled and places[0].kind == "sum" and len(places[0].steps) == self.steps:
            return self._set(node, self.twins[reads[0]], places[0])
        if any(place.kind == "sum" for place in places):
            raise self._refuse(node, "reads a sum over the steps")
        raise self._refuse(node, "reads more than one step")

    # -- all steps at once ------------------------------------------------------------------------

    def _together(self, node: fx.Node, op: Op | None) -> None:
        reads = [one for one in node.all_input_nodes if self.places[one].kind != "none"]
        places = {self.places[one] for one in reads}
        if len(places) > 1:
            raise self._refuse(node, "reads values with time along different axes")
        (place,) = places
        one = reads[0]
        if op is None:
            raise self._refuse(node, "may mix the steps: nothing is known of it")
        if isinstance(op, ops.Reshape):
            return self._reshaped(node, op, place)
        if place.kind == "stacked":
            axis = place.axis
            if isinstance(op, ops.Select):
                dim = op.dim % op.input.ndim
                if dim == axis:
                    at = frozenset({op.index % self.steps})
                    return self._set(node, self.twins[one], Place("step", 0, at))
                made = self._emit(aten.select.int, (self.twins[one], dim - (dim > axis), op.index))
                return self._set(node, made, Place("stacked", axis - (dim < axis)))
            if isinstance(op, ops.Permute):
                dims = [dim - (dim > axis) for dim in op.dims if dim != axis]
                made = self.twins[one]
                if dims != sorted(dims):
                    made = self._emit(aten.permute.default, (made, dims))
                return self._set(node, made, Place("stacked", op.dims.index(axis)))
            if isinstance(op, (ops.Mean, ops.Sum)):
                return self._reduced(node, op, axis)
        if (
            place.kind == "stacked"
            and (instead := self._aligned(op, reads, place.axis)) is not None
        ):
            return self._set(node, self._copied(node, instead), place)
        data = frozenset(slot for slot, value in slots(op).items() if value.node in reads)
        found = form(op, data)
        if place.kind == "stacked" and (place.axis or {"dim", "dims"} & set(op.field_names())):
            raise self._refuse(node, "may mix the steps, which do not lie along its first axis")
        elif not (isinstance(found, Form) and found.flat):
            raise self._refuse(
                node, f"may mix the steps{f': {found}' if isinstance(found, str) and found else ''}"
            )
        self._set(node, self._copied(node), place)

    def _aligned(
        self, op: Op, reads: Sequence[fx.Node], axis: int
    ) -> dict[fx.Node, fx.Node] | None:
        """For a pointwise op on all steps, what one step reads in the place of what has no time: the
        entry for this step of a parameter that has one for each, the only one of what has an axis for it;
        None if the op is none, or steps may meet."""
        if not isinstance(op, _POINTWISE) or is_random(op.out.node):
            return None
        instead: dict[fx.Node, fx.Node] = {}
        for value in slots(op).values():
            node, own = value.node, axis - (op.out.ndim - value.ndim)
            if node in reads:
                if own != axis:
                    return None
            elif own >= 0 and value.shape[own] == 1:
                instead[node] = self._emit(aten.select.int, (self.twins[node], own, 0))
            elif own >= 0 and node in self._constant:
                instead[node] = self._now(node, own)
            elif own >= 0:
                return None
        return instead

    def _reduced(self, node: fx.Node, op: Any, axis: int) -> None:
        dims = [dim % op.input.ndim for dim in op.dims] or list(range(op.input.ndim))
        made = self.twins[op.input.node]
        rest = [dim - (dim > axis) for dim in dims if dim != axis]
        target = aten.mean.dim if isinstance(op, ops.Mean) else aten.sum.dim_IntList
        if rest:
            made = self._emit(target, (made, rest, op.keepdim))
        if axis in dims:
            if op.keepdim:
                raise self._refuse(node, "keeps an axis for the sum over time")
            return self._set(node, made, Place("sum", 0, frozenset(range(self.steps))))
        after = axis if op.keepdim else axis - sum(dim < axis for dim in dims)
        return self._set(node, made, Place("stacked", after))

    def _reshaped(self, node: fx.Node, op: Any, place: Place) -> None:
        """Axes merged or split beside that of time; time and rows merged into one or parted again."""
        before, after = tuple(op.input.shape), tuple(op.out.shape)
        twin = self.twins[op.input.node]
        named = list(node.meta["type"]["shape"])
        if place.kind == "flat":
            if after[0] == self.steps and after[1:2] == (before[0] // self.steps,):
                if after[2:] != before[1:]:
                    twin = self._viewed(node, twin, [-1, *named[2:]])
                return self._set(node, twin, Place("stacked", 0))
            if after[0] == before[0]:
                return self._set(node, self._viewed(node, twin, [-1, *named[1:]]), FLAT)
            raise self._refuse(
                node, "splits steps from their rows in another way than they were joined"
            )
        axis = place.axis
        if axis == 0 and len(before) > 1 and after[:1] == (before[0] * before[1],):
            if after[1:] != before[2:]:
                twin = self._viewed(node, twin, [-1, *named[1:]])
            return self._set(node, twin, FLAT)
        for to, size in enumerate(after):
            if size == self.steps and prod(after[:to]) == prod(before[:axis]):
                sizes = [*named[:to], *named[to + 1 :]]
                return self._set(node, self._viewed(node, twin, sizes), Place("stacked", to))
        raise self._refuse(node, "merges the axis of time with another")

    def _viewed(self, node: fx.Node, twin: fx.Node, named: Sequence[Any]) -> fx.Node:
        sizes = [size if isinstance(size, int) else -1 for size in named]
        if sizes.count(-1) > 1:
            raise self._refuse(node, "has more than one dynamic size")
        return self._emit(aten.reshape.default, (twin, sizes))


_POINTWISE = (
    ops.Unary, ops.Binary, ops.Pow, ops.Compare, ops.Where, ops.Cast, ops.Copy, ops.Detach, Pointwise,
)  # fmt: skip
