"""The algebra of proofs: no step changes the value of an expression.

Random expressions over symbolic sizes are evaluated by brute force with numbers for the sizes,
before and after. Tensors are infinite here: what is read outside of one has a value too, and only
an indicator may take it away.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import sympy as sp
from hypothesis import HealthCheck, assume, given, settings, strategies as st

from graphopt.verify.proof import notation
from graphopt.verify.proof.algebra import (
    Call,
    Delta,
    Element,
    Expr,
    Inside,
    Space,
    element,
    factor,
    number,
    quot,
    rem,
)
from tests.verify.test_notation import Numbers, beyond, torch_function

fuzz = settings(
    max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True,
    database=None,
)  # fmt: skip

N, M, K = (sp.Symbol(name, integer=True, positive=True) for name in "NMK")
A0 = sp.Symbol("A0", integer=True, nonnegative=True)
C = sp.Symbol("c", real=True)
P = sp.Symbol("p", real=True, positive=True)
SIZES = (N, M, K, sp.Integer(1), sp.Integer(2), sp.Integer(3), N * M, 2 * N, N + M, M * K)


class World:
    """A space, the numbers that its symbols stand for, and random expressions."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.space = Space()
        self.numbers: dict[Any, Any] = {one: draw(st.integers(1, 3)) for one in (N, M, K)}
        self.numbers[A0] = draw(st.integers(0, 2))
        self.numbers[C] = draw(st.sampled_from([-1.5, 0.7, 2.0]))
        self.numbers[P] = draw(st.sampled_from([0.4, 1.0, 2.5]))
        self.space.positive.add("pos")
        self.values = Numbers(self.space, self.read, torch_function, self.numbers)
        self.free = tuple(self.space.named(name, self.pick(SIZES)) for name in "ij")

    # -- numbers ------------------------------------------------------------------------------

    def read(self, name: str, at: tuple[Any, ...]) -> Any:
        found = beyond(name, at)
        if name.startswith("S:"):  # weights of an average over the last index
            size = int(name[2:].partition("@")[0])
            rows = [beyond(name, (*at[:-1], np.asarray(j))) for j in range(size)]
            return np.where(
                (np.asarray(at[-1]) >= 0) & (np.asarray(at[-1]) < size), found / sum(rows), found
            )
        return found if name.startswith("pos") else found - 1.2

    def size(self, e: Any) -> int:
        return int(self.values.index(e, {}))

    def value(self, expr: Expr, at: tuple[Any, ...] | None = None) -> np.ndarray:
        return self.values.over(self.free if at is None else at, expr)

    # -- drawing ------------------------------------------------------------------------------

    def pick(self, options: Any) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def int(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def affine(self, pool: tuple[Any, ...]) -> Any:
        """An index: a polynomial in the indices of the pool."""
        e = sp.Integer(self.pick((0, 0, 0, 1, -1, 2)))
        for v in self.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=2, unique=True)):
            e = e + self.pick((1, 1, 1, 1, -1, 2, N, M, K)) * v
        return sp.expand(e - self.pick((0, 0, 0, 0, A0, N, 1 - N)))

    def reading(self, pool: tuple[Any, ...]) -> Any:
        """An index, perhaps the digits of one."""
        kind = self.pick(("plain", "plain", "affine", "affine", "high", "low", "again"))
        if kind == "plain":
            return self.pick(pool)
        if kind == "affine":
            return self.affine(pool)
        if kind == "again":  # from one shape to another
            shape = [self.pick(SIZES[:6]) for _ in range(2)]
            v = self.pick(pool)
            linear = notation.ravel((v, self.pick(pool)), (sp.Integer(1), shape[0]))
            return notation.unravel(self.space, linear, (sp.Integer(1), shape[1]))[self.int(0, 1)]
        e = self.pick(pool) if self.pick((True, False)) else self.affine(pool)
        return self.space.divmod(e, self.pick((N, M, K, 2, 3, M * K)))[kind == "low"]

    def atom(self, pool: tuple[Any, ...], positive: bool = False) -> Expr:
        name = self.pick(("pos", "pos2")) if positive else self.pick(("x", "y", "pos"))
        return element(name, [self.reading(pool) for _ in range(self.int(0, 2))])

    def expr(self, pool: tuple[Any, ...], depth: int) -> Expr:
        s = self.space
        if depth == 0:
            return self.atom(pool)
        kind = self.pick((
            "atom", "sum", "sum", "product", "add", "scaled", "inside", "delta", "masked", "masked",
            "sure", "window", "power", "call", "mean", "homogeneous", "mask", "weights",
        ))  # fmt: skip
        if kind == "atom":
            return self.atom(pool)
        if kind in ("sum", "mean"):
            size = self.pick(SIZES[:7])
            v = s.index(size, self.pick(("j", "u", "c")))
            body = s.sum((v,), self.expr((*pool, v), depth - 1))
            return body * (1 / size) if kind == "mean" else body
        if kind == "product":
            return s.product(self.expr(pool, depth - 1), self.expr(pool, depth - 1))
        if kind == "add":
            left, right = self.expr(pool, depth - 1), self.expr(pool, depth - 1)
            return left + right if self.pick((True, False)) else left - right
        if kind == "scaled":
            return self.expr(pool, depth - 1) * self.pick(
                (2, -1, sp.Rational(1, 3), C, P, 1 / P, N)
            )
        if kind in ("inside", "delta"):
            e = self.reading(pool)
            mask = (
                Inside(e, self.pick(SIZES)) if kind == "inside" else Delta(e - self.reading(pool))
            )
            return s.product(factor(mask), self.expr(pool, depth - 1))
        if kind in ("masked", "sure"):
            return self.masked(pool, depth, kind == "sure")
        if kind == "window":
            return self.window(pool, depth)
        if kind == "power":
            base = self.pick((
                lambda: self.atom(pool, True),
                lambda: self.atom(pool, True) + self.atom(pool, True),
                lambda: s.product(self.atom(pool, True), self.atom(pool, True)) * P,
                lambda: self.total(pool),
            ))()  # fmt: skip
            exponent = self.pick((-1, 2, -2, sp.Rational(1, 2), sp.Rational(-1, 2)))
            power = s.power(base, exponent)
            if self.pick((True, False)):
                power = s.product(power, base)
            return s.product(power, self.expr(pool, depth - 1))
        if kind == "weights":
            size = self.pick(SIZES[:7])
            v = s.index(size, "j")
            at = (self.pick(pool), self.pick((v, v, v + self.reading(pool))))
            weights = element(f"S:{self.size(size)}@{size}", at, stochastic=True)
            body = self.pick((lambda: number(1), lambda: self.expr((*pool, v), depth - 1)))()
            return s.sum((v,), s.product(weights, body))
        inner = self.expr(pool, depth - 1)
        if kind == "mask":
            return s.call(self.pick(("lt", "ge")), (), (inner, number(0)), idempotent=True)
        if kind == "call":
            return s.call(self.pick(("tanh", "exp", "sigmoid")), (), (inner * sp.Rational(1, 5),))
        shared = self.pick((number(1), number(P), number(C), self.atom(pool, True),
                            s.power(self.atom(pool, True) + number(P), sp.Rational(-1, 2)),
                            factor(Inside(self.pick(pool), N)), self.atom(pool)))  # fmt: skip
        inner = s.product(shared, inner)
        name = self.pick(("relu", "abs", "leakyrelu"))
        parameters = (sp.Rational(1, 5),) if name == "leakyrelu" else ()
        return s.call(name, parameters, (inner,), homogeneous=True)

    def total(self, pool: tuple[Any, ...]) -> Expr:
        """A positive sum over an index."""
        v = self.space.index(self.pick(SIZES[:7]), "j")
        return self.space.sum((v,), self.atom((*pool, v), True))

    def masked_read(self, body: Any, e: Any, size: Any, sure: tuple[int, ...] = ()) -> Expr:
        reader = notation.Reader(self.space, lambda value, at: body(at))
        return reader.masked(None, (e,), {0: size}, sure)  # type: ignore[arg-type]

    def masked(self, pool: tuple[Any, ...], depth: int, sure: bool) -> Expr:
        """A read behind zero padding; where it is `sure` to be inside, the size is large enough."""
        e = self.reading(pool)
        size = self.pick(SIZES)
        if sure:
            e = self.pick(pool) * self.pick((1, 2, N, M)) + self.pick(pool)
            least = self.bound(e)
            size = sp.Symbol(f"H{len(self.numbers)}", integer=True, positive=True)
            self.numbers[size] = least + 1 + self.int(0, 1)
        body = lambda at: self.expr((*pool, *at), depth - 1)  # noqa: E731
        return self.masked_read(body, e, size, (0,) if sure else ())

    def bound(self, e: Any) -> int:
        """The largest value of an index with nonnegative coefficients."""
        slack = {
            v: self.size(self.space.range[v]) - 1 for v in e.free_symbols & self.space.range.keys()
        }
        return int(
            self.values.index(
                sp.expand(e).xreplace({v: sp.Integer(n) for v, n in slack.items()}), {}
            )
        )

    def window(self, pool: tuple[Any, ...], depth: int) -> Expr:
        """A convolution along one axis, plain or transposed."""
        s, (k,) = self.space, (self.space.index(self.pick((K, 2, 3)), "k"),)
        stride, dilation = self.pick((1, 2, M)), self.pick((1, 1, 2))
        if self.pick((True, False)):
            e = stride * self.pick(pool) + dilation * k - self.pick((0, 1, A0))
            body = lambda at: self.expr((*pool, *at), depth - 1)  # noqa: E731
            read = self.masked_read(body, e, self.pick(SIZES))
            return s.sum((k,), s.product(element("w", (k,)), read))
        p = s.index(self.pick(SIZES[:7]), "p")
        mask = factor(Delta(self.pick(pool) + self.pick((0, 1, A0)) - stride * p - dilation * k))
        return s.sum((p, k), s.product(mask, element("w", (k,)), self.expr((*pool, p), depth - 1)))


