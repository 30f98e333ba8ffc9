"""The op table: what an op view is, how one is read from a node and written back.

An op view is a small frozen dataclass with named fields. Its entry declares the ATen overloads it
covers; arguments are always read through the overload's schema, so positional, keyword and default
spellings are the same thing. A schema argument that has no field must stand at its default,
otherwise the node has no view: what an entry leaves out is unknown, never wrong.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, dataclass_transform

import torch
from torch import fx

from graphopt.ir.value import Value

if TYPE_CHECKING:
    from graphopt.ir.builder import Builder

with suppress(ImportError):  # defines quantized_decomposed, which stored graphs may call
    importlib.import_module("torch.ao.quantization.fx._decomposed")

Target = Any  # torch._ops.OpOverload, or a Python function on symbolic sizes
Numeric = Callable[[Any], torch.Tensor]

TABLE: dict[Target, list[type[Op]]] = {}
# Schema names that mean the same field everywhere.
_RENAME = {"self": "input", "keepdim": "keepdim", "dim": "dim"}


class Undecided:
    """An op that may still become any: asking what it is decides it. The prover's patterns are
    made of these."""

    def is_a(self, cls: type[Op]) -> bool:
        raise NotImplementedError


class OpType(type):
    """`isinstance(undecided, cls)` is a question to the undecided op."""

    def __instancecheck__(cls, instance: object) -> bool:
        if issubclass(type(instance), Undecided):
            return instance.is_a(cls)  # type: ignore[attr-defined, no-any-return]
        return super().__instancecheck__(instance)


@dataclasses.dataclass(frozen=True, eq=False)
class Op(metaclass=OpType):
    """Base of all op views. `out` is the value the viewed node computes; None for a new op."""

    targets: ClassVar[tuple[Target, ...]] = ()
    rename: ClassVar[dict[str, str]] = {}
    out: Value = dataclasses.field(default=None, kw_only=True, repr=False)  # type: ignore[assignment]

    # -- reading and writing ------------------------------------------------------------------

    @classmethod
    def parse(cls, call: Call) -> Op | None:
        """The view of `call`, or None when the node says more than the fields can hold."""
        values: dict[str, Any] = {}
        names = cls.field_names()
        for name, value in call.arguments.items():
            field = cls.rename.get(name, _RENAME.get(name, name))
            if field in names:
                values[field] = value
            elif not call.at_default(name):
                return None
        return cls(**values, out=call.out)

    def build(self) -> tuple[Target, dict[str, Any]]:
        """The overload and its schema-named arguments that compute this op."""
        return self.call(self.targets[0])

    def call(self, target: Target, **override: Any) -> tuple[Target, dict[str, Any]]:
        names = self.field_names()
        arguments = {}
        for argument in target._schema.arguments:
            field = self.rename.get(argument.name, _RENAME.get(argument.name, argument.name))
            if field in override:
                arguments[argument.name] = override[field]
            elif field in names:
                arguments[argument.name] = getattr(self, field)
        return target, arguments

    @classmethod
    @cache
    def field_names(cls) -> frozenset[str]:
        return frozenset(field.name for field in dataclasses.fields(cls) if field.name != "out")

    def replace(self, **changes: Any) -> Self:
        """A new, not yet emitted op with some fields changed."""
        return dataclasses.replace(self, out=None, **changes)  # type: ignore[arg-type]

    # -- facts: an entry overrides what it knows --------------------------------------------------

    @property
    def flops(self) -> float:
        """Multiply-adds count two. Zero for ops whose arithmetic is negligible or unknown."""
        return 0.0

    @property
    def reduction(self) -> int:
        """The number of terms added up for one output element (rounding analysis)."""
        return 1

    def magnitude(self, value: Numeric, magnitude: Numeric, run: Callable[..., Any]) -> Any:
        """An elementwise bound A with |computed - exact| <= gamma_n(u) * A, or None if unknown.

        `value(v)` and `magnitude(v)` give an operand's float64 value and its own bound;
        `run(replace)` evaluates this very op with operands mapped through `replace`.
        """
        return None


class Multilinear:
    """Sums of products of operands, data movement included: the bound is the op on magnitudes."""

    def magnitude(self, value: Numeric, magnitude: Numeric, run: Callable[..., Any]) -> Any:
        return run(magnitude)


class Call:
    """A node's arguments, by schema name, with nodes wrapped as values."""

    def __init__(self, node: fx.Node, builder: Builder) -> None:
        self.node = node
        self.target: Any = node.target
        self.out = Value(node, builder)
        self.builder = builder
        self.arguments: dict[str, Any] = {}
        for position, (name, default) in enumerate(_schema(node.target)):
            if position < len(node.args):
                argument = node.args[position]
            else:
                argument = node.kwargs.get(name, default)
            self.arguments[name] = self._wrap(argument)

    def _wrap(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return Value(argument, self.builder)
        if isinstance(argument, (list, tuple)):
            return tuple(self._wrap(item) for item in argument)
        return argument

    def at_default(self, name: str) -> bool:
        default = dict(_schema(self.target))[name]
        if isinstance(default, list):
            default = tuple(default)
        found = self.arguments[name]
        return found is default or (not isinstance(found, Value) and bool(found == default))

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]


