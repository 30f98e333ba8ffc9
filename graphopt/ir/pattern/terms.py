"""Terms: what a plain function computes, as op views whose operands are wildcards.

A term is a value: equal terms are equal expressions, so one dictionary holds both what the
wildcards stand for and which value of the graph computes which part of a pattern.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator
from typing import Any

from graphopt.ir.ops.base import Op

SIGNS: dict[Callable[..., Any], str] = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/",
    operator.pow: "**", operator.floordiv: "//", operator.mod: "%",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Term:
    """Base of all terms; `str` spells it for people."""

    @property
    def parts(self) -> tuple[Term, ...]:
        return ()


@dataclasses.dataclass(frozen=True)
class Tensor(Term):
    """A wildcard for any tensor."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class Number(Term):
    """A wildcard for a number literal; for an int, if `whole`."""

    name: str
    whole: bool

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class Fact(Term):
    """The size along an axis, the dtype or the device of what a tensor wildcard stands for."""

    of: Tensor
    what: str
    axis: int = 0

    @property
    def parts(self) -> tuple[Term, ...]:
        return (self.of,)

    def __str__(self) -> str:
        return f"{self.of}.{self.what}" + (f"[{self.axis}]" if self.what == "shape" else "")


@dataclasses.dataclass(frozen=True)
class Literal(Term):
    """A number, a string, None, or any other option as it was written."""

    value: Any

    def __str__(self) -> str:
        return repr(self.value)


@dataclasses.dataclass(frozen=True)
class Inferred(Term):
    """The size of a reshape that follows from the others."""

    def __str__(self) -> str:
        return "-1"


@dataclasses.dataclass(frozen=True)
class Formula(Term):
    """A number computed from numbers or sizes."""

    function: Callable[..., Any]
    operands: tuple[Term, ...]

    @property
    def parts(self) -> tuple[Term, ...]:
        return self.operands

    def __str__(self) -> str:
        sign = SIGNS.get(self.function)
        if sign is None:
            return f"{self.function.__name__}({', '.join(map(str, self.operands))})"
        return f"({f' {sign} '.join(map(str, self.operands))})"


@dataclasses.dataclass(frozen=True)
class Many(Term):
    """A tuple of terms."""

    items: tuple[Term, ...]

    @property
    def parts(self) -> tuple[Term, ...]:
        return self.items

    def __str__(self) -> str:
        return f"[{', '.join(map(str, self.items))}]"


@dataclasses.dataclass(frozen=True)
class Apply(Term):
    """An op of a class on terms, which are in the order of the class's fields."""

    cls: type[Op]
    fields: tuple[Term, ...]

    @property
    def parts(self) -> tuple[Term, ...]:
        return self.fields

    @property
    def named(self) -> dict[str, Term]:
        return dict(zip(field_names(self.cls), self.fields, strict=True))

    def __str__(self) -> str:
        said = []
        for field, term in zip(_fields(self.cls), self.fields, strict=True):
            if isinstance(term, Literal) and term.value == field.default:
                continue
            tensor = isinstance(term, (Tensor, Apply)) or field.name in ("left", "right")
            said.append(str(term) if tensor else f"{field.name}={term}")
        return f"{self.cls.__name__.lower()}({', '.join(said)})"


def _fields(cls: type[Op]) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(cls) if field.name != "out"]


def field_names(cls: type[Op]) -> tuple[str, ...]:
    return tuple(field.name for field in _fields(cls))


def walk(term: Term) -> Iterator[Term]:
    """A term and everything in it, the outermost first."""
    yield term
    for part in term.parts:
        yield from walk(part)


def counts_sizes(term: Term) -> bool:
    """Whether an expression depends on a size."""
    return any(isinstance(one, Fact) and one.what == "shape" for one in walk(term))


def counts_axes(term: Term) -> bool:
    """Whether an expression names axes or sizes, and so means something else at another rank."""
    kinds = {
        str(field.type)
        for one in walk(term) if isinstance(one, Apply) for field in _fields(one.cls)
    }  # fmt: skip
    return counts_sizes(term) or any("int" in kind or "Any" in kind for kind in kinds)