def assert_same(found: np.ndarray, truth: np.ndarray, what: str) -> None:
    assume(np.isfinite(truth).all())
    scale = 1 + np.abs(truth).max(initial=0)
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-9 * scale, err_msg=what)


# -- soundness -----------------------------------------------------------------------------------


@settings(fuzz, max_examples=500)
@given(data=st.data())
def test_the_normal_form_has_the_same_value(data):
    world = World(data.draw)
    expr = world.expr(world.free, 3)
    assume(len(expr.terms) <= 12 and max((len(t.bound) for t in expr.terms), default=0) <= 5)
    normal = world.space.normal(expr)
    truth = world.value(expr)
    assert_same(world.value(normal), truth, f"{world.numbers}\n{expr}\nbecame\n{normal}")


def mutated(world: World, expr: Expr) -> Expr:
    """Nearly the same expression: a coefficient, a range, an index or a mask is another."""
    kinds = ("coefficient", "range", "swap", "shift", "drop", "exponent", "none")
    kind, terms = world.pick(kinds), list(expr.terms)
    if any(getattr(f, "sure", None) is not None for t in terms for f, _ in t.factors):
        kind = "coefficient"  # any other change may break what is sure
    stochastic = any(getattr(f, "stochastic", False) for t in terms for f, _ in t.factors)
    if kind == "range" and stochastic:
        kind = "shift"  # weights over another range: see the attacks
    if not terms or kind == "none":
        return Expr(tuple(reversed(terms)))
    at = world.int(0, len(terms) - 1)
    term, factors = terms[at], list(terms[at].factors)
    place = world.int(0, max(len(factors) - 1, 0))
    changed = {}
    if kind == "coefficient":
        changed = {"coefficient": term.coefficient * world.pick((-1, 2, P, 1))}
    elif kind == "range" and term.bound:
        v = term.bound[0]
        twin = world.space.index(world.pick(SIZES[:7]), "t")
        swap = lambda e: sp.sympify(e).xreplace({v: twin})  # noqa: E731
        changed = {"bound": (twin, *term.bound[1:]),
                   "factors": tuple((f.map(world.space, swap), e) for f, e in factors)}  # fmt: skip
    elif kind == "drop" and factors:
        changed = {"factors": tuple(factors[:place] + factors[place + 1 :])}
    elif kind == "exponent" and factors and not factors[place][0].idempotent:
        one, exponent = factors[place]
        changed = {"factors": (*factors[:place], (one, -exponent), *factors[place + 1 :])}
    elif kind in ("swap", "shift") and factors:
        i, j = world.free
        swap = {i: j, j: i} if kind == "swap" else {i: i + 1}
        one, exponent = factors[place]
        one = one.map(world.space, lambda e: sp.sympify(e).xreplace(swap))
        changed = {"factors": (*factors[:place], (one, exponent), *factors[place + 1 :])}
    terms[at] = dataclasses.replace(term, **changed)
    return Expr(tuple(terms))


