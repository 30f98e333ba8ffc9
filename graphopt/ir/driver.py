"""The driver: applies rewrites over a worklist and is the only one that edits a graph.

Cost is linear in the graph: nodes are indexed by op, a committed match re-queues its surroundings
only, and sweeps repeat until one of them changes nothing.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import fx

from graphopt.ir.contracts import Contract
from graphopt.ir.cost import Target
from graphopt.ir.graph import Graph, is_pure
from graphopt.ir.ops import base
from graphopt.ir.provenance import inherit, origins, unread
from graphopt.ir.rewrite import Declined, Rewrite, RewriteError, Rewriter, article
from graphopt.ir.value import Value

MAX_SWEEPS = 20


class DidNotConverge(RuntimeError):
    """Rewrites keep undoing each other."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One thing that happened (or did not) at one place.

    `error` and `bound` are absolute, at the element where their ratio is largest, in float64;
    nan where nothing was measured. `index` numbers the applications of one optimization in the
    order of their commits; it is -1 for what was not applied. `stage` is the pass. `origins` are
    the paths in the source model of all that it concerns: of the ops and states that nobody reads
    after it, or, if it was refused, of the ops that the rewrite looked at.
    """

    rewrite: str
    where: str
    contract: str
    reason: str = ""
    error: float = math.nan
    bound: float = math.nan
    node: str = ""
    index: int = -1
    stage: str = ""
    origins: tuple[str, ...] = ()


@dataclasses.dataclass
class Applications:
    """Numbers the applications of one optimization, over all its sessions, and grants `limit` of
    them at most."""

    limit: float = math.inf
    count: int = 0

    @property
    def exhausted(self) -> bool:
        return self.count >= self.limit


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the check of one site found."""

    ok: bool
    error: float = math.nan
    bound: float = math.nan
    reason: str = ""

    @property
    def badness(self) -> float:
        """Orders verdicts: what failed above all, then by the share of the bound that was used."""
        if not self.ok:
            return math.inf
        return self.error / self.bound if self.bound > 0 else 0.0


# What is replaced, and by what.
Pair = tuple[fx.Node, fx.Node]


class Validator(Protocol):
    """Checks a site before it is committed. `graphopt.verify` has the real one."""

    def check(self, pairs: Sequence[Pair], contract: Contract) -> Verdict: ...

    def forget(self, nodes: Iterable[fx.Node]) -> None: ...

    def check_masked(self, groups: Any, gone: Collection[int], result: Graph) -> Verdict: ...

    def restart(self) -> None: ...