@cache
def _schema(target: Target) -> tuple[tuple[str, Any], ...]:
    return tuple(
        (argument.name, argument.default_value if argument.has_default_value() else None)
        for argument in target._schema.arguments
    )


def overload(name: str) -> Target | None:
    """`"conv2d.default"` or `"ns::name.overload"` -> the overload, None where torch lacks it."""
    namespace, _, rest = name.rpartition("::")
    packet, _, kind = rest.partition(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace or "aten"), packet), kind or "default")
    except AttributeError:
        return None


OpClass = TypeVar("OpClass", bound=type[Op])


@dataclass_transform(frozen_default=True, eq_default=False)
def op(*names: str) -> Callable[[OpClass], OpClass]:
    """Enter a class into the table under the named ATen overloads."""

    def enter(cls: OpClass) -> OpClass:
        cls = dataclasses.dataclass(frozen=True, eq=False)(cls)  # type: ignore[assignment]
        found = tuple(target for name in names if (target := overload(name)) is not None)
        cls.targets = found
        for target in found:
            TABLE.setdefault(target, []).append(cls)
        return cls

    return enter


def view(node: fx.Node, builder: Builder) -> Op | None:
    """The op view of a node, or None for inputs, parameters and unknown ops."""
    if node.op != "call_function":
        return None
    for cls in TABLE.get(node.target, ()):
        parsed = cls.parse(Call(node, builder))
        if parsed is not None:
            return parsed
    return None


def may_be(target: Any, classes: tuple[type[Op], ...]) -> bool:
    """Whether some call of `target` has a view of one of these classes."""
    return any(issubclass(cls, classes) for cls in TABLE.get(target, ()))


_EXAMPLE: ContextVar[Mapping[Any, int]] = ContextVar("sizes of the example", default={})  # noqa: B039


@contextmanager
def example_sizes(sizes: Mapping[Any, int]) -> Iterator[None]:
    """Within, `hint` takes these values for symbols instead of those the graph was traced with."""
    token = _EXAMPLE.set(sizes)
    try:
        yield
    finally:
        _EXAMPLE.reset(token)


def hint(size: Any) -> int:
    """A size as a number; for a dynamic size, its value in the example inputs."""
    if isinstance(size, int):
        return size
    found = size.node.expr.xreplace(_EXAMPLE.get())
    if isinstance(found, int) or found.is_Integer:
        return int(found)
    value = getattr(size.node, "hint", None)
    return int(value) if value is not None else 1


def numel(value: Value) -> int:
    count = 1
    for size in value.shape:
        count *= hint(size)
    return count
