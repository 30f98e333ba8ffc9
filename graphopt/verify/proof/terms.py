"""Terms of index notation: factors, products summed over bound indices, sums of those."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import sympy as sp
from sympy import Symbol

if TYPE_CHECKING:
    from graphopt.verify.proof.algebra import Space

Mapper = Callable[[Any], Any]


# -- factors -------------------------------------------------------------------------------------


class Factor:
    """Something that multiplies. `idempotent` factors are 0 or 1."""

    idempotent = False
    height = 0  # of nested expressions

    def indices(self) -> set[Symbol]:
        raise NotImplementedError

    def map(self, space: Space, f: Mapper) -> Factor:
        """With every index expression e replaced by f(e)."""
        raise NotImplementedError

    def __str__(self) -> str:
        raise NotImplementedError

    @cached_property
    def text(self) -> str:
        return str(self)

    @cached_property
    def symbols(self) -> frozenset[Symbol]:
        return frozenset(self.indices())

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.text == other.text  # type: ignore[attr-defined]


def symbols_of(values: Iterable[Any]) -> set[Symbol]:
    return set().union(*(value.free_symbols for value in values))


@dataclasses.dataclass(frozen=True, eq=False)
class Element(Factor):
    """`name[at]`, an entry of a tensor of which nothing is known.

    With `stochastic`, its sum over a last index of that size is 1: the weights of an average."""

    name: str
    at: tuple[Any, ...]
    stochastic: Any = None

    def indices(self) -> set[Symbol]:
        return symbols_of(self.at)

    def map(self, space: Space, f: Mapper) -> Factor:
        sums = None if self.stochastic is None else f(self.stochastic)
        return Element(self.name, tuple(map(f, self.at)), sums)

    def __str__(self) -> str:
        return f"{self.name}[{', '.join(map(str, self.at))}]" if self.at else self.name


@dataclasses.dataclass(frozen=True, eq=False)
class Inside(Factor):
    """1 where 0 <= at < size, else 0; for `sure` see `Delta`."""

    at: Any
    size: Any
    sure: Any = None
    idempotent = True

    def indices(self) -> set[Symbol]:
        return symbols_of((self.at, self.size))

    def map(self, space: Space, f: Mapper) -> Factor:
        return Inside(f(self.at), f(self.size), None if self.sure is None else f(self.sure))

    def __str__(self) -> str:
        sure = "" if self.sure is None else f"; {self.sure}"
        return f"[0 <= {self.at} < {self.size}{sure}]"


@dataclasses.dataclass(frozen=True, eq=False)
class Delta(Factor):
    """1 where at = 0, else 0. It is `at = e - u` for an index e that is known to lie inside the
    size `sure`, and u an index of that size or its digits, if `sure` is given."""

    at: Any
    sure: Any = None
    idempotent = True

    def indices(self) -> set[Symbol]:
        return symbols_of((self.at,))

    def map(self, space: Space, f: Mapper) -> Factor:
        return Delta(f(self.at), None if self.sure is None else f(self.sure))

    def __str__(self) -> str:
        return f"[{self.at} = 0{'' if self.sure is None else f'; {self.sure}'}]"


@dataclasses.dataclass(frozen=True, eq=False)
class Call(Factor):
    """An unknown function of expressions; `parameters` are literals that belong to its name."""

    name: str
    parameters: tuple[Any, ...]
    args: tuple[Expr, ...]
    idempotent: bool = False

    @property
    def height(self) -> int:  # type: ignore[override]
        return 1 + max((arg.height for arg in self.args), default=0)

    def indices(self) -> set[Symbol]:
        return set().union(*(arg.indices() for arg in self.args))

    def map(self, space: Space, f: Mapper) -> Factor:
        parameters = tuple(f(one) if isinstance(one, sp.Basic) else one for one in self.parameters)
        args = tuple(space.normal(arg.map(space, f)) for arg in self.args)
        return dataclasses.replace(self, parameters=parameters, args=args)

    def __str__(self) -> str:
        inside = ", ".join(map(str, self.args))
        options = "; " + ", ".join(map(str, self.parameters)) if self.parameters else ""
        return f"{self.name}({inside}{options})"


@dataclasses.dataclass(frozen=True, eq=False)
class Base(Factor):
    """An expression of several terms, standing under an exponent."""

    expr: Expr

    @property
    def height(self) -> int:  # type: ignore[override]
        return 1 + self.expr.height

    def indices(self) -> set[Symbol]:
        return self.expr.indices()

    def map(self, space: Space, f: Mapper) -> Factor:
        return Base(space.normal(self.expr.map(space, f)))

    def __str__(self) -> str:
        return f"({self.expr})"


# -- expressions ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Term:
    """`coefficient * sum over bound of the product of factor ** exponent`."""

    coefficient: Any
    bound: tuple[Symbol, ...] = ()
    factors: tuple[tuple[Factor, Any], ...] = ()

    @property
    def height(self) -> int:
        return max((factor.height for factor, _ in self.factors), default=0)

    def indices(self) -> set[Symbol]:
        found: set[Symbol] = set().union(*(factor.indices() for factor, _ in self.factors))
        found |= sp.sympify(self.coefficient).free_symbols
        return found - set(self.bound)

    def __str__(self) -> str:
        parts = [
            factor.text + (f"^{exponent}" if exponent != 1 else "")
            for factor, exponent in self.factors
        ]
        sign, coefficient = (
            ("-", -self.coefficient) if self.coefficient == -1 else ("", self.coefficient)
        )
        if coefficient != 1 or not parts:
            plain = isinstance(coefficient, (sp.Symbol, sp.Rational))
            parts.insert(0, str(coefficient) if plain else f"({coefficient})")
        if self.bound:
            parts.insert(0, f"sum_{{{', '.join(map(str, self.bound))}}}")
        return sign + " ".join(parts)


@dataclasses.dataclass(frozen=True)
class Expr:
    """A sum of terms."""

    terms: tuple[Term, ...] = ()

    @property
    def height(self) -> int:
        return max((term.height for term in self.terms), default=0)

    def indices(self) -> set[Symbol]:
        return set().union(*(term.indices() for term in self.terms))

    def map(self, space: Space, f: Mapper) -> Expr:
        return Expr(tuple(
            Term(f(term.coefficient), term.bound,
                 tuple((factor.map(space, f), exponent) for factor, exponent in term.factors))
            for term in (space.fresh(one) for one in self.terms)
        ))  # fmt: skip

    def __add__(self, other: Expr) -> Expr:
        return Expr(self.terms + other.terms)

    def __neg__(self) -> Expr:
        return self * -1

    def __sub__(self, other: Expr) -> Expr:
        return self + -other

    def __mul__(self, number: Any) -> Expr:
        return Expr(tuple(
            dataclasses.replace(term, coefficient=term.coefficient * number) for term in self.terms
        ))  # fmt: skip

    def __str__(self) -> str:
        text = " + ".join(map(str, self.terms)) or "0"
        return text.replace("+ -", "- ")  # the keys of terms hold text only, so spelling is free


def number(value: Any) -> Expr:
    """A number, or an expression in sizes and numbers, as a constant function."""
    return Expr((Term(sp.sympify(value)),)) if value != 0 else Expr()


def factor(one: Factor) -> Expr:
    return Expr((Term(sp.Integer(1), (), ((one, sp.Integer(1)),)),))


def element(name: str, at: Iterable[Any], stochastic: Any = None) -> Expr:
    return factor(Element(name, tuple(map(sp.sympify, at)), stochastic))