class Session:
    """One run of passes over one graph: commits replacements and keeps the records."""

    def __init__(
        self, graph: Graph, validator: Validator | None = None,
        applications: Applications | None = None, target: Target | None = None,
    ) -> None:  # fmt: skip
        self.target = target
        self.graph = graph
        self.validator = validator
        self.applications = applications or Applications()
        self.applied: list[Record] = []
        self.rolled_back: list[Record] = []
        self.refused: dict[tuple[str, fx.Node], Record] = {}
        self.validation_seconds = 0.0
        self.pass_name = ""
        self.source: Graph | None = None  # what the result is to equal, if not what was captured
        self.examples: Sequence[Any] = ()  # inputs that the model was captured with, all rows
        self.drawn = False  # whether some of these are normal draws, for blank ones
        self.pass_of: dict[str, str] = {}  # of rewrites that run together with other passes'
        self._hopeless: set[tuple[str, fx.Node]] = set()

    # -- one replacement ----------------------------------------------------------------------

    def replace(
        self, rewrite: str, contract: Contract, old: fx.Node, new: fx.Node,
        made: Sequence[fx.Node] = (), others: Sequence[Pair] = (),
    ) -> bool:  # fmt: skip
        """Check that `new` may stand for `old`, and so for `others`; if so, commit all. Returns
        whether it did.

        Once the limit of applications is reached, nothing is committed or recorded any more.
        """
        if (rewrite, old) in self._hopeless or self.applications.exhausted:
            return False
        where, stage = self.graph.where(old), self.pass_of.get(rewrite, self.pass_name)
        pairs = [(old, new), *others]
        gone = unread(pairs, made)
        mistyped = _first(_type_difference(*pair) for pair in pairs)
        if not mistyped and (sharing := _first(shared_memory(*pair) for pair in pairs)):
            self._hopeless.add((rewrite, old))
            self.refused[rewrite, old] = Record(
                rewrite, where, str(contract), sharing, node=old.name,
                origins=origins(self.graph, gone),
            )  # fmt: skip
            return False
        verdict = Verdict(False, reason=mistyped) if mistyped else self._validate(pairs, contract)
        record = Record(
            rewrite, where, str(contract), verdict.reason, verdict.error, verdict.bound, old.name,
            self.applications.count if verdict.ok else -1, stage, origins(self.graph, gone),
        )  # fmt: skip
        if not verdict.ok:
            self._hopeless.add((rewrite, old))
            self.rolled_back.append(record)
            return False
        for node in made:
            node.meta["made_by"] = (stage or rewrite, rewrite, record.index)
        for one, other in pairs:
            one.replace_all_uses_with(other)
        inherit(self.graph, pairs, made, gone)
        self.applied.append(record)
        self.applications.count += 1
        return True

    def become(
        self, rewrite: str, contract: Contract, result: Graph,
        check: Callable[[Validator], Verdict], note: str = "",
    ) -> bool:  # fmt: skip
        """Check that `result` is what `contract` promises; if so, the graph becomes it, and is from
        here on what the end result is to equal. Returns whether it did. `note` is the reason that the
        record has then."""
        if self.applications.exhausted:
            return False
        start = time.perf_counter()
        verdict = Verdict(True) if self.validator is None else check(self.validator)
        self.validation_seconds += time.perf_counter() - start
        record = Record(
            rewrite, "", str(contract), verdict.reason or note, verdict.error, verdict.bound,
            index=self.applications.count if verdict.ok else -1, stage=self.pass_name,
        )  # fmt: skip
        if not verdict.ok:
            self.rolled_back.append(record)
            return False
        self.graph.become(result)
        self.source = self.graph.clone()
        if self.validator is not None:
            self.validator.restart()
        self.applied.append(record)
        self.applications.count += 1
        return True

    def _validate(self, pairs: Sequence[Pair], contract: Contract) -> Verdict:
        if self.validator is None:
            return Verdict(True)
        start = time.perf_counter()
        try:
            return self.validator.check(pairs, contract)
        finally:
            self.validation_seconds += time.perf_counter() - start

    def erase_dead(self, roots: Iterable[fx.Node]) -> list[fx.Node]:
        """Erase those of `roots` that nobody reads, and what only they read. Returns the values
        they read that remain."""
        stack, remaining, erased = list(roots), {}, []
        while stack:
            node = stack.pop()
            if node._erased or node.users or node.op != "call_function" or not is_pure(node):
                continue
            inputs = node.all_input_nodes
            erased.append(node)
            self.graph.fx.erase_node(node)
            remaining.update(dict.fromkeys(inputs))
            stack += inputs
        if self.validator is not None:
            self.validator.forget(erased)
        for node in erased:
            remaining.pop(node, None)
        return list(remaining)

    # -- many rewrites ------------------------------------------------------------------------

    def run(self, rewrites: Sequence[Rewrite], last_first: bool = False) -> int:
        """Apply rewrites until none fires, to the ops in graph order or from the last one on; returns
        how many matches were committed.

        Raises:
            DidNotConverge: if they are still firing after a generous number of matches.
        """
        start = len(self.applied)
        budget = 10 * len(self.graph.fx.nodes) + 1000
        for _ in range(MAX_SWEEPS):
            before = len(self.applied)
            self._sweep(rewrites, start + budget, last_first)
            if len(self.applied) == before:
                return before - start
        names = sorted({record.rewrite for record in self.applied[before:]})
        raise DidNotConverge(f"still firing after {MAX_SWEEPS} sweeps: {', '.join(names)}")

    def _sweep(self, rewrites: Sequence[Rewrite], limit: int, last_first: bool) -> None:
        nodes = self.graph.fx.nodes
        queue = deque(
            node for node in (reversed(nodes) if last_first else nodes)
            if node.op == "call_function"
        )  # fmt: skip
        queued = set(queue)

        @cache
        def candidates(target: Any) -> list[Rewrite]:
            return [one for one in rewrites if base.may_be(target, one.roots)]

        while queue:
            node = queue.popleft()
            queued.discard(node)
            if node._erased:
                continue
            for one in candidates(node.target):
                again = self._attempt(one, node)
                if again is None:
                    continue
                if len(self.applied) > limit:
                    raise DidNotConverge(
                        f"{one.name} fired at {self.applied[-1].where or node.name} after "
                        f"{limit} matches; does it undo another rewrite?"
                    )
                for other in again:
                    if other not in queued and not other._erased:
                        queued.add(other)
                        queue.append(other)
                break

    def _attempt(self, rewrite: Rewrite, node: fx.Node) -> list[fx.Node] | None:
        """Try one rewrite at one node. None if it did not fire, else the nodes to look at again."""
        if (rewrite.name, node) in self._hopeless:
            return None
        rw = Rewriter(self.graph, node, self.target)
        op = rw.view(node)
        if op is None or not isinstance(op, rewrite.roots):
            return None
        key = (rewrite.name, node)
        try:
            result = rewrite(op, rw)
            if not isinstance(result, Value) or result.node is node:
                raise RewriteError(
                    f"rewrite {rewrite.name} returned {result!r}; expected another value "
                    "(decline with rw.require)"
                )
        except Declined as declined:
            rw.rollback()
            if declined.near or rewrite.explain:
                where = declined.where or self.graph.where(node)
                self.refused[key] = Record(
                    rewrite.name, where, str(rewrite.contract), declined.reason, node=node.name,
                    origins=origins(self.graph, rw.seen),
                )  # fmt: skip
            return None
        except Exception as error:
            rw.rollback()
            self._hopeless.add(key)
            self.rolled_back.append(
                Record(
                    rewrite.name, self.graph.where(node), str(rewrite.contract),
                    f"raised {article(type(error).__name__)}: {error}", node=node.name,
                    origins=origins(self.graph, rw.seen),
                )
            )  # fmt: skip
            return None
        self.refused.pop(key, None)
        others = [(old.node, new.node) for old, new in rw.others]
        if not self.replace(rewrite.name, rewrite.contract, node, result.node, rw.made, others):
            rw.rollback()
            return None
        made = list(rw.made)
        remaining = self.erase_dead([node, *(old for old, _ in others), *reversed(made)])
        again = [one for one in (*made, result.node, *result.node.users) if not one._erased]
        for value in remaining:
            again += value.users
        return [one for one in again if one.op == "call_function"]

    def remaining_refusals(self) -> list[Record]:
        """Refusals whose root is still in the graph."""
        return [record for (_, node), record in self.refused.items() if not node._erased]


