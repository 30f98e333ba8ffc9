"""Finds a pointwise computation that was unrolled over steps: the same formula T times, each applied
to what the step before left.

    y_t, v_t = step(x_t, v_{t-1}, w),      t = 0 .. T-1

No neuron is known by name. Nodes are sorted into steps by the inputs they depend on; then the
expression of every step is compared with that of one, node by node. Values that a step hands to the
next are the states; values from outside that belong to one step are its inputs; those that every step
reads alike are invariants. The first step may differ: constants fold into it where the state starts
from a number; it then has a formula of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from graphopt.ir.affine import same_shape
from graphopt.ir.recurrence.alike import difference, flat, literals, same_constant, taking_tensor
from graphopt.ir.recurrence.steps import NotSteps, Steps, components, layers, tensor


@dataclasses.dataclass(frozen=True)
class Formula:
    """A step as an expression graph. `graph` has the placeholders inputs, states, invariants, in this
    order, and returns `roots` values."""

    graph: fx.Graph
    roots: int


@dataclasses.dataclass
class Chain:
    """An unrolled computation of `steps` steps.

    Attributes:
        body: the formula of steps `start` .. `steps` - 1. Inputs: `inputs`, states: `links`.
        start: 0, or 1 where the first step has a formula of its own.
        first: what comes before step `start`: the initial states, over `first_inputs` and the
            invariants; None if there is nothing to compute.
        inputs: for each input of the body, the node of every step from `start`.
        links: for each state of the body, the root of the body that makes it for the next step; None
            where no further step follows that would tell.
        initial: for each state, where it starts: a node, or the number of a root of `first`.
        roots: for each root, the node that every step from `start` has for it; None where a step
            (the last) has none.
        first_roots: the nodes that `first` returns.
        nodes: every node that is computed, with the constants that nothing else reads.
        numbers: for each operand of the body that is a number of its own at every step from `start`, the
            call that has it as its last argument, and the numbers; in the body it is that of one step.
        choices: for what step `start` reads, what the first step may read in its place, if that is known.
    """

    steps: int
    start: int
    body: Formula
    inputs: list[list[fx.Node]]
    invariants: list[fx.Node]
    links: list[int | None]
    initial: list[Any]
    roots: list[list[fx.Node | None]]
    first: Formula | None
    first_inputs: list[fx.Node]
    first_roots: list[fx.Node]
    nodes: list[fx.Node]
    numbers: list[tuple[fx.Node, list[float]]] = dataclasses.field(default_factory=list)
    choices: dict[fx.Node, list[fx.Node]] = dataclasses.field(default_factory=dict)


class Between(NotSteps):
    """An operation that is not pointwise stands between the steps; `told` if they are steps for sure."""

    def __init__(self, node: fx.Node, told: bool) -> None:
        super().__init__(f"{node.name} ({node.target}) between steps is not pointwise")
        self.told = told


def chains(
    graph: fx.Graph, is_pointwise: Callable[[fx.Node], bool], numbers: bool = False
) -> Iterator[Chain | tuple[fx.Node, str]]:
    """Every chain of a graph, and (node, reason) of what looks like one and is none. With `numbers`,
    steps may differ in numbers that a tensor can stand for."""
    for nodes in components(graph, is_pointwise):
        yield from _chains(nodes, numbers)


def _chains(nodes: Sequence[fx.Node], numbers: bool) -> Iterator[Chain | tuple[fx.Node, str]]:
    try:
        if (found := chain(nodes, numbers)) is not None:
            yield found
    except Between as reason:
        parts = layers(nodes)
        inner = [one for part in parts for one in _chains(part, numbers)] if len(parts) > 1 else []
        if any(isinstance(one, Chain) for one in inner) or not reason.told:
            yield from inner
        else:
            yield nodes[0], str(reason)
    except NotSteps as reason:
        yield nodes[0], str(reason)


def chain(nodes: Sequence[fx.Node], numbers: bool = False) -> Chain | None:
    """The steps of a component; None if nothing in it looks like steps.

    Raises:
        NotSteps: if it has steps that are not alike, naming the operation.
    """
    steps = Steps(nodes)
    if steps.count < 2 or _is_sum(steps):
        return None
    before = {one for one in steps.body if steps.level[one] < 0}
    if any(steps.is_outside(user) for one in before for user in one.users):
        return chain(
            [one for one in nodes if one not in before], numbers
        )  # read elsewhere: an initial state
    if (between := steps.between()) is not None:
        raise Between(between, steps.told)
    return _Comparison(steps, numbers).chain()


def _is_sum(steps: Steps) -> bool:
    """Whether this is the sum of some values, and nothing else."""
    read = [one for one in steps.body if any(map(steps.is_outside, one.users))]
    plain = all(one.target is torch.ops.aten.add.Tensor and not one.kwargs for one in steps.body)
    return plain and len(read) <= 1


class _Comparison:
    """The steps of a component, compared with one of them."""

    def __init__(self, steps: Steps, numbers: bool) -> None:
        self.steps, self.numbers = steps, numbers

    def chain(self) -> Chain | None:
        at: list[list[fx.Node]] = [[] for _ in range(self.steps.count)]
        for node in self.steps.body:
            if (level := self.steps.level[node]) < 0:
                continue
            for user in node.users:
                if user in self.steps.inside and self.steps.level[user] > level + 1:
                    raise NotSteps(f"{user.name} reads {node.name} of more than one step before")
            if any(
                self.steps.level[user] != level
                if user in self.steps.inside
                else self.steps.is_outside(user)
                for user in node.users
            ):
                at[level].append(node)
        if not at[0]:  # a sum of values that nothing is done to
            return None
        if missing := [step for step, roots in enumerate(at) if not roots]:
            raise NotSteps(f"step {missing[0]} computes nothing that is read later")
        model = 1
        pairs = [
            _Pairing(self.steps, model, step, self.numbers) for step in range(self.steps.count)
        ]
        pairs[model].match(at[model], at[model])
        start = 0
        try:
            pairs[0].match(at[model], at[0])
        except NotSteps:
            start = 1
        for step in range(model + 1, self.steps.count):
            pairs[step].match(at[model], at[step], _handed(*pairs[start:step][-2:]))
        at[model] += dict.fromkeys(one for pair in pairs for one in pair.more)
        states = pairs[model].states
        if any(state not in pairs[0].states for state in states):
            start = 1
        links = self._links(pairs, at[model], states, start)
        inputs = pairs[model].inputs
        roots = [[pair.images.get(root) for pair in pairs[start:]] for root in at[model]]
        invariants = self._invariants(model)
        body, twins = self._formula({model}, at[model], inputs, states, invariants)
        initial: list[Any] = [pairs[0].states.get(state) for state in states]
        if start:
            initial = [pairs[model].states[state] for state in states]
        first_roots = at[0] if start else [one for one in initial if one in self.steps.inside]
        before = {-1, 0} if start else {-1}
        initial = [first_roots.index(one) if one in first_roots else one for one in initial]
        if alien := [one for one in initial if one in self.steps.inside]:
            raise NotSteps(f"{alien[0].name} is not of the first step")
        first, first_inputs = None, []
        if first_roots:
            reads = self._read(before)
            first_inputs = [
                one for one in (*self.steps.leaves, *self.steps.nodes)
                if one in reads and one not in invariants
                and (one not in self.steps.inside or one in self.steps.invariant)
            ]  # fmt: skip
            first, _ = self._formula(before, first_roots, first_inputs, (), invariants)
        numbers = dict.fromkeys(one for pair in pairs[start:] for one in pair.own)
        return Chain(
            self.steps.count, start, body,
            [_filled([pair.inputs.get(one) for pair in pairs[start:]]) for one in inputs], invariants, links,
            initial, roots, first, first_inputs, first_roots,
            [*self.steps.body, *(one for one in self.steps.constants if not self.steps.is_outside(one))],
            [(twins[one], [pair.number(one) for pair in pairs[start:]]) for one in numbers],
        )  # fmt: skip

    def _links(
        self, pairs: list[_Pairing], roots: list[fx.Node], states: Iterable[fx.Node], start: int
    ) -> list[int | None]:
        links: list[int | None] = []
        for state in states:
            made: set[int | None] = set()
            for step in range(start + 1, self.steps.count):
                held = pairs[step].states.get(state)
                if held is None and step == self.steps.count - 1:
                    continue  # the last step may need less
                backwards: dict[Any, Any] = {
                    image: root for root, image in pairs[step - 1].images.items()
                }
                root = backwards.get(held)
                made.add(None if root is None else roots.index(root))
            if len(made) > 1 or made == {None}:
                raise NotSteps(f"steps hand different values on as {state.name}")
            links.append(made.pop() if made else None)
        return links

    def _read(self, levels: set[int]) -> set[fx.Node]:
        body = (node for node in self.steps.body if self.steps.level[node] in levels)
        return {one for node in body for one in node.all_input_nodes}

    def _invariants(self, level: int) -> list[fx.Node]:
        read = self._read({level})
        return [
            one
            for one in (*self.steps.leaves, *self.steps.nodes)
            if one in read and one in self.steps.invariant
        ]

    def _formula(
        self, levels: set[int], roots: Sequence[fx.Node], inputs: Iterable[fx.Node],
        states: Iterable[fx.Node], invariants: Iterable[fx.Node],
    ) -> tuple[Formula, dict[fx.Node, fx.Node]]:  # fmt: skip
        """The formula, and what of it is what of the graph."""
        graph, twins = fx.Graph(), dict[fx.Node, fx.Node]()
        for letter, group in (("x", inputs), ("v", states), ("w", invariants)):
            for number, node in enumerate(group):
                twins[node] = graph.placeholder(f"{letter}{number}")
                twins[node].meta = dict(node.meta)
        for node in self.steps.body:
            if self.steps.level[node] in levels and node not in twins:
                twins[node] = graph.node_copy(node, twins.__getitem__)
                twins[node].meta = dict(node.meta)
        graph.output(tuple(twins[root] for root in roots))
        graph.eliminate_dead_code()
        return Formula(graph, len(roots)), twins


class _Pairing:
    """The nodes of one step beside those of the step that is the model."""

    def __init__(self, steps: Steps, model: int, step: int, numbers: bool) -> None:
        self.steps, self.model, self.step, self.numbers = steps, model, step, numbers
        self.images: dict[fx.Node, fx.Node] = {}
        self.inputs: dict[fx.Node, fx.Node] = {}
        self.states: dict[fx.Node, fx.Node] = {}
        self.more: list[fx.Node] = []  # of the model, that the last step alone hands out
        self.own: dict[fx.Node, None] = {}  # of the model, with another number as last argument
        self.handed: Mapping[fx.Node, fx.Node] = {}  # what holds states of the model here

    def number(self, node: fx.Node) -> float:
        """The last argument of what is a call of the model here; that of the model where the last step
        does not have it."""
        return self.images.get(node, node).args[-1]  # type: ignore[return-value]

    def match(
        self, model: Sequence[fx.Node], roots: Sequence[fx.Node],
        handed: Mapping[fx.Node, fx.Node] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        """Pair every root of this step with one of the model's, which may have more: what no later
        step needs is not computed. `handed` are the states that the steps before tell; the last step, with
        fewer roots than others, needs them to tell states alike apart.

        Raises:
            NotSteps: naming the first difference.
        """
        free, queue = list(model), list(roots)
        last = self.step == self.steps.count - 1
        self.handed = handed if last else {}
        inner: list[fx.Node] = []
        if last:  # may hand out what is no result of the other steps
            level, body = self.steps.level, self.steps.body
            inner = [one for one in reversed(body) if level[one] == self.model and one not in free]
        for root in queue:
            reason = f"{root.name} ({root.target}) of step {self.step} has no counterpart"
            for candidate in (*free, *inner):
                saved = dict(self.images), dict(self.inputs), dict(self.states), dict(self.own)
                reasons: list[str] = []
                if self._walk(candidate, root, reasons):
                    (free if candidate in free else inner).remove(candidate)
                    if candidate not in model:
                        self.more.append(candidate)
                    break
                self.images, self.inputs, self.states, self.own = saved
                if candidate.target is root.target or reason.endswith("no counterpart"):
                    reason = reasons[0]
            else:
                before = [one for one in root.all_input_nodes if self.steps.owns(one, self.step)]
                if not (last and before):
                    raise NotSteps(f"steps {self.model} and {self.step} differ: {reason}")
                # What follows the last step alone is none of its formula.
                self.steps.drop(root)
                queue += [one for one in before if one not in queue]

    def _walk(self, one: fx.Node, two: fx.Node, reasons: list[str]) -> bool:
        level, steps = self.steps.level, self.steps
        stack = [(one, two)]
        while stack:
            a, b = stack.pop()
            fixed = b in steps.invariant and b not in steps.constants
            if a in steps.invariant or fixed:
                if a is not b and not same_constant(a, b):
                    reasons.append(f"{b.name}, expected {a.name}")
                    return False
                continue
            state = level[a] < self.model
            leaf = a not in steps.inside
            table = self.states if state else self.inputs if leaf else self.images
            if a in table:
                if table[a] is not b:
                    reasons.append(f"{b.name}, expected {table[a].name}")
                    return False
                continue
            if b in table.values():
                reasons.append(f"{b.name} is read twice")
                return False
            table[a] = b
            if not self._alike(a, b, state, leaf):
                reasons.append(difference(a, b))
                return False
            if state or leaf:
                continue
            for left, right in zip(flat(a), flat(b), strict=True):
                if isinstance(left, fx.Node):
                    stack.append((left, right))
        return True

    def _alike(self, a: fx.Node, b: fx.Node, state: bool, leaf: bool) -> bool:
        steps, left, right = self.steps, tensor(a), tensor(b)
        if left.dtype != right.dtype or not same_shape(left.shape, right.shape):
            return False
        if state:  # the first step reads its states from outside
            if self.handed.get(a, b) is not b:
                return False
            held = b not in steps.inside if self.step == 0 else steps.level[b] == self.step - 1
            return held or (self.step == 0 and steps.level[b] < 0)
        if (b not in steps.inside) != leaf:
            return False
        # In the first step, what depends on no input may be computed before it.
        if steps.level[b] != self.step and (self.step, steps.level[b]) != (0, -1):
            return False
        if leaf:
            return True
        if a.target is not b.target:
            return False
        if literals(a) != literals(b):
            if not self.numbers or None in (taking_tensor(a), taking_tensor(b)):
                return False
            self.own[a] = None
        return True


def _handed(before: _Pairing, last: _Pairing | None = None) -> dict[fx.Node, fx.Node]:
    """What two steps in a row hand to the next one, for each state of the model."""
    if last is None:
        return {}
    roots = {image: root for root, image in before.images.items()}
    made = {state: roots[held] for state, held in last.states.items() if held in roots}
    return {state: last.images[root] for state, root in made.items() if root in last.images}


def _filled(inputs: Sequence[fx.Node | None]) -> list[fx.Node]:
    """What every step reads; a step that need not read it, as the last one the decay of a state that
    nothing follows, reads that of its neighbour."""
    held = next(one for one in inputs if one is not None)
    found = []
    for one in inputs:
        held = held if one is None else one
        found.append(held)
    return found
