"""Unrolled loops over time become scans.

    s_0, v_0 = step(x_0, v); s_1, v_1 = step(x_1, v_0); ...  ->  s, v_last = scan(step, x, v)

What a step is, is found in the graph (`graphopt.ir.recurrence`): any pointwise formula, with any number of
states; spiking neurons are the case in mind, and none is known by name. What goes in is stacked over time
unless it is elements of one tensor already; what comes out is, and where a stack of all steps was read, it
takes its place. A first step that differs because its states are numbers is shown to be the step for them,
or else stays outside.

Refused, naming the operation: steps that differ, an operation between steps that is not pointwise (a
recurrent connection), and what reads more than one step back.

The operations stay the same and keep their order, so that nothing is rounded differently: all steps of a
value are checked at once in float64, and must be equal but for the sign of a zero.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.ir import ops
from graphopt.ir.builder import Builder
from graphopt.ir.contracts import Algebraic, Contract
from graphopt.ir.driver import Pair, Record, Session, Validator, Verdict
from graphopt.ir.graph import Graph, is_overload, is_pure
from graphopt.ir.interpret import Evaluator
from graphopt.ir.provenance import origins
from graphopt.ir.recurrence.body import BodyError
from graphopt.ir.recurrence.chain import Chain, chains
from graphopt.ir.recurrence.first import from_the_start
from graphopt.ir.recurrence.operator import SCAN
from graphopt.ir.recurrence.own import Own, own_norms, written_out
from graphopt.ir.recurrence.rolled import Rolled
from graphopt.ir.recurrence.steps import NotSteps, filled
from graphopt.passes.base import Pass

NAME = "roll-steps"
OPENED = "norm-of-a-step"  # what opening one is called in a report
CONTRACT = Algebraic()
_POINTWISE = (
    ops.Binary,
    ops.Unary,
    ops.Pow,
    ops.Compare,
    ops.Where,
    ops.Cast,
    ops.Copy,
    ops.Detach,
)
LARGEST_NUMBER = 1 << 20  # elements of a parameter that is looked through for being one number


def is_pointwise(graph: Graph, node: fx.Node) -> bool:
    """Whether a node can be part of a step: it computes each element from those at its place (and from
    parameters), and is no parameter itself."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.Tensor) or not is_pure(node):
        return False
    if not is_overload(node.target) or graph.is_constant(node) or filled(node) is not None:
        return False
    if torch.Tag.pointwise in node.target.tags:  # type: ignore[union-attr]
        return True
    op = Builder(graph, node).view(node)
    if isinstance(op, ops.BatchNorm):
        return not op.uses_batch_statistics
    return isinstance(op, _POINTWISE)


@dataclasses.dataclass(frozen=True)
class RollSteps(Pass):
    """Unrolled recurrences over time, such as spiking neurons, become one scan each."""

    name = NAME

    def run(self, session: Session) -> None:
        graph = session.graph
        numbers = _Numbers(graph)
        rolled = True
        while rolled:  # steps of one loop may be told by those of another
            session.refused = {
                key: one for key, one in session.refused.items() if key[0] != self.name
            }
            rolled = _roll_all(session, numbers)


def _roll_all(session: Session, numbers: _Numbers) -> bool:
    """Roll every chain there is now; whether there was one."""
    graph = session.graph
    for node in graph.nodes:
        graph.is_constant(node)  # known from here on by what reads `meta`
    found = list(chains(graph.fx, lambda node: is_pointwise(graph, node), numbers=True))
    order = {node: i for i, node in enumerate(graph.fx.nodes)}
    found.sort(key=lambda one: order[one.nodes[0] if isinstance(one, Chain) else one[0]])
    replaced: dict[fx.Node, fx.Node] = {}
    if any([_open_norms(session, one) for one in found if isinstance(one, Chain)]):
        return True  # look again
    for one in found:
        if isinstance(one, Chain):
            replaced |= roll(session, _renamed(one, replaced), numbers)
        else:
            _refuse(session, *one)
    return bool(replaced)


def _open_norms(session: Session, chain: Chain) -> bool:
    """Norms with parameters of their own at every step become the scales and shifts that they are, which
    the steps of a loop read one by one; whether there are such."""
    norms = own_norms(session.graph, chain) if chain.steps > 2 else []
    done = False
    for norm in norms:
        builder, old = norm.out.builder, norm.out.node
        new = written_out(norm)
        for node in builder.made:
            node.meta["where"] = session.graph.where(old)
        if session.replace(OPENED, CONTRACT, old, new.node, builder.made):
            session.erase_dead([old])
            done = True
        else:
            builder.rollback()
    return done


def _renamed(chain: Chain, names: Mapping[fx.Node, fx.Node]) -> Chain:
    """A chain whose operands are what took their place."""

    def now(one: Any) -> Any:
        return names.get(one, one)

    return dataclasses.replace(
        chain,
        inputs=[list(map(now, one)) for one in chain.inputs],
        invariants=list(map(now, chain.invariants)),
        initial=list(map(now, chain.initial)),
        first_inputs=list(map(now, chain.first_inputs)),
    )


def _refuse(session: Session, node: fx.Node, reason: str, nodes: Iterable[fx.Node] = ()) -> None:
    graph = session.graph
    session.refused[NAME, node] = Record(
        NAME, graph.where(node), str(CONTRACT), reason, node=node.name,
        origins=origins(graph, list(nodes) or [node]),
    )  # fmt: skip


