"""Index arithmetic: which element of its operand an element of a view is, in sympy.

Indices are polynomials in loop axes (each from 0 to its size) and in sizes (at least 1, for nothing
is launched for an empty tensor), with two functions more:

    quotient(e, d) = floor(e / d),  remainder(e, d) = e mod d,  0 <= e, d >= 1.

They are simplified where the ranges of the axes prove it, so that axes that a view splits or merges
cancel:

    (d i + j) div d = i,  (d i + j) mod d = j       for 0 <= j < d
    (e div a) div b = e div (a b),  (e mod a b) mod b = e mod b,  (e mod a b) div b = (e div b) mod a
    d (e div d) + (e mod d) = e,    d ((e div d) mod k) + (e mod d) = e mod (d k)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import sympy

Index = tuple[sympy.Expr, ...]


class Quotient(sympy.Function):  # type: ignore[misc]
    """floor(e / d); made by `Ranges.quotient` alone."""

    nargs = 2
    is_integer = True


class Remainder(sympy.Function):  # type: ignore[misc]
    """e mod d; made by `Ranges.remainder` alone."""

    nargs = 2
    is_integer = True


ZERO, ONE = sympy.Integer(0), sympy.Integer(1)


def number(value: Any) -> sympy.Expr:
    """A size of a fake tensor as an expression."""
    return value.node.expr if hasattr(value, "node") else sympy.Integer(value)


def shape_of(tensor: Any) -> Index:
    return tuple(map(number, tensor.shape))


def product(sizes: Sequence[sympy.Expr]) -> sympy.Expr:
    return sympy.expand(sympy.Mul(*sizes))


def equal(a: sympy.Expr, b: sympy.Expr) -> bool:
    return bool(a == b or sympy.expand(a - b) == 0)


def _terms(e: sympy.Expr) -> tuple[sympy.Expr, ...]:
    return sympy.Add.make_args(e)  # type: ignore[no-any-return]


def _divided(term: sympy.Expr, d: sympy.Expr) -> sympy.Expr | None:
    """term / d, if that is a polynomial with whole coefficients."""
    q = term / d if not d.is_Add else sympy.cancel(term / d)
    for factor in sympy.Mul.make_args(q):
        if factor.is_Rational and not factor.is_Integer:
            return None
        if factor.is_Pow and not (factor.exp.is_Integer and factor.exp > 0):
            return None
    return q


def _holds(e: sympy.Expr, part: sympy.Expr) -> bool:
    """Whether every term of `part` is in e, with the same sign and at least as often."""
    there = e.as_coefficients_dict()
    return all(there[rest] / count >= 1 for rest, count in part.as_coefficients_dict().items())


class Ranges:
    """Axes and their sizes, and what follows for expressions in them."""

    def __init__(self) -> None:
        self.size: dict[sympy.Symbol, sympy.Expr] = {}

    def axis(self, name: str, size: sympy.Expr) -> sympy.Expr:
        """A new axis; that of size 1 is 0."""
        if size == 1:
            return ZERO
        symbol = sympy.Symbol(name, integer=True, nonnegative=True)
        assert symbol not in self.size, f"two axes called {name}"
        self.size[symbol] = size
        return symbol

    # -- bounds -------------------------------------------------------------------------------

    def _extreme(self, e: sympy.Expr, upper: bool) -> sympy.Expr | None:
        """A polynomial in sizes that is a bound of e, if one is known."""
        total = ZERO
        for term in _terms(sympy.expand(e)):
            coefficient, rest = term.as_coeff_Mul()
            for base in rest.as_powers_dict():
                if base in self.size or isinstance(base, (Quotient, Remainder)):
                    bound = self._largest(base) if (coefficient > 0) == upper else ZERO
                    if bound is None:
                        return None
                    rest = rest.subs(base, bound) if bound != 0 else ZERO
            total += coefficient * rest
        return sympy.expand(total)

    def least(self, e: sympy.Expr) -> sympy.Expr | None:
        """An expression in sizes alone that e is never below, if one is known."""
        bound = self._extreme(e, False)
        return None if bound is None or bound.free_symbols & set(self.size) else bound

    def _largest(self, atom: sympy.Expr) -> sympy.Expr | None:
        if atom in self.size:
            return self.size[atom] - 1
        e, d = atom.args
        if isinstance(atom, Remainder):
            return d - 1
        top = self._extreme(e, True)
        if top is None:
            return None
        if top.is_Integer and d.is_Integer:
            return top // d
        return _divided(top, d) or _divided(sympy.expand(top - d + 1), d) or top

    def nonnegative(self, e: sympy.Expr) -> bool:
        """Whether e >= 0 is proved, for all axes in range and all sizes from 1."""
        bound = self._extreme(e, False)
        if bound is None:
            return False
        if bound.is_Integer:
            return bool(bound >= 0)
        symbols = bound.free_symbols
        shifted = sympy.expand(bound.subs({one: one + 1 for one in symbols}, simultaneous=True))
        if any(atom not in symbols for atom in shifted.atoms(sympy.Function)):
            return False
        return all(term.as_coeff_Mul()[0] >= 0 for term in _terms(shifted))

    def _below(self, e: sympy.Expr, d: sympy.Expr) -> bool:
        return self.nonnegative(e) and self.nonnegative(d - 1 - e)

    # -- division -----------------------------------------------------------------------------

    def _taken(self, e: sympy.Expr, d: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
        """(q, r) with e = d q + r, as much in q as leaves an r that is not negative: Triton divides
        toward zero."""
        q, r = self._split(e, d)
        return (q, r) if r == 0 or self.nonnegative(r) else (ZERO, sympy.expand(e))

    def _split(self, e: sympy.Expr, d: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
        """(q, r) with e = d q + r, as much in q as the terms show."""
        q, r = ZERO, ZERO
        for term in _terms(sympy.expand(e)):
            part = _divided(term, d)
            if part is None:
                r += term
            else:
                q += part
        return q, r

    def _common(self, e: sympy.Expr, d: sympy.Expr) -> tuple[int, sympy.Expr, sympy.Expr]:
        """(g, a, b) with e = g a + b, g a divisor of d, and 0 <= b < g; g = 1 if there is none."""
        if d.is_Integer:
            terms = [(term.as_coeff_Mul()[0], term) for term in _terms(e)]
            for g in sorted({math.gcd(int(c), int(d)) for c, _ in terms if c.is_Integer})[::-1]:
                a, b = self._split(e, sympy.Integer(g))
                if 1 < g and a != 0 and self._below(b, sympy.Integer(g)):
                    return g, a, b
        return 1, e, ZERO

    def quotient(self, e: sympy.Expr, d: sympy.Expr) -> sympy.Expr:
        """floor(e / d)."""
        q, r = self._taken(e, d)
        if r == 0 or self._below(r, d):
            return q
        g, a, _ = self._common(r, d)
        if g > 1:
            return q + self.quotient(a, d / g)
        if isinstance(r, Quotient):
            return q + self.quotient(r.args[0], r.args[1] * d)
        if isinstance(r, Remainder) and (k := _divided(r.args[1], d)) is not None:
            return q + self.remainder(self.quotient(r.args[0], d), k)
        return q + Quotient(r, d)

    def remainder(self, e: sympy.Expr, d: sympy.Expr) -> sympy.Expr:
        """e mod d."""
        _, r = self._taken(e, d)
        if r == 0 or self._below(r, d):
            return r
        g, a, b = self._common(r, d)
        if g > 1:
            return sympy.expand(g * self.remainder(a, d / g)) + b
        if isinstance(r, Remainder) and _divided(r.args[1], d) is not None:
            return self.remainder(r.args[0], d)
        return Remainder(r, d)

    def joined(self, e: sympy.Expr) -> sympy.Expr:
        """e with every d (a div d) + (a mod d) as a, also if the quotient is taken mod k."""
        e = sympy.expand(e)
        remainders = e.atoms(Remainder)
        for term in _terms(e) if remainders else ():
            for base in term.as_powers_dict():
                if not isinstance(base, Remainder):
                    continue
                a, d = base.args
                factor, over = term / base, self.quotient(a, d)
                tries = [(over, a)] + [
                    (other, Remainder(a, d * other.args[1]))
                    for other in remainders if other.args[0] == over
                ]  # fmt: skip
                for part, result in tries:
                    high = sympy.expand(factor * d * part)
                    if _holds(e, high):
                        whole = sympy.expand(e - term - high + factor * result)
                        if weight(whole) < weight(e):
                            return self.joined(whole)
        return e

    # -- shapes -------------------------------------------------------------------------------

    def flat(self, index: Index, shape: Index) -> sympy.Expr:
        """The position of an element among all, in order of memory if they lie densely."""
        position: sympy.Expr = ZERO
        for one, size in zip(index, shape, strict=True):
            position = position * size + one
        return self.joined(position)

    def unflat(self, position: sympy.Expr, shape: Index) -> Index:
        """The index of the element at a position."""
        found: list[sympy.Expr] = []
        for size in reversed(shape[1:]):
            found.append(self.remainder(position, size))
            position = self.quotient(position, size)
        return tuple(reversed([*found, position])) if shape else ()

    def reshaped(self, index: Index, shape: Index, source: Index) -> Index:
        """Where an element of `shape` lies in `source`, another shape of the same elements."""
        found: list[sympy.Expr] = []
        for mine, theirs in _groups(shape, source):
            sizes, others = shape[mine], source[theirs]
            part = index[mine]
            if len(sizes) == len(others) == 1:
                found += part
            else:
                found += self.unflat(self.flat(part, sizes), others)
        return tuple(found)


def weight(e: sympy.Expr) -> int:
    """How many divisions are in an expression."""
    if not e.has(Quotient, Remainder):
        return 0
    return sum(isinstance(one, (Quotient, Remainder)) for one in sympy.preorder_traversal(e))


def _groups(a: Index, b: Index) -> list[tuple[slice, slice]]:
    """Ranges of axes of two shapes that hold the same elements, as short as can be."""
    found = []
    i = j = start_a = start_b = 0
    size_a = size_b = ONE
    while i < len(a) or j < len(b):
        if i < len(a) and (j >= len(b) or i == start_a or not _more(size_a, size_b)):
            size_a = sympy.expand(size_a * a[i])
            i += 1
        else:
            size_b = sympy.expand(size_b * b[j])
            j += 1
        if j > start_b and i > start_a and equal(size_a, size_b):
            if i == len(a) or j == len(b):  # axes of size 1 that are left
                if all(one == 1 for one in (*a[i:], *b[j:])):
                    i, j = len(a), len(b)
            found.append((slice(start_a, i), slice(start_b, j)))
            start_a, start_b, size_a, size_b = i, j, ONE, ONE
    if start_a < len(a) or start_b < len(b):
        found.append((slice(start_a, len(a)), slice(start_b, len(b))))
    return found


def _more(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether a covers more elements than b, as far as can be told from divisibility."""
    return _divided(a, b) is not None and not equal(a, b)
