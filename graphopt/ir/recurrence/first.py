"""The first step of a recurrence whose states start as numbers.

Where v_{-1} = 0, the first step of the graph is a formula of its own: v_{-1} decay + x_0 is x_0. It is the
step all the same if

    step(x_0, c, w)  =  first(x_0, w)      for some numbers c,

which is decided on expressions: both sides with their numbers evaluated and x + 0, x * 1, w * 0 (w a
parameter) and the like made simple.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.affine import same_shape
from graphopt.ir.recurrence.chain import Chain, Formula
from graphopt.ir.recurrence.steps import element, tensor

MOST_TRIALS = 128  # assignments of inputs and of numbers to states
_SAME = {"aten::detach", "aten::clone", "aten::alias", "aten::contiguous", "aten::positive"}
_CASTS = {"aten::to", "aten::_to_copy", "aten::type_as"}
_COMMUTE = {"aten::add", "aten::mul", "aten::eq", "aten::ne"}

Expression = Any  # hashable; equal expressions have equal values


@dataclasses.dataclass(frozen=True)
class Number:
    """The same number everywhere."""

    value: float


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A value that is given; `constant` if it is made of parameters alone."""

    node: fx.Node
    constant: bool


def from_the_start(
    chain: Chain, number: Callable[[fx.Node], float | None], is_constant: Callable[[fx.Node], bool]
) -> tuple[Chain, list[float]] | None:
    """The chain with its first step as one of the others, and the number that every state starts from;
    None if nothing shows that it is one. `number` tells what a value is full of.
    """
    if chain.start != 1 or chain.first is None or None in chain.links:
        return None

    def leaf(node: fx.Node) -> Expression:
        value = number(node)
        return Leaf(node, is_constant(node)) if value is None else Number(value)

    own = dict(
        zip(_placeholders(chain.first), (*chain.first_inputs, *chain.invariants), strict=True)
    )
    first = _evaluate(chain.first, {one: leaf(node) for one, node in own.items()})
    after = [first[one] if isinstance(one, int) else leaf(one) for one in chain.initial]
    given_numbers = map(number, (*chain.first_inputs, *chain.invariants))
    known = {one for one in given_numbers if one}
    starts = itertools.product((0.0, *sorted(known)), repeat=len(chain.links))
    options = [_options(chain, nodes[0], number, is_constant) for nodes in chain.inputs]
    trials = ((one, inputs) for one in starts for inputs in _assignments(options))
    for numbers, inputs in itertools.islice(trials, MOST_TRIALS):
        given = [*map(leaf, inputs), *map(Number, numbers), *map(leaf, chain.invariants)]
        found = _evaluate(chain.body, dict(zip(_placeholders(chain.body), given, strict=True)))
        roots = _paired(chain, found, first, after)
        if roots is not None:
            whole = dataclasses.replace(
                chain, start=0, first=None, first_inputs=[], first_roots=[],
                inputs=[[x, *rest] for x, rest in zip(inputs, chain.inputs, strict=True)],
                roots=[[None if root is None else chain.first_roots[root], *rest]
                       for root, rest in zip(roots, chain.roots, strict=True)],
            )  # fmt: skip
            return whole, list(numbers)
    return None


def _options(
    chain: Chain, second: fx.Node, number: Callable[[fx.Node], float | None],
    is_constant: Callable[[fx.Node], bool],
) -> list[fx.Node]:  # fmt: skip
    """What the first step may read where the second one reads `second`: elements of one tensor, if both
    can be; a value of the run for one, a parameter for one. A parameter that the first step does not
    read, as a decay of a state of zero, may be any."""
    if second in chain.choices:
        return [*chain.choices[second], second]
    found = [one for one in chain.first_inputs if _alike(one, second)]
    place = element(second)
    if place is not None:
        of_one = [one for one in found if (held := element(one)) and held[:2] == place[:2]]
        found = of_one or found
    if is_constant(second):
        return [*filter(is_constant, found), second]
    return [one for one in found if not is_constant(one) and number(one) is None]