@settings(fuzz, max_examples=400)
@given(data=st.data())
def test_an_empty_difference_means_equal_values(data):
    """The soundness of the prover."""
    world = World(data.draw)
    left = world.expr(world.free, 2)
    assume(len(left.terms) <= 8 and max((len(t.bound) for t in left.terms), default=0) <= 4)
    right = mutated(world, left)
    if not world.space.difference(left, right).terms:
        truth = world.value(left)
        assume(np.isfinite(truth).all())
        assert_same(world.value(right), truth, f"{world.numbers}\n{left}\nvs\n{right}")


@fuzz
@given(data=st.data())
def test_what_is_learned_holds_where_it_was_learned(data):
    """After `learn(N, e)` the normal form has the same value at numbers that satisfy it."""
    world = World(data.draw)
    value = world.pick((sp.Integer(1), sp.Integer(2), 2 * M, M * K, M + K))
    expr = world.expr(world.free, 2)
    assume(len(expr.terms) <= 8 and max((len(t.bound) for t in expr.terms), default=0) <= 4)
    world.numbers[N] = world.size(value)
    # Sizes of sure reads were drawn for another N.
    assume(not any(str(one).startswith("H") for one in world.numbers))
    assume(
        not any(isinstance(f, Element) and f.stochastic for t in expr.terms for f, _ in t.factors)
    )
    world.space.learn(N, value)
    assert_same(world.value(world.space.normal(expr)), world.value(expr), str(expr))


