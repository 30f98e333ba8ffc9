"""One function applied to several values becomes one application to all of them.

    f(x_1), ..., f(x_n)   =   chunk(f(cat(x_1, ..., x_n)))

along the batch axis, for f that acts on every row alone, with the same parameters: the layers of a
spiking network at all its time steps, the branches of a Siamese network, heads that are shared, crops of
an image. It is the dual of `stack-siblings`, which takes several functions of one value together.

Chains of such f stay [n * rows, ...] and have nothing between them; what reads single values again
(a neuron, which depends on the step before) reads `select(v, 0, t)` of v, [n, rows, ...]. Which calls are
siblings is found by `graphopt.ir.siblings`, what an op does to rows by `graphopt.ir.rows`.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx

from graphopt.ir import cost, ops
from graphopt.ir.affine import same, same_shape
from graphopt.ir.builder import Builder
from graphopt.ir.contracts import Algebraic, Exact
from graphopt.ir.driver import Record, Session, shared_memory
from graphopt.ir.graph import Graph
from graphopt.ir.many import acting, in_order, slots, together
from graphopt.ir.ops.base import Op, numel
from graphopt.ir.order import bring_together
from graphopt.ir.rewrite import Rewriter, article, rewrite
from graphopt.ir.siblings import Siblings, find_siblings
from graphopt.ir.value import Value
from graphopt.passes.base import Pass
from graphopt.passes.canonicalize import merge_duplicates, reads_strides
from graphopt.passes.open_operators import pick_only, pick_stacked

NAME = "batch-siblings"


_MOVED = "it moves data alone; every site is compared bit for bit"


@rewrite(contract=Exact(), unproved=_MOVED)
def pick_repeated(select: ops.Select, rw: Rewriter) -> Value:
    """An entry of what is the same along an axis: select(repeat(x, n), 0, i) = select(x, 0, 0)."""
    source = select.input.op
    rw.match(isinstance(source, (ops.Repeat, ops.Expand)) and select.dim == 0)
    assert isinstance(source, (ops.Repeat, ops.Expand))
    inner = source.input
    rw.match(inner.ndim == select.input.ndim and same(inner.shape[0], 1))
    rw.match(isinstance(select.input.shape[0], int))
    if isinstance(source, ops.Repeat):
        rw.match(all(count == 1 for count in source.repeats[1:]))
    else:
        rw.match(same_shape(inner.shape[1:], select.input.shape[1:]))
    if isinstance(inner.op, ops.Reshape) and same_shape(inner.op.input.shape, select.out.shape):
        return inner.op.input
    return rw.emit_like(select, input=inner, index=0)


@rewrite(contract=Exact(), unproved=_MOVED)
def join_parts(join: ops.Cat | ops.Stack, rw: Rewriter) -> Value:
    """stack(select(v, 0, 0), ..., select(v, 0, n - 1)) = v, and cat the same with its rows."""
    rw.match(
        join.dim == 0 and len(join.tensors) > 1 and not any(map(reads_strides, join.out.users))
    )
    found = in_order(join.tensors)
    rw.match(found is not None)
    assert found is not None
    many = found[0].many(found[1], len(join.tensors))
    return many.flat() if isinstance(join, ops.Cat) else many.stacked()


@dataclasses.dataclass(frozen=True)
class BatchSiblings(Pass):
    """One layer applied to several values is applied to all of them at once."""

    name = NAME
    least: int = 2  # calls of one layer
    # How much longer it may take, by estimate, to have one op where there were several: bringing rows
    # together moves memory, until what computes them brings them together itself.
    slack: float = 0.5

    rewrites = (pick_repeated, pick_stacked, pick_only, join_parts)

    def run(self, session: Session) -> None:
        merge_duplicates(session)
        while session.run([pick_repeated, pick_stacked, pick_only]) + merge_duplicates(session):
            pass
        session.graph.eliminate_dead_code()
        plan = find_siblings(session.graph)
        reasons = dict(plan.reasons)
        enough = [one for one in plan.classes if len(one.members) >= self.least]
        classes = list(self._paying(session, enough, reasons))
        if classes and not session.applications.exhausted:
            bring_together(session.graph, [one.members for one in classes])
            copies = _outputs_apart(session.graph, classes)
            for found in classes:
                reason = _batch(session, found)
                if reason:
                    reasons[found.members[0]] = reason
            for copy in copies:
                _drop_if_alone(session, copy)
        session.run([join_parts])
        session.graph.eliminate_dead_code()
        for node, reason in reasons.items():
            if not node._erased:
                session.refused[NAME, node] = _record(session.graph, node, reason)

    @classmethod
    def all_rewrites(cls) -> Any:
        return cls.rewrites

    def _paying(
        self, session: Session, classes: Sequence[Siblings], reasons: dict[fx.Node, str]
    ) -> Iterator[Siblings]:
        """The classes of those chains that are about as fast as one."""
        costs = _Costs(session)
        kept: set[Siblings] = set()
        refused: dict[fx.Node, str] = {}
        left, progress = _chains(session.graph, classes), True
        while left and progress:  # what one chain brings together, another one need not
            chains, left, progress = left, [], False
            for chain in chains:
                found, reason = self._worth(costs, chain)
                if reason:
                    left.append(chain)
                    refused[chain[0].members[0]] = reason
                else:
                    kept.update(found)
                    progress = costs.bring_together(found) or progress
        refused = {chain[0].members[0]: refused[chain[0].members[0]] for chain in left}
        reasons.update(refused)
        yield from (one for one in classes if one in kept)

    def _worth(self, costs: _Costs, chain: Sequence[Siblings]) -> tuple[Sequence[Siblings], str]:
        """What of a chain is to be one, or why nothing is."""
        by_parameters = any(one.moves and not one.optional for one in chain)
        allowed = 1 + self.slack * by_parameters
        for some in (chain, [one for one in chain if not one.optional]):
            before, after = costs.of(some)
            if after <= before * allowed:
                return some, ""
        return (), (
            f"it would take {after * 1e6:.0f} us with what follows it instead of "
            f"{before * 1e6:.0f} (estimated for {costs.target.name})"
        )


def _record(graph: Graph, node: fx.Node, reason: str) -> Record:
    return Record(NAME, graph.where(node), str(Algebraic()), reason, node=node.name)


# -- one class ------------------------------------------------------------------------------------


def _batch(session: Session, found: Siblings) -> str:
    """Replace siblings by one call, checked; if it is not to be, nothing has changed and the reason is
    returned, empty if there is none to tell."""
    graph, members = session.graph, found.members
    joined, parts = _join(graph, members)
    rw = Rewriter(graph, joined, session.target)
    views = [acting(one, rw) for one in members]
    given = [slots(one) for one in views if one is not None]
    done, reason = False, ""
    if found.moves or all(found.form.is_free([one[slot] for one in given]) for slot in found.data):
        first = views[0]
        assert first is not None
        try:
            data = {slot: together([one[slot] for one in given]) for slot in sorted(found.data)}
            result = found.form.emit(first, data).stacked()
            done = session.replace(NAME, Algebraic(), joined, result.node, rw.made)
        except Exception as error:  # torch says in many ways that a shape is impossible
            reason = f"raised {article(type(error).__name__)}: {error}"
    if done:
        session.erase_dead([joined, *reversed(rw.made)])
        return ""
    rw.rollback()
    for one, piece in zip(members, parts, strict=True):
        piece.replace_all_uses_with(one)
    session.erase_dead([*parts, joined])
    return reason


def _join(graph: Graph, members: Sequence[fx.Node]) -> tuple[fx.Node, list[fx.Node]]:
    """Let all readers of some values read them from their stack; gives it, and its parts."""
    builder = Builder(graph, members[-1].next)
    joined = builder.emit(ops.Stack(tuple(map(builder.value, members)), 0))
    _take_place(joined.node, members[0])
    parts = []
    for place, node in enumerate(members):
        readers = [one for one in node.users if one is not joined.node]
        piece = builder.emit(ops.Select(joined, 0, place)).node
        for reader in readers:
            reader.replace_input_with(node, piece)
        _take_place(piece, node)
        parts.append(piece)
    return joined.node, parts


def _take_place(node: fx.Node, of: fx.Node) -> None:
    for key in ("where", "made_by"):
        if key in of.meta:
            node.meta[key] = of.meta[key]


# -- outputs --------------------------------------------------------------------------------------


def _outputs_apart(graph: Graph, classes: Sequence[Siblings]) -> list[fx.Node]:
    """Give outputs that show what siblings compute memory of their own, as they have now; gives the
    copies."""
    members = {one for found in classes for one in found.members}
    builder = Builder(graph, graph.output)
    copies = []
    for node in list(graph.output.all_input_nodes):
        if members.intersection(_shown(node)):
            copy = builder.emit(ops.Copy(builder.value(node))).node
            graph.output.replace_input_with(node, copy)
            _take_place(copy, node)
            copies.append(copy)
    return copies


def _shown(node: fx.Node) -> Iterator[fx.Node]:
    """A value, and the values whose memory it may show."""
    yield node
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        schema = getattr(node.target, "_schema", None)
        views = schema is None or any(one.alias_info is not None for one in schema.returns)
        if not views and "dropout" not in schema.name:  # type: ignore[union-attr]
            return
        node = node.args[0]
        yield node


def _drop_if_alone(session: Session, copy: fx.Node) -> None:
    """Take a copy back where no two outputs would show the same memory."""
    source = copy.args[0]
    assert isinstance(source, fx.Node)
    if not shared_memory(copy, source):
        copy.replace_all_uses_with(source)
        session.erase_dead([copy])


# -- what it costs --------------------------------------------------------------------------------


def _chains(graph: Graph, classes: Sequence[Siblings]) -> list[list[Siblings]]:
    """Classes with those that read what they compute, in order."""
    home: dict[fx.Node, list[Siblings]] = {}
    builder = Builder(graph, graph.output)
    for found in classes:
        views = [slots(_known(acting(one, builder))) for one in found.members[:1]]
        chain = [found]
        for slot in found.data:
            above = home.get(views[0][slot].node)
            if above is not None and above is not chain:
                above += chain
                for one in chain:
                    home.update(dict.fromkeys(one.members, above))
                chain = above
        home.update(dict.fromkeys(found.members, chain))
    unique = {id(chain): chain for chain in home.values()}
    return list(unique.values())


def _known(op: Op | None) -> Op:
    assert op is not None
    return op


class _Costs:
    """About how long classes take, apart and as one."""

    def __init__(self, session: Session) -> None:
        self.target = session.target or cost.target()
        self.builder = Builder(session.graph, session.graph.output)
        self._stacked: set[tuple[fx.Node, ...]] = set()

    def bring_together(self, classes: Sequence[Siblings]) -> bool:
        """From here on, what some classes read costs nothing more; whether that is new."""
        before = len(self._stacked)
        for found in classes:
            self._stacked.update(tuple(one.node for one in values) for values in self._read(found))
        return len(self._stacked) > before

    def _read(self, found: Siblings) -> list[list[Value]]:
        given = [slots(_known(acting(one, self.builder))) for one in found.members]
        return [[one[slot] for one in given] for slot in found.data]

    def of(self, chain: Sequence[Siblings]) -> tuple[float, float]:
        """The seconds of a chain apart and as one, what brings rows together and takes them apart
        included."""
        inside = {one for found in chain for one in found.members}
        launch, view = self.target.launch, cost.VIEW * self.target.launch
        before = after = 0.0
        stacked: set[tuple[fx.Node, ...]] = set()
        readers: dict[fx.Node, int] = defaultdict(int)
        for found in chain:
            views = [_known(acting(one, self.builder)) for one in found.members]
            given = [slots(one) for one in views]
            before += sum(map(self.target.seconds, views))
            after += self._as_one(views[0], given[0], found)
            for values in self._read(found):
                nodes = tuple(one.node for one in values)
                if nodes[0] in inside or nodes in stacked or nodes in self._stacked:
                    continue
                stacked.add(nodes)
                if not found.form.is_free(values):
                    moved = 2 * len(values) * _bytes(values[0]) / self.target.bandwidth
                    after += launch + moved
                if in_order(values) is not None:
                    after += view - len(values) * view  # it need not be taken apart
            for one in found.members:
                readers[one] = sum(user not in inside for user in one.users)
            apart = sum(readers[one] > 0 for one in found.members)
            if apart and not self._joined_again(found.members):
                after += (apart + 1) * view
        return before, after

    def _as_one(self, op: Op, given: dict[Any, Value], found: Siblings) -> float:
        count, target = len(found.members), self.target
        if isinstance(op, cost.VIEWS):
            return target.seconds(op)
        rows = _bytes(op.out) + sum(_bytes(given[slot]) for slot in found.data)
        others = sum(_bytes(one) for slot, one in given.items() if slot not in found.data)
        busy = (count * rows + others) / target.bandwidth
        if op.flops and (what := cost.kind(op)):
            busy = max(busy, count * op.flops / target.rates[what])
        return target.launch + busy

    def _joined_again(self, members: Sequence[fx.Node]) -> bool:
        users = {user for one in members for user in one.users}
        return len(users) == 1 and isinstance(self.builder.view(*users), (ops.Stack, ops.Cat))


def _bytes(value: Value) -> int:
    return numel(value) * value.dtype.itemsize