def _first(reasons: Iterable[str]) -> str:
    return next(filter(None, reasons), "")


def shared_memory(old: fx.Node, new: fx.Node) -> str:
    """Whether a returned value would come to share memory with an input, a state or another
    output, which the caller may write to; empty if not."""
    showing = _shown(old)
    if not showing:
        return ""
    if len(showing) > 1 and _strides(old) != _strides(new):
        return "two outputs could share memory in the other layout"
    base = _base(new)
    if base is _base(old):
        return ""
    if base.op != "call_function":
        return (
            f"the output would share memory with {base.op.replace('get_attr', 'state')} {base.name}"
        )
    if _shown(base):
        return "two outputs would share memory"
    return ""


def _shown(node: fx.Node) -> set[fx.Node]:
    """The outputs that may show the memory of a node."""
    stack, seen, found = [node], {node}, set()
    while stack:
        one = stack.pop()
        for user in one.users:
            if user.op == "output":
                found.add(one)
            elif user not in seen and _base(user) is _base(node):
                seen.add(user)
                stack.append(user)
    return found


def _strides(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return tuple(map(str, value.stride())) if isinstance(value, torch.Tensor) else None


_PASSING = {"aten::dropout", "aten::feature_dropout", "aten::alpha_dropout",
            "aten::feature_alpha_dropout"}  # fmt: skip


def _base(node: fx.Node) -> fx.Node:
    """The node whose memory a view shows."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        schema = getattr(node.target, "_schema", None)
        view = schema is not None and (
            any(one.alias_info is not None for one in schema.returns)
            or (schema.name in _PASSING and node.args[2] is False)  # returns its very argument
        )
        if not (view or node.target is operator.getitem) or _dtype(node) != _dtype(node.args[0]):
            break
        node = node.args[0]
    return node


def _dtype(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return getattr(value[0] if isinstance(value, (list, tuple)) and value else value, "dtype", None)


def _type_difference(old: fx.Node, new: fx.Node) -> str:
    """Why `new` cannot stand for `old` by type; empty if it can."""
    before, after = old.meta.get("val"), new.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return ""
    same = (
        before.dtype == after.dtype
        and before.device == after.device
        and len(before.shape) == len(after.shape)
        and all(_same_size(a, b) for a, b in zip(before.shape, after.shape, strict=True))
    )
    if same:
        return ""
    return f"changes {before.dtype} {list(before.shape)} into {after.dtype} {list(after.shape)}"


def _same_size(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    left = a.node.expr if isinstance(a, torch.SymInt) else a
    right = b.node.expr if isinstance(b, torch.SymInt) else b
    return bool(left == right) or bool((left - right).simplify() == 0)
