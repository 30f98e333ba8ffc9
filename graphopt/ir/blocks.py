"""The residual streams of a graph: steps along which a value goes on as it is, and blocks that repeat.

    v = tail(u + branch(u, others))

A step starts at a value u and merges in a sum, one operand of which is u itself (dropout that does not
train and copies aside) while the other depends on u and reads parameters. What follows the sum alone, of
one user and the same shape, up to the start of the next step is its tail (the layer norm of a post-norm
transformer, the ReLU of a ResNet), if other steps of that structure have the same; the norm behind the
last step of a stack is none. A stream is a maximal chain of steps, each of which starts at the end of the
one before, or at that end reshaped. Streams nest: a branch may hold others.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from torch import fx

from graphopt.ir import ops
from graphopt.ir.builder import Builder
from graphopt.ir.dependence import Dependence, is_floating, is_value, same_type
from graphopt.ir.graph import Graph, is_pure, is_random, written
from graphopt.ir.value import Value

Targets = tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One step of a stream. `inside` is all that is computed from `start` for `end`, `end` included,
    in graph order; `reason` is why the step cannot be left out, empty if it can."""

    start: fx.Node
    sum: fx.Node
    end: fx.Node
    inside: tuple[fx.Node, ...]
    parameters: frozenset[str]
    reason: str = ""

    @property
    def structure(self) -> Targets:
        """The ops, without names and sizes."""
        return _targets(self.inside)


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """Some consecutive steps of a stream."""

    steps: tuple[Step, ...]

    @property
    def start(self) -> fx.Node:
        return self.steps[0].start

    @property
    def end(self) -> fx.Node:
        return self.steps[-1].end

    @property
    def parameters(self) -> frozenset[str]:
        return frozenset().union(*(one.parameters for one in self.steps))

    @property
    def reason(self) -> str:
        return next((one.reason for one in self.steps if one.reason), "")


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """A chain of steps."""

    steps: tuple[Step, ...]

    @property
    def period(self) -> int:
        """After how many steps the structure repeats, all along the stream; 1 if it does not."""
        found = [one.structure for one in self.steps]
        for period in range(1, len(found) // 2 + 1):
            if found[period:] == found[:-period]:
                return period
        return 1

    def blocks(self, period: int | None = None) -> list[Block]:
        """The steps, `period` at a time (the stream's own, if none is given)."""
        size = period or self.period
        return [Block(self.steps[i : i + size]) for i in range(0, len(self.steps), size)]


def find_streams(graph: Graph) -> list[Stream]:
    """All streams, in graph order of their first sums. Where the shortcut of a stream is no identity (a
    projection), the step is a stream of its own, with a reason to stay."""
    return _Finder(graph).streams()


@dataclasses.dataclass(frozen=True, eq=False)
class _Sum:
    """A sum both operands of which depend on `start`, one of them by parameters. `straight`: the other
    is `start` itself. `run` is what follows the sum alone, one value after the other."""

    start: fx.Node
    node: fx.Node
    inside: tuple[fx.Node, ...]
    straight: bool
    run: tuple[fx.Node, ...] = ()

    @property
    def fork(self) -> fx.Node:
        return self.run[-1] if self.run else self.node


class _Finder:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.builder = Builder(graph, graph.output)
        self.dependence = Dependence(graph)

    def streams(self) -> list[Stream]:
        sums, merging = self._sums()
        usual = self._usual_tails(sums)
        streams: list[list[Step]] = []
        open_at: dict[fx.Node, list[Step]] = {}
        for one in sums:
            wanted = usual.get(_targets(one.inside), usual.get((), ()))
            tail = one.run[: len(wanted)]
            if _targets(tail) != wanted or not all(same_type(node, one.node) for node in tail):
                tail = ()
            steps = open_at.pop(one.start, [])
            if not (steps and one.straight):
                steps = []
                streams.append(steps)
            steps.append(self._step(one, tail, merging))
            if one.straight and all(map(self._links, one.run[len(tail) :])):
                open_at.setdefault(one.fork, steps)
        return [Stream(tuple(steps)) for steps in streams]

    def _step(self, found: _Sum, tail: Sequence[fx.Node], merging: set[fx.Node]) -> Step:
        end = tail[-1] if tail else found.node
        inside = self.dependence.between(found.start, end)
        step = Step(found.start, found.node, end, inside, self.dependence.parameters(inside))
        projected = "" if found.straight else "its shortcut is not the identity"
        return dataclasses.replace(step, reason=projected or self._reason(step, merging))

    # -- sums -------------------------------------------------------------------------------------

    def _sums(self) -> tuple[list[_Sum], set[fx.Node]]:
        """The sums that steps merge in, and the nodes of those that are straight. Where the shortcut is
        something else, only those count that follow a straight one or lead to one."""
        found = [one for one in map(self._sum, self.graph.calls) if one is not None]
        merging = {one.node for one in found if one.straight}
        found = [dataclasses.replace(one, run=self._run(one, merging)) for one in found]
        straight = [one for one in found if one.straight]
        starts, forks = {one.start for one in straight}, {one.fork for one in straight}
        tails = {node for one in straight for node in one.run}
        return [
            one for one in found
            if one.straight or (
                one.start not in starts and one.node not in tails
                and (one.start in forks or one.fork in starts)
            )
        ], merging  # fmt: skip

    def _sum(self, node: fx.Node) -> _Sum | None:
        op = self.builder.view(node)
        if not isinstance(op, ops.Add) or not is_floating(node):
            return None
        operands = [one.node for one in op.operands if isinstance(one, Value)]
        start = self.dependence.meet(*operands) if len(operands) == 2 else None
        if start is None or len(start.users) < 2:
            return None
        inside = self.dependence.between(start, node)
        if not self.dependence.parameters(inside):
            return None
        return _Sum(start, node, inside, any(self._is_same(one, start) for one in operands))

    def _is_same(self, node: fx.Node, start: fx.Node) -> bool:
        while node is not start:
            op = self.builder.view(node)
            if not (isinstance(op, ops.Copy) or (isinstance(op, ops.Dropout) and not op.train)):
                return False
            node = op.input.node
        return True

    # -- tails ------------------------------------------------------------------------------------

    def _run(self, found: _Sum, merging: set[fx.Node]) -> tuple[fx.Node, ...]:
        """What is computed from a sum, and from nothing else before `start`, up to a value that has
        several users, or to the next straight sum."""
        run = [found.node]
        while len(run[-1].users) == 1:
            user = next(iter(run[-1].users))
            others = (
                one for one in user.all_input_nodes
                if one is not run[-1] and is_value(one) and self.dependence.varies(one)
            )  # fmt: skip
            alone = all(self.dependence.on(one, found.start) for one in others)
            if user in merging or not alone or not is_floating(user):
                break
            run.append(user)
        return tuple(run[1:])

    def _usual_tails(self, sums: Sequence[_Sum]) -> dict[Targets, Targets]:
        """What most steps of a structure have between their sum and the next start, reshapes at its end
        aside; for `()`, most of all steps."""
        starts = {one.start for one in sums}
        votes: dict[Targets, Counter[Targets]] = defaultdict(Counter)
        for one in sums:
            tail = list(one.run)
            while tail and self._links(tail[-1]):
                tail.pop()
            if one.fork in starts and all(same_type(node, one.node) for node in tail):
                for structure in (_targets(one.inside), ()):
                    votes[structure][_targets(tail)] += 1
        return {
            structure: min(found, key=lambda tail: (-found[tail], len(tail)))
            for structure, found in votes.items()
        }

    def _links(self, node: fx.Node) -> bool:
        return isinstance(self.builder.view(node), (ops.Reshape, ops.Copy))

    # -- reasons to stay --------------------------------------------------------------------------

    def _reason(self, step: Step, merging: set[fx.Node]) -> str:
        if not same_type(step.start, step.end):
            return "it changes the shape or the dtype"
        inside = set(step.inside)
        for node in step.inside:
            if not is_pure(node):
                return f"{self._name(node)} {'is random' if is_random(node) else 'writes a state'}"
            outside = [one for one in node.users if one not in inside and node is not step.end]
            if outside:
                return f"{self._name(node)} inside of it is {self._reading(outside[0])}"
        held = len(merging & inside - {step.sum})
        return f"it holds {held} other steps, which go one by one" if held > 1 else ""

    def _reading(self, user: fx.Node) -> str:
        if user.op == "output":
            return "an output"
        return "written to a state" if written(user) else f"read by {self._name(user)}"

    def _name(self, node: fx.Node) -> str:
        where = self.graph.where(node)
        return f"{node.name} ({where})" if where else node.name


def _targets(nodes: Iterable[fx.Node]) -> Targets:
    return tuple(str(node.target) for node in nodes)