# -- digits --------------------------------------------------------------------------------------


@settings(fuzz, max_examples=400)
@given(data=st.data())
def test_divmod_is_that_of_integers(data):
    world = World(data.draw)
    e = world.affine(world.free)
    for _ in range(world.int(0, 1)):
        e = sp.expand(e * world.pick((1, 2, M)) + world.pick(world.free))
    b = world.pick((*SIZES, 2 * N * M, N * M * K))
    truth = np.divmod(over(world, e), world.size(b))
    found = world.space.divmod(e, b)
    for ours, theirs in zip(found, truth, strict=True):
        np.testing.assert_array_equal(over(world, ours), theirs, f"divmod({e}, {b}) = {found}")
    again = world.space.divmod(e, b)
    assert [world.space.resolve(sp.expand(x - y)) for x, y in zip(found, again, strict=True)] == [
        0,
        0,
    ]


def over(world: World, e: Any) -> np.ndarray:
    """The values of an index at all values of the free indices."""
    numbers = Numbers(
        world.space, lambda name, at: np.asarray(at[0], float), torch_function, world.numbers
    )
    return numbers.over(world.free, element("index", (e,))).astype(int)


@settings(fuzz, max_examples=400)
@given(data=st.data())
def test_what_is_said_to_be_inside_is_inside(data):
    world = World(data.draw)
    e, size = world.affine(world.free), world.pick((*SIZES, N * M + K, 2 * N - 1, A0 + 1))
    values = over(world, e)
    if world.space.nonnegative(e):
        assert values.min(initial=0) >= 0, e
    if world.space.inside(e, size):
        assert values.min(initial=0) >= 0 and (values < world.size(size)).all(), (e, size)


@settings(fuzz, max_examples=60)
@given(data=st.data())
def test_ravel_and_unravel_are_inverse(data):
    world = World(data.draw)
    shape = tuple(world.pick(SIZES[:6]) for _ in range(world.int(1, 3)))
    at = tuple(world.space.named(f"r{axis}", size) for axis, size in enumerate(shape))
    found = notation.unravel(world.space, notation.ravel(at, shape), shape)
    assert [world.space.resolve(a - b) for a, b in zip(found, at, strict=True)] == [0] * len(at)


