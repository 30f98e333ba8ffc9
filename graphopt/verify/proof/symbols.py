"""Sizes and numbers that are symbols, and the choices of one run through a rewrite.

`Size` is an int and `Real` a float, so a rewrite computes with them as usual; each carries the
expression it stands for. A comparison that the expressions do not settle is a choice: equal sizes are
then equal from there on.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import sympy as sp
from sympy.core.sympify import converter

from graphopt.verify.proof.algebra import Expr, Space, element, number, quot, sym
from graphopt.verify.proof.notation import Index, Reader, entry
from graphopt.verify.proof.pattern import Infeasible, Pattern, find

# Sizes need some value as ints; one this large in an option was lost on the way through C.
LOST = 1 << 40


class Choices:
    """A path through a tree of choices, depth first."""

    def __init__(self) -> None:
        self._path: list[list[int]] = []
        self._at = 0

    def take(self, count: int) -> int:
        if self._at == len(self._path):
            self._path.append([0, count])
        taken, _ = self._path[self._at]
        self._at += 1
        return taken

    def next(self) -> bool:
        """Go to the next path; False after the last."""
        self._at = 0
        while self._path and self._path[-1][0] + 1 == self._path[-1][1]:
            self._path.pop()
        if not self._path:
            return False
        self._path[-1][0] += 1
        return True


class RandomChoices(Choices):
    """Paths at random, from a seed; `next` goes on for ever."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = random.Random(seed)

    def take(self, count: int) -> int:
        return self._random.randrange(count)

    def next(self) -> bool:
        return True


class Size(int):
    """A size of a pattern."""

    pattern: Symbols
    _expr: Any

    def __new__(cls, pattern: Symbols, expr: Any) -> Size:
        made = super().__new__(cls, LOST + next(pattern.counter))
        made.pattern, made._expr = pattern, expr
        return made

    @property
    def expr(self) -> Any:
        return self.pattern.space.resolve(self._expr)

    def _with(self, expr: Any) -> Any:
        expr = self.pattern.space.resolve(expr)
        return int(expr) if expr.is_Integer else Size(self.pattern, expr)

    def _divided(self, other: Any, reverse: bool = False) -> tuple[Any, Any]:
        pair = (sym(other), self.expr) if reverse else (self.expr, sym(other))
        q, r = self.pattern.space.divmod(*pair)
        return self._with(q), self._with(r)

    def __add__(self, other: Any) -> Any:
        return self._with(self.expr + sym(other))

    def __sub__(self, other: Any) -> Any:
        return self._with(self.expr - sym(other))

    def __rsub__(self, other: Any) -> Any:
        return self._with(sym(other) - self.expr)

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, (tuple, list, str)):
            raise TypeError("a sequence repeated a symbolic number of times")
        return self._with(self.expr * sym(other))

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> Any:
        return self._with(-self.expr)

    def __pow__(self, other: Any, mod: Any = None) -> Any:
        return self._with(self.expr ** sym(other))

    def __floordiv__(self, other: Any) -> Any:
        return self._divided(other)[0]

    def __rfloordiv__(self, other: Any) -> Any:
        return self._divided(other, True)[0]

    def __mod__(self, other: Any) -> Any:
        return self._divided(other)[1]

    def __truediv__(self, other: Any) -> Any:
        return Real(self.pattern, self.expr / sym(other))

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, int):
            return False
        return self.pattern.equal(self.expr, sym(other))

    def __ne__(self, other: Any) -> bool:
        return not self == other

    def __lt__(self, other: Any) -> bool:
        return self.pattern.less(self.expr, sym(other))

    def __ge__(self, other: Any) -> bool:
        return not self < other

    def __gt__(self, other: Any) -> bool:
        return self.pattern.less(sym(other), self.expr)

    def __le__(self, other: Any) -> bool:
        return not self > other

    def __bool__(self) -> bool:
        return not self == 0

    def __hash__(self) -> int:
        return hash(str(self.expr))

    def __str__(self) -> str:
        return str(self.expr)

    __repr__ = __str__
    __format__ = lambda self, spec: str(self)  # noqa: E731


