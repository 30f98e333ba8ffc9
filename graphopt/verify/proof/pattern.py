"""Patterns that a rewrite makes up as it looks: its own function decides what they contain.

A `Pattern` is a rewriter over a graph that does not exist yet. Its root is a general op; every
operand is an `Unknown` until the rewrite asks what computes it, whether it is a constant, or who
else reads it. Each such question is a choice, and so is each comparison of sizes or numbers that is
not settled. Running the function once per sequence of choices visits every pattern it matches, up to
a depth, with its preconditions. `prove` takes all of them with symbols for sizes; `check` draws some
with numbers for sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from graphopt.ir.ops.base import Op, Undecided
from graphopt.ir.rewrite import Rewriter
from graphopt.ir.value import Value

Choice = TypeVar("Choice")


class Infeasible(Exception):
    """No graph answers the questions this way."""


CPU = torch.device("cpu")


class Gap(Exception):
    """A pattern that cannot be written down in general, so that nothing is known of it."""


MOST_EMITTED = 1000  # by one run of a rewrite
LOST = 1 << 40  # sizes need some value as ints; one this large was lost on the way through C


@dataclasses.dataclass(frozen=True)
class Meta:
    """What is known of a tensor that does not exist."""

    shape: tuple[Any, ...]
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU

    @property
    def ndim(self) -> int:
        return len(self.shape)


class Node:
    """A node of a pattern, with what rewrites may ask of `fx.Node`."""

    def __init__(self, name: str, meta: Meta, view: Any, depth: int) -> None:
        self.name = name
        self.meta = {"val": meta}
        self.view = view
        self.depth = depth
        self.users: dict[Node, None] = {}
        self.twin: Node | None = None
        self.constant: bool | None = None
        self.others: bool | None = None
        self.target: Any = None
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    @property
    def computed(self) -> bool:
        """Whether it is decided what computes this (asked without asking the rewrite's question)."""
        return issubclass(type(self.view), Op)

    @property
    def op(self) -> str:
        return "call_function" if self.computed else "placeholder"

    @property
    def all_input_nodes(self) -> list[Node]:
        return inputs(self.view) if self.computed else []

    def __lt__(self, other: Node) -> bool:
        return self.name < other.name

    def __str__(self) -> str:
        return self.name


def _check_sizes(op: Op) -> None:
    """No option may be a size that has lost its symbol."""

    def visit(item: Any) -> None:
        if type(item) is int and abs(item) >= LOST >> 1 and item != 2**63 - 1:
            raise TypeError(f"a size of {type(op).__name__} has lost its symbol")
        if isinstance(item, (tuple, list)):
            for one in item:
                visit(one)

    for field in dataclasses.fields(op):
        if field.name != "out":
            visit(getattr(op, field.name))


def operands(op: Op) -> list[Value]:
    """The values among the fields of an op."""
    found: list[Value] = []

    def visit(item: Any) -> None:
        if isinstance(item, Value):
            found.append(item)
        elif isinstance(item, (tuple, list)):
            for one in item:
                visit(one)

    for field in dataclasses.fields(op):
        if field.name != "out":
            visit(getattr(op, field.name))
    return found


def inputs(op: Op) -> list[Any]:
    return [find(value.node) for value in operands(op)]


def find(node: Any) -> Any:
    """The node that a node was found to be the same as."""
    while node.twin is not None:
        node = node.twin
    return node


class Unknown(Undecided):
    """The op of a leaf: what it is, `isinstance` decides."""

    def __init__(self, pattern: Pattern, node: Node) -> None:
        self.__dict__.update(pattern=pattern, node=node, ruled_out=set())

    def is_a(self, cls: type[Op]) -> bool:
        op = self.pattern.decide(self, cls)
        return isinstance(op, cls)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        return type(self.node.view) if self.node.computed else Unknown

    def __getattr__(self, name: str) -> Any:
        if not self.node.computed:
            raise AttributeError(f"what computes {self.node.name} is not decided; ask isinstance")
        return getattr(self.node.view, name)


class _Graph:
    """What rewrites ask of `Graph`."""

    def __init__(self, pattern: Pattern) -> None:
        self._pattern = pattern
        self.states: dict[str, Any] = {}
        self.mutated: frozenset[str] = frozenset()

    def is_constant(self, node: Node) -> bool:
        return self._pattern.is_constant(find(node))

    def where(self, node: Node) -> str:
        return ""


class Pattern(Rewriter):
    """A rewriter that invents the graph it is asked about. Subclasses say how sizes are made."""

    max_depth = 2
    brief = False

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.names: dict[str, int] = {}
        self.made = []
        self.others = []
        self.requirements: dict[str, None] = {}
        self._subject = None
        self._depth = 0
        self.graph = _Graph(self)  # type: ignore[assignment]
        self.missing: set[str] = set()
        self._differ: list[tuple[Any, Any]] = []

    # -- what subclasses decide ---------------------------------------------------------------

    def choose(self, options: Sequence[Choice], what: str = "") -> Choice:
        raise NotImplementedError

    def size(self, name: str, low: int = 1) -> Any:
        """A new size of at least `low`."""
        raise NotImplementedError

    def number(self, name: str, positive: bool = False) -> Any:
        """A new number."""
        raise NotImplementedError

    def flag(self, name: str) -> Any:
        """True or False, decided when it is asked for."""
        raise NotImplementedError

    def halves(self, total: Any) -> tuple[Any, Any]:
        """Sizes a, b with a + b = total."""
        raise NotImplementedError

    def factors(self, total: Any) -> tuple[Any, Any]:
        """Sizes a, b with a b = total."""
        raise NotImplementedError

    def covered(self, out: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Any:
        """A size n with floor((n + 2 padding - dilation (kernel - 1) - 1) / stride) + 1 = out."""
        raise NotImplementedError

    def spread(
        self, out: Any, kernel: Any, stride: Any, padding: Any, dilation: Any
    ) -> tuple[Any, Any]:
        """Input size and output padding of a transposed convolution with an output of size `out`."""
        raise NotImplementedError

    def feasible(self, condition: object) -> None:
        """Infeasible unless `condition` holds."""
        if not condition:
            raise Infeasible

    def equate(self, a: Any, b: Any) -> None:
        """From now on sizes a and b are equal; Infeasible if they cannot be."""
        raise NotImplementedError

    # -- making nodes -------------------------------------------------------------------------

    def name(self, stem: str) -> str:
        count = self.names[stem] = self.names.get(stem, 0) + 1
        return stem if count == 1 else f"{stem}{count}"

    def leaf(self, shape: Sequence[Any], name: str = "x", constant: bool | None = None) -> Value:
        """A tensor of which nothing is known yet; a parameter if `constant`."""
        node = Node(self.name(name), Meta(tuple(shape)), None, self._depth + 1)
        node.view = None if constant else Unknown(self, node)
        node.constant = constant
        self.nodes.append(node)
        return Value(node, self)  # type: ignore[arg-type]

    def vector(self, size: Any, name: str) -> Value:
        return self.leaf((size,), name, constant=True)

    def optional(self, value: Any) -> Any:
        """The value that `value()` makes, or None."""
        return value() if self.brief or self.choose((True, False), "given") else None

    def begin(self, cls: type[Op]) -> Op:
        """The root: a general op of a class."""
        from graphopt.verify.proof.general import general

        op = general(cls)(self, cls, None)
        node = Node(self.name("root"), Meta(self.shape_of(op)), op, 0)
        self.root = node  # type: ignore[assignment]
        self.before = node  # type: ignore[assignment]
        return self._enter(node, op)

    def shape_of(self, op: Op) -> tuple[Any, ...]:
        from graphopt.verify.proof.notation import sizes

        return sizes(op)

    def _enter(self, node: Node, op: Op) -> Op:
        op = dataclasses.replace(op, out=Value(node, self))  # type: ignore[arg-type]
        node.view = op
        for one in inputs(op):
            one.users[node] = None
        if node not in self.nodes:
            self.nodes.append(node)
        return op

    # -- answering questions ------------------------------------------------------------------

    def decide(self, unknown: Unknown, cls: type[Op]) -> Any:
        """The op of a leaf if it is a `cls`, which is a choice; None otherwise."""
        from graphopt.verify.proof.general import candidates, general

        node = find(unknown.node)
        if node.computed or node.view is None:
            return node.view
        if cls in unknown.ruled_out or node.depth > self.max_depth:
            return None
        found = [one for one in candidates(cls) if one not in unknown.ruled_out]
        if not found:
            self.missing.add(cls.__name__)
            return None
        if not self.choose((True, False), f"{node.name} is a {cls.__name__}"):
            unknown.ruled_out.add(cls)
            return None
        concrete = found[0] if len(found) == 1 else self.choose(found, f"which {cls.__name__}")
        before, self._depth = (self._depth, self.brief), node.depth
        op = general(concrete)(self, concrete, node.meta["val"].shape)
        self._depth, self.brief = before
        for want, have in zip(node.meta["val"].shape, self.shape_of(op), strict=True):
            self.equate(want, have)
        return self._enter(node, op)

    def view(self, node: Any) -> Any:
        return find(node).view

    def is_constant(self, node: Node) -> bool:
        if node.constant is None:
            if node.computed:
                return all(map(self.is_constant, inputs(node.view)))
            node.constant = self.choose((False, True), f"{node.name} is a parameter")
            if node.constant:
                node.view = None
        return node.constant

    def readers(self, value: Value, cls: Any) -> list[Any]:
        """The ops of a class that are known to read a value, and perhaps one more."""
        from graphopt.verify.proof.general import candidates, general

        node = find(value.node)
        found = [one.view for one in node.users if isinstance(one.view, cls)]
        if node.depth <= self.max_depth and self.choose((False, True), f"{node.name} has siblings"):
            concrete = self.choose(candidates(cls), f"which {cls.__name__}")
            op = general(concrete)(self, concrete, None)
            made = Node(self.name("sibling"), Meta(self.shape_of(op)), op, 0)
            self._identify(op.input.node, node)  # type: ignore[attr-defined]
            found.append(self._enter(made, op))
        return found

    def only_user(self, producer: Any, user: Any) -> bool:
        source = find((producer.out if not isinstance(producer, Value) else producer).node)
        if source.others is None:
            source.others = self.choose((False, True), f"{source.name} is read elsewhere")
        reader = user if isinstance(user, Value) else user.out
        return not source.others and set(source.users) == {find(reader.node)}

    def same(self, left: Any, right: Any) -> bool:
        left, right = find(left), find(right)
        if left is right:
            return True
        differ = any({find(one), find(other)} == {left, right} for one, other in self._differ)
        if differ or self._reaches(left, right) or self._reaches(right, left):
            return False
        a, b = left.meta["val"].shape, right.meta["val"].shape
        if len(a) != len(b) or not self.choose((True, False), f"{left.name} is {right.name}"):
            self._differ.append((left, right))
            return False
        self._identify(left, right)
        return True

    def _reaches(self, node: Any, below: Any) -> bool:
        """Whether a node is computed from another one."""
        inner = node.all_input_nodes
        return any(one is below or self._reaches(one, below) for one in inner)

    def _identify(self, left: Any, right: Any) -> None:
        """From now on two nodes are one; Infeasible if they cannot be."""
        left, right = find(left), find(right)
        if left is right:
            return
        if left.computed and not right.computed:
            left, right = right, left
        shapes = left.meta["val"].shape, right.meta["val"].shape
        if len(shapes[0]) != len(shapes[1]):
            raise Infeasible("different ranks")
        for one, other in zip(*shapes, strict=True):
            self.equate(one, other)
        if left.computed:
            if type(left.view) is not type(right.view):
                raise Infeasible("different ops")
            for field in dataclasses.fields(left.view):
                if field.name != "out":
                    self._match(getattr(left.view, field.name), getattr(right.view, field.name))
        elif left.constant is not None or right.constant is not None:
            constant = left.constant if left.constant is not None else right.constant
            if self.is_constant(left) != constant or self.is_constant(right) != constant:
                raise Infeasible("a parameter and a value that is none")
        left.twin = right
        right.users.update(left.users)

    def _match(self, a: Any, b: Any) -> None:
        """Make two fields equal."""
        if isinstance(a, Value) and isinstance(b, Value):
            self._identify(a.node, b.node)
        elif isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b):
            for one, other in zip(a, b, strict=True):
                self._match(one, other)
        elif isinstance(a, (int, float)) and isinstance(b, (int, float)):
            if bool(a) != bool(b) if isinstance(a, bool) or isinstance(b, bool) else a != b:
                raise Infeasible("different options")
        elif a != b:
            raise Infeasible("different options")

    def require(self, condition: object, reason: str) -> None:
        super().require(condition, reason)
        self.requirements[reason] = None

    def pays(self, old: Any, *new: Value) -> float:
        """What is faster is not a matter of proof."""
        return 0.0

    def stored_once(self, old: Any) -> None:
        """Nor is what is stored."""

    def worthwhile(self, judge: Callable[[], bool]) -> None:
        """Nor is what is worth it."""

    def cheapest(self, *ways: Callable[[], Value]) -> Value:
        return self.choose(ways, "the way")()

    def replace(self, value: Value, by: Value) -> None:
        self.others.append((value, by))

    # -- emitting -----------------------------------------------------------------------------

    def emit(self, op: Op, like: Any = None) -> Value:
        if len(self.made) >= MOST_EMITTED:
            raise RuntimeError(f"more than {MOST_EMITTED} ops emitted")
        _check_sizes(op)
        shape = self.shape_of(op)
        node = Node(self.name(type(op).__name__.lower()), Meta(shape), None, 0)
        self._enter(node, op)
        self.made.append(node)  # type: ignore[arg-type]
        return Value(node, self)  # type: ignore[arg-type]

    def emit_once(self, op: Op, like: Any = None) -> Value:
        """Two values that are computed alike are equal."""
        return self.emit(op, like)

    def call(self, target: Any, arguments: dict[str, Any], like: Any = None) -> Value:
        raise NotImplementedError(f"{target} is written without an op view")

    def rollback(self, since: int = 0) -> None:
        del self.made[since:]
        self.others = [pair for pair in self.others if pair[1].node in self.made]