def roll(session: Session, chain: Chain, numbers: _Numbers) -> dict[fx.Node, fx.Node]:
    """Put a scan in the place of a chain; or record why not. What took the place of what."""
    graph, name = session.graph, chain.nodes[0]
    own = Own(graph, chain)
    own.tell_numbers()
    starts: list[float | None] = [None] * len(chain.links)
    ways = [starts]
    if (whole := from_the_start(chain, numbers.of, graph.is_constant)) is not None:
        own.chain, known = whole
        ways = [list(known)]
    elif not chain.start:
        held = [numbers.of(one) for one in _initial(chain)]
        ways = [starts] if None in held else [held, starts]
    own.enter()
    reason = ""
    for starts in ways:
        site = Rolled(graph, own.chain, starts)
        try:
            site.emit()
            break
        except (NotSteps, BodyError) as error:
            site.rollback()
            reason = str(error)
    else:
        own.rollback()
        _refuse(session, name, reason, chain.nodes)
        return {}
    verdict = _check(session, site)
    inner = session.validator
    session.validator = None if inner is None else _Checked(inner, verdict)
    (old, new), *others = site.pairs
    made = [*own.made, *site.builder.made]
    try:
        done = session.replace(NAME, CONTRACT, old, new, made, others)
    finally:
        session.validator = inner
    if done:
        refused = _refused_inside(session, chain.nodes)
        session.erase_dead(
            [*reversed(made), old, *(one for one, _ in others), *chain.nodes, *_initial(chain)]
        )
        _keep(session, refused, [one for one in made if not one._erased])
        return dict(site.pairs)
    site.rollback()
    own.rollback()
    return {}


def _initial(chain: Chain) -> list[fx.Node]:
    """Where the states start from."""
    return [chain.first_roots[one] if isinstance(one, int) else one for one in chain.initial]


def _refused_inside(session: Session, nodes: Iterable[fx.Node]) -> list[Record]:
    """What was refused about the operations of a loop, once for all steps of which it was the same."""
    inside, found = set(nodes), dict[tuple[str, str], Record]()
    for (name, node), record in session.refused.items():
        if node in inside and name != NAME:
            found.setdefault((record.rewrite, record.reason), record)
    return list(found.values())


def _keep(session: Session, refused: Iterable[Record], nodes: Sequence[fx.Node]) -> None:
    """What was refused about operations that are in a scan now is refused about the scan."""
    (scan,) = (one for one in nodes if one.target is SCAN)
    for record in refused:
        free = (one for one in (scan, *nodes) if (record.rewrite, one) not in session.refused)
        if (node := next(free, None)) is not None:
            session.refused[record.rewrite, node] = dataclasses.replace(record, node=scan.name)


class _Numbers:
    """The number that a tensor is full of, told by the graph or by the parameters."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self._evaluator = graph, Evaluator(graph)
        self._known: dict[fx.Node, float | None] = {}

    def of(self, node: fx.Node) -> float | None:
        if node not in self._known:
            self._known[node] = self._find(node)
        return self._known[node]

    def _find(self, node: fx.Node) -> float | None:
        if (value := filled(node)) is not None:
            return float(value)
        fake = node.meta["val"]
        if is_pointwise(self.graph, node) and (value := self._computed(node)) is not None:
            return value
        if not self.graph.is_constant(node) or not 0 < fake.numel() <= LARGEST_NUMBER:
            return None
        held = self._evaluator.evaluate(node).flatten()
        return float(held[0]) if not held.is_complex() and bool((held == held[0]).all()) else None

    def _computed(self, node: fx.Node) -> float | None:
        """What is computed of numbers alone, all in floating dtypes of one width."""
        found = {one: self.of(one) for one in node.all_input_nodes}
        dtype = node.meta["val"].dtype
        if None in found.values() or any(one.meta["val"].dtype != dtype for one in found):
            return None
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda one: torch.tensor(found[one], dtype=dtype)
        )
        return float(node.target(*args, **kwargs))  # type: ignore[operator]


def _check(session: Session, site: Rolled) -> Verdict:
    """All steps of every output at once, the sign of zeros left aside."""
    if session.validator is None:
        return Verdict(True)
    start = time.perf_counter()
    worst = Verdict(True, 0.0, 0.0)
    for held, new in site.values:
        builder = Builder(session.graph, session.graph.output)
        old, two = list(map(builder.value, held.values())), builder.value(new)
        one = old[0]
        if -1 not in held:
            one = builder.emit(ops.Stack(tuple(old)))
            if len(held) < site.steps:
                two = builder.emit(ops.Slice(two, 0, min(held), max(held) + 1))
        if one.dtype.is_floating_point:
            one, two = one + 0.0, two + 0.0
        verdict = session.validator.check([(one.node, two.node)], CONTRACT)
        session.validator.forget(builder.made)
        builder.rollback()
        if not verdict.ok:
            worst = verdict
    session.validation_seconds += time.perf_counter() - start
    return worst


class _Checked:
    """A validator that has checked a site already, as a whole."""

    def __init__(self, inner: Validator, verdict: Verdict) -> None:
        self.inner, self.verdict = inner, verdict

    def check(self, pairs: Sequence[Pair], contract: Contract) -> Verdict:
        return self.verdict

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