class Real(float):
    """A number of a pattern."""

    pattern: Symbols
    _expr: Any

    def __new__(cls, pattern: Symbols, expr: Any) -> Real:
        made = super().__new__(cls, 0.7310585786300049)
        made.pattern, made._expr = pattern, expr
        return made

    @property
    def expr(self) -> Any:
        return sp.sympify(self._expr).xreplace(self.pattern.space.known)

    def _with(self, expr: Any) -> Any:
        return Real(self.pattern, expr) if expr.free_symbols else float(expr)

    def __add__(self, other: Any) -> Any:
        return self._with(self.expr + sym(other))

    def __sub__(self, other: Any) -> Any:
        return self._with(self.expr - sym(other))

    def __rsub__(self, other: Any) -> Any:
        return self._with(sym(other) - self.expr)

    def __mul__(self, other: Any) -> Any:
        return self._with(self.expr * sym(other))

    __radd__, __rmul__ = __add__, __mul__

    def __truediv__(self, other: Any) -> Any:
        return self._with(self.expr / sym(other))

    def __rtruediv__(self, other: Any) -> Any:
        return self._with(sym(other) / self.expr)

    def __neg__(self) -> Any:
        return self._with(-self.expr)

    def __pow__(self, other: Any, mod: Any = None) -> Any:
        return self._with(self.expr ** sym(other))

    def __abs__(self) -> Any:
        return self if self >= 0 else -self

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, (int, float)):
            return False
        return self.pattern.equal(self.expr, sym(other))

    def __ne__(self, other: Any) -> bool:
        return not self == other

    def __lt__(self, other: Any) -> bool:
        return self.pattern.less(self.expr, sym(other))

    def __ge__(self, other: Any) -> bool:
        return not self < other

    def __gt__(self, other: Any) -> bool:
        return self.pattern.less(sym(other), self.expr)

    def __le__(self, other: Any) -> bool:
        return not self > other

    def __bool__(self) -> bool:
        return not self == 0

    def __hash__(self) -> int:
        return hash(str(self.expr))

    def __str__(self) -> str:
        return str(self.expr)

    __repr__ = __str__


class Flag(int):
    """A truth value that is a choice when it is asked for."""

    pattern: Symbols
    name: str

    def __new__(cls, pattern: Symbols, name: str) -> Flag:
        made = super().__new__(cls, 0)
        made.pattern, made.name = pattern, name
        return made

    def __bool__(self) -> bool:
        return self.pattern._ask(self.name, f"not {self.name}", lambda: True)

    def __str__(self) -> str:
        return self.name

    __repr__ = __str__


converter[Size] = converter[Real] = lambda value: value.expr


