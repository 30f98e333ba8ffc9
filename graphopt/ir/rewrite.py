"""Rewrites: a typed function from one op to the value that replaces it.

    @rewrite
    def drop_double_negation(outer: ops.Neg, rw: Rewriter) -> Value:
        \"\"\"-(-x) = x.\"\"\"
        inner = rw.producer(outer.input, ops.Neg)
        return inner.input

The function reads op views, says no with `rw.require`, emits new ops, and returns the replacement.
It never changes an existing node: the driver commits the replacement, or erases what was emitted.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeVar, overload

from torch import fx

from graphopt.ir import coded, cost, storage
from graphopt.ir.builder import Builder
from graphopt.ir.contracts import Algebraic, Contract
from graphopt.ir.cost import Target
from graphopt.ir.graph import Graph
from graphopt.ir.ops.base import Op
from graphopt.ir.value import Value

OpType = TypeVar("OpType", bound=Op)


class RewriteError(TypeError):
    """A rewrite function is not written as a rewrite must be."""


class Declined(Exception):
    """Raised by `Rewriter` to leave a rewrite function; `near` if the user should hear of it."""

    def __init__(self, reason: str, near: bool, where: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.near = near
        self.where = where


class Rewriter(Builder):
    """What a rewrite function sees of the graph around its root."""

    def __init__(self, graph: Graph, root: fx.Node, target: Target | None = None) -> None:
        super().__init__(graph, root)
        self.root = root
        self.target = target or cost.target()
        self.others: list[tuple[Value, Value]] = []
        self._subject: Value | None = None

    # -- saying no ----------------------------------------------------------------------------

    def require(self, condition: object, reason: str) -> None:
        """Decline unless `condition` holds. The reason reaches the user as "why not here"."""
        if not condition:
            self.decline(reason)

    def decline(self, reason: str, near: bool = True) -> NoReturn:
        raise Declined(reason, near, self._subject.where if self._subject is not None else None)

    def match(self, condition: object) -> None:
        """Decline silently: this place does not look like the pattern at all."""
        if not condition:
            self.decline("the pattern does not occur here", near=False)

    def about(self, op: Op) -> None:
        """From here on, report declining as being about `op` (by default, about the root)."""
        self._subject = op.out

    # -- what it costs ------------------------------------------------------------------------

    def pays(self, old: Iterable[Op], *new: Value) -> float:
        """The seconds that what was emitted for `new` saves on the target where `old` goes.

        Declines if it takes longer, or needs parameters stored beside those there are
        (graphopt.ir.storage).
        """
        old = list(old)
        self.stored_once(old)
        before, after = sum(map(self.target.seconds, old)), self._seconds(new)
        self.require(
            after <= before * (1 + 1e-9),  # the same, added up in another order
            f"it would take {after * 1e6:.0f} us instead of {before * 1e6:.0f} (estimated for "
            f"{self.target.name})",
        )
        return before - after

    def worthwhile(self, judge: Callable[[], bool]) -> None:
        """Decline silently unless `judge` says that the rewrite pays. No matter of proof."""
        self.match(judge())

    def stored_once(self, old: Iterable[Op]) -> None:
        """Decline if parameters would be stored beside those there are where `old` goes."""
        gone, made = {op.out.node for op in old}, set(self.made)
        for operand in set(storage.parameters_read(self.graph, made)):
            if operand.op == "get_attr":
                continue
            narrow = coded.compressed(operand)
            if narrow is not None and (reason := coded.refusal(self.graph, operand, narrow)):
                self.decline(reason)
            if (twice := storage.kept_twice(self.graph, operand, gone, made)) is not None:
                state, reader = twice
                self.decline(
                    f"{state.target} is read by {self.graph.where(reader) or reader.name} too, and "
                    "would be stored twice (the pass untie gives every reader its own)"
                )

    def cheapest(self, *ways: Callable[[], Value]) -> Value:
        """What the fastest of several ways emits; those that decline are left out."""
        found: list[tuple[float, Callable[[], Value]]] = []
        refusal = None
        start = len(self.made)
        for way in ways:
            try:
                found.append((self._seconds([way()]), way))
            except Declined as declined:
                refusal = refusal or declined
            self.rollback(start)
        if not found:
            assert refusal is not None
            raise refusal
        return min(found, key=lambda one: one[0])[1]()

    def _seconds(self, new: Iterable[Value]) -> float:
        """About how long the emitted ops take that compute some values."""
        made, stack, total = set(self.made), [one.node for one in new], 0.0
        while stack:
            node = stack.pop()
            if node in made:
                made.discard(node)
                stack += node.all_input_nodes
                op = self.view(node)
                assert op is not None
                total += self.target.seconds(op)
        return total

    # -- more than one value ------------------------------------------------------------------

    def replace(self, value: Value, by: Value) -> None:
        """In the same step as the root, let `by` stand for `value` too.

        What `by` is made of moves in front of `value`, which readers may follow.
        """
        self.require(
            self.lift(by.node, value.node),
            f"what takes the place of {describe(value)} is computed after it",
        )
        self.others.append((value, by))

    def rollback(self, since: int = 0) -> None:
        super().rollback(since)
        made = set(self.made)
        self.others = [pair for pair in self.others if pair[1].node in made]

    # -- looking around -----------------------------------------------------------------------

    def producer(self, value: Any, cls: type[OpType]) -> OpType:
        """The op that computes `value`, which must be a `cls`; declines otherwise."""
        op = value.op if isinstance(value, Value) else None
        if not isinstance(op, cls):
            self.decline(f"{describe(value)} is not {article(cls.__name__)}", near=False)
        return op

    def readers(self, value: Value, cls: type[OpType]) -> list[OpType]:
        """The ops of a class that read `value`, in graph order."""
        found = [self.view(user) for user in sorted(value.users)]
        return [op for op in found if isinstance(op, cls)]

    def only_user(self, producer: Op | Value, user: Op | Value) -> bool:
        """Whether the value of `producer` is read by `user` alone."""
        source = producer.out if isinstance(producer, Op) else producer
        reader = user.out if isinstance(user, Op) else user
        return set(source.users) == {reader.node}

    def conv_like(self, conv: Op, **changes: Any) -> Value:
        """`conv` with some fields changed, in its place of the source model."""
        return self.emit(conv.replace(**changes), like=conv)

    emit_like = conv_like


def describe(value: Any) -> str:
    """`value` in words, for reasons: what computes it, and where."""
    if not isinstance(value, Value):
        return repr(value)
    node = value.node
    if node.op == "placeholder":
        return f"the input {node.name}"
    if node.op == "get_attr":
        return f"the parameter {node.target}"
    op = value.op
    name = type(op).__name__ if op is not None else str(node.target).removeprefix("aten.")
    place = value.where
    return f"{name} ({place})" if place else name


def article(noun: str) -> str:
    return f"{'an' if noun[0] in 'AEIOU' else 'a'} {noun}"


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """A rewrite function with its root ops and its contract. Call it as the plain function."""

    function: Callable[[Any, Rewriter], Value]
    name: str
    roots: tuple[type[Op], ...]
    contract: Contract
    explain: bool = False
    unproved: str = ""

    def __call__(self, op: Op, rw: Rewriter) -> Value:
        return self.function(op, rw)

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def __str__(self) -> str:
        return self.name


Function = TypeVar("Function", bound=Callable[..., Any])


@overload
def rewrite(function: Callable[..., Any], /) -> Rewrite: ...
@overload
def rewrite(
    *,
    root: type[Op] | tuple[type[Op], ...] | None = None,
    contract: Contract | None = None,
    name: str | None = None,
    explain: bool = False,
    unproved: str = "",
) -> Callable[[Callable[..., Any]], Rewrite]: ...
def rewrite(
    function: Callable[..., Any] | None = None,
    /,
    *,
    root: type[Op] | tuple[type[Op], ...] | None = None,
    contract: Contract | None = None,
    name: str | None = None,
    explain: bool = False,
    unproved: str = "",
) -> Any:
    """Make a function a rewrite.

    The root op (or a union of ops) is the annotation of the first parameter, or `root`.
    `contract` is `Algebraic()` unless said otherwise. With `explain`, declining is reported for
    every root, also where the pattern does not occur at all. `unproved` says why the rewrite cannot
    be proved (see `graphopt.testing.prove`) and what checks it instead.

    Raises:
        RewriteError: if the function has no usable annotation.
    """

    def make(fn: Callable[..., Any]) -> Rewrite:
        roots = _roots(fn) if root is None else root if isinstance(root, tuple) else (root,)
        title = name or fn.__name__.replace("_", "-")
        return Rewrite(fn, title, roots, contract or Algebraic(), explain, unproved)

    return make if function is None else make(function)


def _roots(fn: Callable[..., Any]) -> tuple[type[Op], ...]:
    parameters = list(inspect.signature(fn).parameters)
    if len(parameters) != 2:
        raise RewriteError(
            f"rewrite {fn.__name__} takes {len(parameters)} parameters; expected (op, rw)"
        )
    annotation = inspect.get_annotations(fn).get(parameters[0])
    if isinstance(annotation, str):
        scope = {**fn.__globals__, **inspect.getclosurevars(fn).nonlocals}
        try:
            annotation = eval(annotation, scope)
        except NameError as error:
            raise RewriteError(
                f"rewrite {fn.__name__}: cannot resolve the annotation {annotation!r} ({error}); "
                "pass root=..."
            ) from None
    options = typing.get_args(annotation) or (annotation,)
    if not all(isinstance(one, type) and issubclass(one, Op) for one in options):
        raise RewriteError(
            f"rewrite {fn.__name__}: annotate {parameters[0]} with an op view from "
            f"graphopt.ir.ops; found {annotation!r}"
        )
    return tuple(options)