def _assignments(options: Sequence[Sequence[fx.Node]]) -> Iterator[tuple[fx.Node, ...]]:
    """One of each, no two the same, those that come first in their options first."""
    if not options:
        yield ()
        return
    for one in options[0]:
        rest = [[other for other in some if other is not one] for some in options[1:]]
        for others in _assignments(rest):
            yield (one, *others)


def _alike(one: fx.Node, two: fx.Node) -> bool:
    a, b = tensor(one), tensor(two)
    return a.dtype == b.dtype and same_shape(a.shape, b.shape)


def _paired(
    chain: Chain, body: list[Expression], first: list[Expression], after: list[Expression]
) -> list[int | None] | None:
    """For every root of the body, the first step's root that equals it; None if one has none."""
    for link, held in zip(chain.links, after, strict=True):
        if link is None or body[link] != held:
            return None
    roots: list[int | None] = [None] * len(body)
    for number, held in enumerate(first):
        places = [i for i, one in enumerate(body) if one == held and roots[i] is None]
        states = [
            link for link, one in zip(chain.links, chain.initial, strict=True) if one == number
        ]
        if not places:
            return None
        roots[next((i for i in places if i in states), places[0])] = number
    return roots


def _placeholders(formula: Formula) -> list[fx.Node]:
    return [node for node in formula.graph.nodes if node.op == "placeholder"]


def _evaluate(formula: Formula, given: Mapping[fx.Node, Expression]) -> list[Expression]:
    env = dict(given)
    for node in formula.graph.nodes:
        if node.op == "call_function":
            env[node] = _simple(node, env)
    (returned,) = formula.graph.output_node().args
    return [env[one] for one in returned]  # type: ignore


def _simple(node: fx.Node, env: Mapping[fx.Node, Expression]) -> Expression:
    schema = node.target._schema  # type: ignore[union-attr]
    name, args = schema.name, [_argument(one, env) for one in node.args]
    kwargs = tuple(sorted((key, _argument(one, env)) for key, one in node.kwargs.items()))
    operands = [args[i] for i, one in enumerate(node.args) if isinstance(one, fx.Node)]
    if operands and all(isinstance(one, Number) for one in operands):
        return _computed(node, env)
    if name in _SAME or (name in _CASTS and _dtype(node.args[0]) == _dtype(node)):
        return args[0]
    if not kwargs and len(args) == 2:
        left, right = args
        if name == "aten::rsub":
            name, left, right = "aten::sub", right, left
        if name in ("aten::add", "aten::sub") and right == Number(0.0):
            return left
        if name == "aten::add" and left == Number(0.0):
            return right
        if name in ("aten::mul", "aten::div") and right == Number(1.0):
            return left
        if name == "aten::mul" and left == Number(1.0):
            return right
        if name == "aten::mul" and Number(0.0) in (left, right):
            other = right if left == Number(0.0) else left
            if isinstance(other, Leaf) and other.constant:
                return Number(0.0)
        args = [left, right]
        if name in _COMMUTE:
            args.sort(key=repr)
    if name == "aten::where" and isinstance(args[0], Number):
        return args[1 if args[0].value else 2]
    return (name, _dtype(node), *args, kwargs)


def _dtype(node: Any) -> torch.dtype:
    return tensor(node).dtype


def _argument(value: Any, env: Mapping[fx.Node, Expression]) -> Expression:
    if isinstance(value, fx.Node):
        return env[value]
    if isinstance(value, (int, float)):
        return Number(float(value))
    if isinstance(value, (list, tuple)):
        return tuple(_argument(one, env) for one in value)
    return value


def _computed(node: fx.Node, env: Mapping[fx.Node, Expression]) -> Number:
    """An operation on numbers, in the dtypes that its operands have, floating ones in float64."""

    def full(one: fx.Node) -> Tensor:
        dtype = _dtype(one)
        wide = torch.float64 if dtype.is_floating_point else dtype
        return torch.tensor(env[one].value).to(wide)

    def lifted(one: Any) -> Any:
        floating = isinstance(one, torch.dtype) and one.is_floating_point
        return torch.float64 if floating else one

    args, kwargs = fx.map_arg((node.args, node.kwargs), full)
    kwargs = {key: lifted(one) for key, one in kwargs.items()}
    return Number(float(node.target(*map(lifted, args), **kwargs)))  # type: ignore[operator]