# -- the normal form is one ----------------------------------------------------------------------


@fuzz
@given(data=st.data())
def test_the_order_of_terms_and_factors_and_the_names_of_bound_indices_do_not_matter(data):
    world = World(data.draw)
    s, expr = world.space, world.expr(world.free, 2)
    assume(len(expr.terms) <= 8 and max((len(t.bound) for t in expr.terms), default=0) <= 4)
    shuffled = Expr(tuple(
        dataclasses.replace(
            s.fresh(term), factors=tuple(data.draw(st.permutations(s.fresh(term).factors)))
        ) if not term.bound else s.fresh(term)
        for term in data.draw(st.permutations(expr.terms))
    ))  # fmt: skip
    assert str(s.normal(shuffled)) == str(s.normal(expr))
    assert not s.difference(expr, shuffled).terms


@fuzz
@given(data=st.data())
def test_products_distribute(data):
    world = World(data.draw)
    s = world.space
    a, b, c = (world.expr(world.free, 1) for _ in range(3))
    assume(all(len(t.bound) <= 2 for one in (a, b, c) for t in one.terms))
    assert not s.difference(s.product(a, b + c), s.product(a, b) + s.product(a, c)).terms
    assert not s.difference(s.product(a, b), s.product(b, a)).terms
    assert not s.difference(a - a, Expr()).terms


def test_a_delta_outside_of_the_range_leaves_an_indicator():
    s = Space()
    (i,) = (s.named("i", N),)
    u = s.index(M, "u")
    expr = s.normal(s.sum((u,), s.product(factor(Delta(i - 1 - u)), element("x", (u,)))))
    assert str(expr) in ("[0 <= i - 1 < M] x[i - 1]", "x[i - 1] [0 <= i - 1 < M]")


def test_a_delta_inside_of_the_range_leaves_none():
    s = Space()
    i, u = s.named("i", N), s.index(N + 1, "u")
    expr = s.sum((u,), s.product(factor(Delta(i + 1 - u)), element("x", (u,))))
    assert str(s.normal(expr)) == "x[i + 1]"


# -- attacks -------------------------------------------------------------------------------------


def test_a_sum_over_another_range_is_not_cancelled():
    """sum_{j < N} a[j] / sum_{j < M} a[j] is not 1."""
    s = Space()
    j, k = s.index(N, "j"), s.index(M, "k")
    whole = s.power(s.sum((k,), element("a", (k,))), -1)
    assert s.difference(s.product(s.sum((j,), element("a", (j,))), whole), number(1)).terms
    same = s.index(M, "j")
    assert not s.difference(
        s.product(s.sum((same,), element("a", (same,))), whole), number(1)
    ).terms


def test_weights_add_up_to_one_over_their_whole_range_alone():
    s = Space()
    p = s.named("i", K)

    def total(size: Any) -> Expr:
        j = s.index(size, "j")
        return s.sum((j,), element("S:N", (p, j), stochastic=N))

    part = s.index(N, "z")
    eye = s.index(N + M, "j")
    # rows of an average of the columns of an identity [N, N + M], added up over the N rows
    weights = element("S:N+M", (p, eye), stochastic=N + M)
    rows = s.sum((part,), s.sum((eye,), s.product(factor(Delta(part - eye)), weights)))
    assert s.difference(rows, number(1)).terms
    assert not s.difference(total(N), number(1)).terms


def test_weights_of_the_same_index_twice_do_not_add_up_to_one():
    s = Space()
    j = s.index(N, "j")
    assert s.difference(s.sum((j,), element("S", (j, j), stochastic=N)), number(1)).terms


@pytest.mark.parametrize("one", [
    Delta(sp.Symbol("i", integer=True) - sp.Symbol("j", integer=True)),
    Inside(sp.Symbol("i", integer=True) - 1, N),
    Call("lt", (), (element("x", ()), element("y", ())), True),
], ids=["delta", "inside", "comparison"])  # fmt: skip
def test_one_over_an_indicator_is_not_the_indicator(one):
    """1 / 0 is not 0."""
    s = Space()
    s.named("i", N), s.named("j", N)
    assert s.difference(s.power(factor(one), -1), factor(one)).terms


