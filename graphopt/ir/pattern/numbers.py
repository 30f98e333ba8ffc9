"""Numbers that remember how they were computed.

A `Real` or `Whole` is a float or an int that a traced function calculates with as usual. On its way
through torch it becomes a plain number; the `Ledger` knows it again by its value.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

from graphopt.ir.pattern.terms import Formula, Literal, Number, Term
from graphopt.ir.rewrite import RewriteError


class Ledger:
    """Which term each symbolic number of one trace stands for, by its value."""

    def __init__(self, function: str) -> None:
        self.function = function
        self._terms: dict[Any, Term] = {}

    def wildcard(self, name: str, value: float) -> Any:
        return self.enter(value, Number(name, isinstance(value, int)))

    def enter(self, value: Any, term: Term) -> Any:
        self._terms.setdefault(value, term)
        return (Whole if isinstance(value, int) else Real)(self, value, term)

    def term(self, value: Any) -> Term:
        """What a number in a traced graph stands for; itself if nothing was computed."""
        if type(value) in (int, float) and value in self._terms:
            return self._terms[value]
        return Literal(value)


class _Symbolic:
    """Arithmetic that keeps the books."""

    ledger: Ledger
    term: Term

    def _computed(self, function: Callable[..., Any], *operands: Any) -> Any:
        if not all(isinstance(one, (int, float)) for one in operands):
            return NotImplemented
        terms = [one.term if isinstance(one, _Symbolic) else Literal(one) for one in operands]
        value = function(*map(plain, operands))
        return self.ledger.enter(value, Formula(function, tuple(terms)))

    def _compared(self, function: Callable[..., bool], other: Any) -> bool:
        """The answer where torch checks its arguments; functions themselves may not ask."""
        if sys._getframe(2).f_globals.get("__name__", "").partition(".")[0] == "torch":
            return function(plain(self), plain(other))
        raise RewriteError(
            f"{self.ledger.function} compares {self.term} with {other!r}: a pattern is one "
            "expression for all numbers; say conditions with require="
        )

    def __bool__(self) -> bool:
        return self._compared(operator.ne, 0)


def plain(number: Any) -> Any:
    """A number without its books; anything else as it is."""
    kind = int if isinstance(number, Whole) else float if isinstance(number, Real) else None
    return number if kind is None else kind(number)


def _method(function: Callable[..., Any], swapped: bool = False) -> Any:
    def method(self: Any, *others: Any) -> Any:
        operands = (*others, self) if swapped else (self, *others)
        return self._computed(function, *operands)

    return method


def _comparison(function: Callable[..., bool]) -> Any:
    return lambda self, other: self._compared(function, other)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(_Symbolic, f"__{_name}__", _method(getattr(operator, _name)))
    setattr(_Symbolic, f"__r{_name}__", _method(getattr(operator, _name), swapped=True))
for _name in ("neg", "abs"):
    setattr(_Symbolic, f"__{_name}__", _method(getattr(operator, _name)))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(_Symbolic, f"__{_name}__", _comparison(getattr(operator, _name)))


class Real(_Symbolic, float):
    def __new__(cls, ledger: Ledger, value: float, term: Term) -> Real:
        made = super().__new__(cls, value)
        made.ledger, made.term = ledger, term
        return made

    __hash__ = float.__hash__


class Whole(_Symbolic, int):
    def __new__(cls, ledger: Ledger, value: int, term: Term) -> Whole:
        made = super().__new__(cls, value)
        made.ledger, made.term = ledger, term
        return made

    __hash__ = int.__hash__