class Symbols(Pattern):
    """A pattern whose sizes and numbers are symbols."""

    def __init__(self, choices: Choices) -> None:
        super().__init__()
        self.space = Space()
        self.choices = choices
        self.counter = itertools.count()
        self.conditions: dict[str, None] = {}
        self._decided: dict[str, bool] = {}
        self.covers: list[tuple[Any, Any, Any, Any]] = []
        self.spreads: list[tuple[Any, Any, Any, Any]] = []
        self.asked: list[tuple[str, Any, Any, bool]] = []

    # -- choices ------------------------------------------------------------------------------

    def choose(self, options: Sequence[Any], what: str = "") -> Any:
        if not options:
            raise Infeasible(what)
        return options[self.choices.take(len(options))] if len(options) > 1 else options[0]

    def feasible(self, condition: object) -> None:
        if not condition:
            raise Infeasible

    def size(self, name: str, low: int = 1) -> Any:
        symbol = sp.Symbol(self.name(name.upper()), integer=True,
                           **({"positive": True} if low else {"nonnegative": True}))  # fmt: skip
        return Size(self, symbol)

    def flag(self, name: str) -> Any:
        return Flag(self, self.name(name))

    def number(self, name: str, positive: bool = False) -> Any:
        return Real(self, sp.Symbol(self.name(name), real=True, positive=positive or None))

    def halves(self, total: Any) -> tuple[Any, Any]:
        a, b = self.size("a"), self.size("b")
        self.equate(total, a + b)
        return a, b

    def factors(self, total: Any) -> tuple[Any, Any]:
        if not self.space.resolve(sym(total)).is_Symbol:
            return 1, total  # a product of sizes has no general factors
        a, b = self.size("g"), self.size("m")
        self.equate(total, a * b)
        return a, b

    def covered(self, out: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Any:
        size = self.size("m")
        reach = sym(size) + 2 * sym(padding) - sym(dilation) * (sym(kernel) - 1) - 1
        self.covers.append((sym(size), reach, sym(stride), sym(out)))
        self._uphold()
        return size

    def _uphold(self) -> None:
        """Restate what windows cover under what has been learned since."""
        for _, reach, stride, out in self.covers:
            difference = self.space.resolve(self.space.divmod(reach, stride)[0] + 1 - out)
            if difference != 0 and not self._solve(difference):
                raise Infeasible(f"{difference} = 0")

    def spread(
        self, out: Any, kernel: Any, stride: Any, padding: Any, dilation: Any
    ) -> tuple[Any, Any]:
        """Input size and output padding of a transposed convolution."""
        size = self.size("m")
        extra: Any = out - ((size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)
        self.spreads.append((sym(out), sym(stride), sym(dilation), sym(extra)))
        return size, extra

    # -- what is equal ------------------------------------------------------------------------

    def equate(self, a: Any, b: Any) -> None:
        a, b = self.space.resolve(sym(a)), self.space.resolve(sym(b))
        first = a if a.is_Symbol else None
        if not self._solve(sp.expand(a - b), first):
            raise Infeasible(f"{a} = {b}")

    def _solve(self, e: Any, first: Any = None) -> bool:
        """Learn that an expression is 0. False if that cannot be, or is not solved here."""
        if e == 0:
            return True
        atoms = sorted(e.atoms(quot) | e.free_symbols, key=_rank)
        for atom in [first, *atoms] if first is not None else atoms:
            slope = e.coeff(atom, 1)
            rest = sp.expand(e - slope * atom)
            if slope not in (1, -1) or rest.has(atom):
                continue
            value = sp.expand(-rest * slope)
            if atom.is_integer and not isinstance(atom, quot):
                slack = 1 - value if atom.is_positive else -value
                if self.space.nonnegative(slack) and slack != 0:
                    # atom is at its least, and so is everything that its value takes away from
                    least = {one: 1 if one.is_positive else 0 for one in slack.free_symbols}
                    if slack.xreplace(least) != 0:
                        return False
                    for one, number in least.items():
                        self.space.learn(one, sp.Integer(number))
            self.space.learn(atom, value)
            self._uphold()
            return True
        return False

    def equal(self, a: Any, b: Any) -> bool:
        difference = sp.expand(a - b)
        if difference == 0:
            return True
        if difference.is_number or difference.is_zero is False:
            return False
        whole = all(one.is_integer for one in difference.free_symbols)
        if whole and (
            self.space.nonnegative(difference - 1) or self.space.nonnegative(-difference - 1)
        ):
            return False
        answer = self._ask(f"{a} = {b}", f"{a} != {b}", lambda: self._solve(difference))
        self.asked.append(("=", a, b, answer))
        return answer

    def less(self, a: Any, b: Any) -> bool:
        difference = sp.expand(b - a)
        if difference.is_number:
            return bool(difference > 0)
        if all(one.is_integer for one in difference.free_symbols):
            if self.space.nonnegative(difference - 1):
                return True
            if self.space.nonnegative(-difference):
                return False
        elif difference.is_positive is not None:
            return bool(difference.is_positive)
        answer = self._ask(f"{a} < {b}", f"{a} >= {b}", lambda: self._positive(a, b))
        self.asked.append(("<", a, b, answer))
        return answer

    def _positive(self, a: Any, b: Any) -> bool:
        if a == 0 and b.is_Symbol:
            self.space.learn(b, sp.Symbol(str(b), real=True, positive=True))
        return True

    def _ask(self, yes: str, no: str, learn: Callable[[], bool]) -> bool:
        if yes not in self._decided:
            answer = self.choose((False, True), yes)
            if answer and not learn():
                raise Infeasible(yes)
            self._decided[yes] = answer
            self.conditions[yes if answer else no] = None
        return self._decided[yes]

    # -- reading values -----------------------------------------------------------------------

    def entry(self, value: Any, at: Index) -> Expr:
        """The entry of a value at an index."""
        if not hasattr(value, "node"):
            return number(sym(value))
        node = find(value.node)
        reader = Reader(self.space, self.entry)
        if node.op == "call_function":
            return entry(node.view, at, reader)
        return element(node.name, at)


def _rank(atom: Any) -> tuple[int, str]:
    """Opaque quotients are solved for first, then the youngest symbols."""
    return (0 if isinstance(atom, quot) else 1, str(atom))