@pytest.mark.parametrize("base", [element("x", ()), number(C)], ids=["element", "number"])
def test_x_over_x_is_one_on_a_condition(base):
    """... that x is not 0, which the proof must say."""
    s = Space()
    rest = s.difference(s.product(base, s.power(base, -1)), number(1))
    assert rest.terms or any("!= 0" in law for law in s.laws)


def test_the_square_of_a_root_is_the_number_on_a_condition():
    """sqrt(x)^2 = x for x >= 0 alone: the root of the others is not a number."""
    s = Space()
    root = s.power(element("x", ()), sp.Rational(1, 2))
    rest = s.difference(s.product(root, root), element("x", ()))
    assert rest.terms or s.laws


@pytest.mark.parametrize("exponent", [2, 4, sp.Rational(1, 2)])
def test_the_root_of_a_square_is_not_the_number(exponent):
    s = Space()
    x = element("x", ())
    power = s.power(s.power(x, exponent), 1 / sp.sympify(exponent))
    assert s.difference(power, x).terms or s.laws


def test_roots_of_products_are_not_products_of_roots():
    """sqrt(x y) of two negative numbers is a number."""
    s, half = Space(), sp.Rational(1, 2)
    x, y = element("x", ()), element("y", ())
    assert s.difference(
        s.power(s.product(x, y), half), s.product(s.power(x, half), s.power(y, half))
    ).terms


@pytest.mark.parametrize("scale", [number(-2), number(C), number(-P), element("x", (0,))],
                         ids=["-2", "c", "-p", "x"])  # fmt: skip
def test_numbers_that_may_be_negative_do_not_leave_a_homogeneous_function(scale):
    s = Space()
    x = element("x", (sp.Integer(1),))
    inside = s.call("relu", (), (s.product(scale, x),), homogeneous=True)
    outside = s.product(scale, s.call("relu", (), (x,), homogeneous=True))
    assert s.difference(inside, outside).terms


@pytest.mark.parametrize("scale", [number(2), number(P), number(P / 3)], ids=["2", "p", "p/3"])
def test_positive_numbers_leave_a_homogeneous_function(scale):
    s = Space()
    x = element("x", ())
    inside = s.call("relu", (), (s.product(scale, x),), homogeneous=True)
    outside = s.product(scale, s.call("relu", (), (x,), homogeneous=True))
    assert not s.difference(inside, outside).terms
    assert "relu(c x) = c relu(x) for c > 0" in s.laws


def test_a_power_of_a_sum_is_not_the_sum_of_powers():
    s = Space()
    j = s.index(N, "j")
    k = s.index(N, "k")
    left = s.power(s.sum((j,), element("x", (j,))), 2)
    right = s.sum((k,), s.power(element("x", (k,)), 2))
    assert s.difference(left, right).terms


def test_an_index_bound_outside_is_not_one_bound_inside():
    """sum_j f(sum_k x[j] y[k]) is not sum_j f(sum_k x[k] y[k]) or sum_j f(sum_k x[k] y[j])."""
    s = Space()

    def nested(a: int, b: int) -> Expr:
        at = (s.index(N, "j"), s.index(N, "k"))
        body = s.product(element("x", (at[a],)), element("y", (at[b],)))
        return s.sum(at[:1], s.call("f", (), (s.sum(at[1:], body),)))

    forms = {str(s.normal(nested(a, b))) for a, b in itertools.product((0, 1), repeat=2)}
    assert len(forms) == 4
    assert not s.difference(nested(0, 1), nested(0, 1)).terms


def test_an_empty_range_is_an_empty_sum():
    """A size may be 0 where it is an amount of padding."""
    s = Space()
    j = s.index(A0, "j")
    total = s.normal(s.sum((j,), number(1)))
    assert not s.difference(total, number(A0)).terms
    assert s.difference(total, number(1)).terms


def test_floors_of_unknown_quotients_stay():
    s = Space()
    q, r = s.divmod(N, K)
    assert (q, r) == (quot(N, K), rem(N, K))
    assert s.divmod(N * K + M, K)[0] - N == s.divmod(M, K)[0]
    s.learn(N, 2 * K)
    assert (s.resolve(q), s.resolve(r)) == (2, 0)
