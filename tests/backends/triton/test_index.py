"""Index arithmetic against the integers themselves."""

from __future__ import annotations

import itertools
import math

import pytest
import sympy
import torch
from hypothesis import given, strategies as st

from graphopt.backends.triton.index import Quotient, Ranges, Remainder, weight
from graphopt.backends.triton.text import index_text

SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def _axes(sizes):
    ranges = Ranges()
    return ranges, tuple(ranges.axis(f"x{k}", sympy.Integer(n)) for k, n in enumerate(sizes))


class _Int(int):
    """An integer of Triton's, which divides toward zero."""

    def __add__(self, other):
        return _Int(int(self) + other)

    def __sub__(self, other):
        return _Int(int(self) - other)

    def __rsub__(self, other):
        return _Int(other - int(self))

    def __mul__(self, other):
        return _Int(int(self) * other)

    def __floordiv__(self, other):
        return _Int(math.trunc(int(self) / int(other)))

    def __mod__(self, other):
        return _Int(math.fmod(int(self), int(other)))

    __radd__, __rmul__ = __add__, __mul__


def _each(sizes, axes, *expressions):
    """The values of expressions, printed as source, at every point."""
    codes = [compile(index_text(one), "index", "eval") for one in expressions]
    for point in itertools.product(*map(range, sizes)):
        names = {str(axis): _Int(value) for axis, value in zip(axes, point, strict=True)}
        yield point, [eval(code, {}, names) for code in codes]


def _factored(total: int, data) -> list[int]:
    """Another shape of so many elements."""
    found = []
    while total > 1:
        part = data.draw(st.sampled_from([d for d in range(2, total + 1) if total % d == 0]))
        found.append(part)
        total //= part
        if data.draw(st.booleans()):
            found.append(1)
    return found


@given(SIZES, st.data())
def test_reshapes_point_at_the_same_element(sizes, data):
    ranges, axes = _axes(sizes)
    shape = tuple(map(sympy.Integer, sizes))
    other = _factored(math.prod(sizes), data)
    theirs = tuple(map(sympy.Integer, other))
    there = ranges.reshaped(axes, shape, theirs)
    position = ranges.flat(there, theirs)
    back = ranges.reshaped(there, theirs, shape)
    for point, found in _each(sizes, axes, position, *there, *back):
        expected = 0
        for one, size in zip(point, sizes, strict=True):
            expected = expected * size + one
        assert found[0] == expected
        index = found[1 : 1 + len(other)]
        assert all(0 <= one < size for one, size in zip(index, other, strict=True))
        assert tuple(found[1 + len(other) :]) == point
    assert weight(position) == 0  # what was split joins again


@given(st.sampled_from([4, 6, 8, 12, 18, 24]), st.data())
def test_views_of_views_point_at_the_same_element(total, data):
    """Axes split, exchanged and merged, several times: channels shuffled, windows, patches."""
    ranges, (flat,) = _axes([total])
    tensor = torch.arange(total)
    shapes: list[tuple[list[int], list[int]]] = []
    for _ in range(data.draw(st.integers(1, 3))):
        cut = _factored(total, data)
        order = data.draw(st.permutations(range(len(cut))))
        shapes += [(cut, order), ([total], [0])][: 1 + data.draw(st.booleans())]
    index, shape = (flat,), (sympy.Integer(total),)
    for cut, order in reversed(shapes):
        there = ranges.reshaped(index, shape, tuple(sympy.Integer(cut[axis]) for axis in order))
        index = tuple(there[order.index(axis)] for axis in range(len(cut)))
        shape = tuple(map(sympy.Integer, cut))
    for cut, order in shapes:
        tensor = tensor.reshape(cut).permute(order)
    position = ranges.flat(index, shape)
    for (point,), (found,) in _each([total], (flat,), position):
        assert found == tensor.flatten()[point]


@given(SIZES, st.data())
def test_one_axis_splits_and_merges(sizes, data):
    """A flat index taken apart, and neighbours put together again."""
    total = math.prod(sizes)
    ranges, (flat,) = _axes([total])
    shape = tuple(map(sympy.Integer, sizes))
    index = ranges.unflat(flat, shape)
    cut = data.draw(st.integers(0, len(sizes) - 1))
    merged = (math.prod(sizes[: cut + 1]), *sizes[cut + 1 :])
    if data.draw(st.booleans()):
        merged = (*sizes[:cut], math.prod(sizes[cut:]))
    there = ranges.reshaped(index, shape, tuple(map(sympy.Integer, merged)))
    for (value,), found in _each([total], (flat,), *there):
        expected, rest = [], value
        for size in reversed(merged):
            expected.append(rest % size)
            rest //= size
        assert found == expected[::-1]


@given(SIZES, st.lists(st.integers(0, 12), min_size=5, max_size=5), st.integers(1, 12))
def test_division_is_division(sizes, factors, d):
    ranges, axes = _axes(sizes)
    e = sum((f * a for f, a in zip(factors, axes, strict=False)), sympy.Integer(factors[-1]))
    quotient = ranges.quotient(e, sympy.Integer(d))
    remainder = ranges.remainder(e, sympy.Integer(d))
    joined = ranges.joined(d * quotient + remainder)
    for _, (value, q, r, whole) in _each(sizes, axes, e, quotient, remainder, joined):
        assert (q, r, whole) == (value // d, value % d, value)


def test_symbolic_sizes_cancel():
    ranges, n = Ranges(), sympy.Symbol("n", integer=True, positive=True)
    four, rest = sympy.Integer(4), sympy.Integer(75)
    index = ranges.axis("i", n), ranges.axis("g", four), ranges.axis("r", rest)
    channels = (n, sympy.Integer(12), sympy.Integer(5), sympy.Integer(5))
    there = ranges.reshaped(index, (n, four, rest), channels)
    assert ranges.reshaped(there, channels, (n, four, rest)) == index
    assert ranges.flat(there, channels) == sympy.expand(index[0] * 300 + index[1] * 75 + index[2])
    assert there[1] == 3 * index[1] + Quotient(index[2], sympy.Integer(25))


@pytest.mark.parametrize(("low", "known"), [("i", True), ("4 - i", True), ("i - 1", False),
                                            ("n*i", True), ("n - 1", True), ("n - 2", False),
                                            ("5*n - i", True), ("n - i", False)])  # fmt: skip
def test_what_is_proved(low, known):
    """i from 0 to 4, n from 1."""
    ranges, n = Ranges(), sympy.Symbol("n", integer=True, positive=True)
    i = ranges.axis("i", sympy.Integer(5))
    assert ranges.nonnegative(sympy.sympify(low, {"i": i, "n": n})) == known


def test_only_provable_divisions_vanish():
    ranges, n = Ranges(), sympy.Symbol("n", integer=True, positive=True)
    i = ranges.axis("i", n)
    assert ranges.remainder(i, sympy.Integer(4)) == Remainder(i, sympy.Integer(4))
    assert ranges.remainder(i, n) == i
    assert ranges.quotient(4 * i + 3, sympy.Integer(4)) == i
