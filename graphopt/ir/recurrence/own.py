"""What every step has of its own is told apart from what it computes: parameters that differ from step to
step are inputs of the step, and what is computed with them is part of it.

    norm_t(x_t)  =  s_t x_t + b_t           s_t = weight_t / sqrt(var_t + eps), b_t = bias_t - mean_t s_t
    (y p)[t]     =  y[t] p[t]               p of T entries along the axis of time

The first is an eval-mode batch norm with parameters of its own at every step (BNTT, arXiv 2010.01729), the
second a factor of every step, applied to all steps at once (TEBN, Duan et al., NeurIPS 2022).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from graphopt.ir import ops
from graphopt.ir.affine import same, same_shape
from graphopt.ir.builder import Builder, infer
from graphopt.ir.graph import Graph, is_pure
from graphopt.ir.many import Many, acting, slots
from graphopt.ir.recurrence.alike import taking_tensor
from graphopt.ir.recurrence.chain import Chain, Formula
from graphopt.ir.recurrence.steps import element, tensor
from graphopt.ir.value import Value

aten = torch.ops.aten
_NEUTRAL = {aten.add: 0.0, aten.sub: 0.0, aten.mul: 1.0, aten.div: 1.0}
MOST_OPS = 16  # of one tree that are done to all steps at once


def own_norms(graph: Graph, chain: Chain) -> list[ops.BatchNorm]:
    """The eval-mode norms of a chain that have parameters of their own at every step."""
    found = []
    for node in chain.nodes:
        op = Builder(graph, node.next).view(node)
        if isinstance(op, ops.BatchNorm) and not op.uses_batch_statistics:
            params = [one.node for slot, one in slots(op).items() if slot != ("input", 0)]
            if all(map(graph.is_constant, params)) and set(params) - set(chain.invariants):
                found.append(op)
    return found


def written_out(norm: ops.BatchNorm) -> Value:
    """The same as a product and a sum."""
    shape = (-1, *(1,) * (norm.input.ndim - 2))
    scale, shift = (one.reshape(*shape) for one in norm.scale_and_shift())
    return (norm.input * scale + shift).to(norm.out.dtype)


class Own:
    """A chain, which is rewritten in place. `made`: the nodes that were emitted for it, all of them pure."""

    def __init__(self, graph: Graph, chain: Chain) -> None:
        self.graph, self.chain = graph, chain
        self.made: list[fx.Node] = []
        self._entered: set[fx.Node] = set()

    def rollback(self) -> None:
        """Erase what was emitted and is read by nothing."""
        for node in reversed(self.made):
            if not node._erased and not node.users:
                self.graph.fx.erase_node(node)
        self.made.clear()

    # -- numbers ----------------------------------------------------------------------------------

    def tell_numbers(self) -> None:
        """Numbers of their own at every step become inputs of the step, as tensors without axes."""
        chain = self.chain
        for call, numbers in chain.numbers:
            target, like = taking_tensor(call), tensor(call.args[0])  # type: ignore[arg-type]
            nodes = self._numbers(numbers, like)
            call.target = target
            call.args = (
                call.args[0],
                _placed(chain.body.graph, len(chain.inputs), "number", nodes[0]),
            )
            chain.inputs.append(nodes)
            if chain.first is not None:
                shown = [
                    one.args[-1] for one in chain.first.graph.nodes if taking_tensor(one) is target
                ]
                neutral = _NEUTRAL.get(target.overloadpacket)
                shown += [] if neutral is None else [neutral]  # the first step may do without
                chain.choices[nodes[0]] = self._numbers(shown, like)
        chain.numbers = []

    def _numbers(self, numbers: list[float], like: torch.Tensor) -> list[fx.Node]:
        builder = Builder(self.graph, min(self.chain.nodes))
        nodes = [builder.emit(ops.Full((), one, like.dtype, like.device)).node for one in numbers]
        self.made += builder.made
        return nodes

    # -- what is done to all steps at once ----------------------------------------------------------

    def enter(self) -> None:
        """What is done to all steps at once with a parameter that has an entry for each of them, and is
        read by the steps alone, becomes part of the step; so does what stands between, pointwise."""
        while any(map(self._enters, range(len(self.chain.inputs)))):
            pass

    def _enters(self, number: int) -> bool:
        chain, nodes = self.chain, self.chain.inputs[number]
        places = [one for one in map(element, nodes) if one is not None]
        if len(places) < len(nodes) or len({one[:2] for one in places}) != 1:
            return False
        whole, axis = places[0][0], places[0][1] % tensor(places[0][0]).ndim
        inside = {*nodes, *chain.nodes}
        if not self._readers(whole) <= set(nodes) or any(set(one.users) - inside for one in nodes):
            return False
        builder = Builder(self.graph, whole)
        found = self._at_once(whole, axis, builder)
        if found is None or not self._owns(found):
            builder.rollback()
            return False
        self._move(number, found, builder, [position for _, _, position in places])
        self.made += builder.made
        return True

    def _readers(self, node: fx.Node) -> set[fx.Node]:
        """What reads a value and is not in the step already; of all its parts, what reads these."""
        apart = (one.users if one.target is aten.unbind.int else (one,) for one in node.users)
        return {one for some in apart for one in some if one not in self._entered}

    def _at_once(self, whole: fx.Node, axis: int, builder: Builder) -> _AtOnce | None:
        """The pointwise call that computes all steps of a value, on `[T, N, ...]` or on `[T * N, ...]`;
        None if there is none, or an operand is not told apart by steps."""
        value = builder.value(whole)
        flat = not axis and isinstance(value.op, ops.Reshape) and _is_unflattened(value.op)
        call = value.op.input.node if flat and isinstance(value.op, ops.Reshape) else whole
        op = acting(call, builder)
        if (
            op is None
            or not is_pure(call)
            or not _is_pointwise(call, op)
            or (flat and self._readers(call) != {whole})
        ):
            return None
        operands = {}
        for one in slots(op).values():
            time = _time(one, op.out, axis)
            if self.graph.is_constant(one.node):
                if flat and time is not None and time.alike:
                    time = _Time(one.node, None, True)
            elif flat:
                alike = same_shape(one.shape, op.out.shape)
                time = _Time(_stacked(one, whole).node, 0, False) if alike else None
            if time is None or (flat and self.graph.is_constant(one.node) and not time.alike):
                return None
            if not (time.alike or self.graph.is_constant(one.node)):
                if not same_shape(tensor(time.node).shape, value.shape):
                    return None
            operands[one.node] = time
        return _AtOnce(whole, call, operands)

    def _owns(self, found: _AtOnce, depth: int = MOST_OPS) -> bool:
        """Whether a parameter with an entry for every step is in a call, or in what only it reads."""
        steps = [one for one in found.operands.items() if not one[1].alike]
        if any(self.graph.is_constant(one) for one, _ in steps):
            return any(not self.graph.is_constant(one) for one, _ in steps)
        for one, time in steps if depth else ():
            between = {found.call, one, time.node}
            if self._readers(one) | self._readers(time.node) <= between:
                builder = Builder(self.graph, time.node)
                inner = self._at_once(time.node, time.axis or 0, builder)
                owns = inner is not None and self._owns(inner, depth - 1)
                builder.rollback()
                if owns:
                    return True
        return False

    def _move(self, number: int, found: _AtOnce, builder: Builder, positions: list[int]) -> None:
        """An operation on all steps becomes one on the input of each."""
        chain, body = self.chain, self.chain.body.graph
        old, twins = _places(chain.body)[number], dict[fx.Node, fx.Node]()
        for one, time in found.operands.items():
            value, axis = builder.value(time.node), time.axis
            nodes = [time.node if axis is None else builder.emit(ops.Select(value, axis, t)).node
                     for t in ([0] if time.alike else positions)]  # fmt: skip
            if time.alike:
                for formula in filter(None, (chain.body, chain.first)):
                    made = _placed(formula.graph, len(_places(formula)), "alike", nodes[0])
                    twins.setdefault(one, made)
                chain.invariants.append(nodes[0])
            else:
                twins[one] = _placed(body, number, "own", nodes[0])
                chain.inputs.insert(number, nodes)
                number += 1
        with body.inserting_after(_places(chain.body)[-1]):
            made = body.node_copy(found.call, twins.__getitem__)
        made.meta = {**old.meta, "val": infer(self.graph, made.target, made.args, made.kwargs)}
        old.replace_all_uses_with(made)
        body.erase_node(old)
        del chain.inputs[number]
        self._entered |= {found.whole, found.call}
        self._entered |= {one for one in found.operands if not self._readers(one)}


@dataclasses.dataclass(frozen=True)
class _Time:
    """A value, and the axis of it that is aligned with time, if it has one; `alike`: one entry there."""

    node: fx.Node
    axis: int | None
    alike: bool


@dataclasses.dataclass(frozen=True)
class _AtOnce:
    """A pointwise call for all steps of `whole`, and where time is in what it reads."""

    whole: fx.Node
    call: fx.Node
    operands: dict[fx.Node, _Time]


def _time(value: Value, out: Value, axis: int) -> _Time | None:
    own = axis - (out.ndim - value.ndim)
    if own < 0:
        return _Time(value.node, None, True)
    if same(value.shape[own], 1) and not same(out.shape[axis], 1):
        return _Time(value.node, own, True)
    if same(value.shape[own], out.shape[axis]):
        return _Time(value.node, own, False)
    return None


def _is_unflattened(op: ops.Reshape) -> bool:
    """Whether [T * N, ...] becomes [T, N, ...]."""
    shape = op.out.shape
    return (
        isinstance(shape[0], int)
        and len(shape) == op.input.ndim + 1
        and same_shape(op.input.shape[1:], shape[2:])
    )


def _stacked(value: Value, like: fx.Node) -> Value:
    """A value `[T * N, ...]` as `[T, N, ...]`, the shape of `like`."""
    op, shape = value.op, tensor(like).shape
    if isinstance(op, ops.Reshape) and same_shape(op.input.shape, shape):
        return op.input
    return Many(value, int(shape[0]), True).stacked()


def _is_pointwise(node: fx.Node, op: ops.Op) -> bool:
    tagged = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return tagged or isinstance(op, (ops.Binary, ops.Unary, ops.Compare, ops.Where))


def _places(formula: Formula) -> list[fx.Node]:
    return [node for node in formula.graph.nodes if node.op == "placeholder"]


def _placed(graph: fx.Graph, place: int, name: str, like: fx.Node) -> fx.Node:
    """A placeholder at a place among the others, for a value of the type of `like`."""
    nodes = list(graph.nodes)
    with graph.inserting_before(nodes[place]):
        made = graph.placeholder(name)
    made.meta = {"val": like.meta["val"]}
    return made
