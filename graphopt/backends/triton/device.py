"""Functions that generated kernels call: what Triton lacks, or means differently from torch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expm1(x):  # type: ignore[no-untyped-def, untyped-decorator]
    """exp(x) - 1 without cancellation, after Kahan: the error of exp cancels in the quotient."""
    u = tl.exp(x)
    safe = tl.where((u == 1.0) | (u < 1e-10) | (x > 80.0), 2.0, u)
    small = (u - 1.0) * x / tl.log(safe)
    return tl.where(u == 1.0, x, tl.where((u < 1e-10) | (x > 80.0), u - 1.0, small))


@triton.jit
def log1p(x):  # type: ignore[no-untyped-def, untyped-decorator]
    """log(1 + x) without cancellation, after Kahan."""
    u = 1.0 + x
    plain = (u == 1.0) | (u - 1.0 == u)  # tiny, or infinite
    return tl.where(
        u == 1.0, x, tl.log(u) * tl.where(plain, 1.0, x / tl.where(plain, 1.0, u - 1.0))
    )


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def, untyped-decorator]
    """-e / (e + 2) with e = exp(-2 |x|) - 1, with the sign of x."""
    e = expm1(-2.0 * tl.abs(x))
    size = -e / (e + 2.0)
    return tl.where(x < 0, -size, size)


@triton.jit
def at_most(x, limit):  # type: ignore[no-untyped-def, untyped-decorator]
    """The smaller one; nan stays."""
    return tl.where(x > limit, limit, x)


@triton.jit
def round(x):  # type: ignore[no-untyped-def, untyped-decorator]
    """To the nearest integer, halves to the even one."""
    low = tl.floor(x)
    part = x - low
    even = tl.floor(low * 0.5) == low * 0.5
    up = (part > 0.5) | ((part == 0.5) & (even == False))  # noqa: E712
    return tl.where(up, low + 1.0, low)


@triton.jit
def trunc(x):  # type: ignore[no-untyped-def, untyped-decorator]
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))


@triton.jit
def sign(x):  # type: ignore[no-untyped-def, untyped-decorator]
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0)).to(x.dtype)


@triton.jit
def floor_divide(a, b):  # type: ignore[no-untyped-def, untyped-decorator]
    """Of integers, toward minus infinity; Triton's own sign divides toward zero."""
    q = a // b
    return tl.where((a % b != 0) & ((a < 0) != (b < 0)), q - 1, q)


@triton.jit
def remainder(a, b):  # type: ignore[no-untyped-def, untyped-decorator]
    """Of integers, with the sign of the divisor."""
    r = a % b
    return tl.where((r != 0) & ((r < 0) != (b < 0)), r + b, r)


@triton.jit
def row_max(x, axis: tl.constexpr):  # type: ignore[no-untyped-def, untyped-decorator]
    """The largest value, or nan if there is one; tl.max passes over it."""
    odd = tl.max((x != x).to(tl.int32), axis, keep_dims=True)
    return tl.where(odd > 0, float("nan"), tl.max(x, axis, keep_dims=True))


@triton.jit
def row_min(x, axis: tl.constexpr):  # type: ignore[no-untyped-def, untyped-decorator]
    """The smallest value, or nan if there is one."""
    odd = tl.max((x != x).to(tl.int32), axis, keep_dims=True)
    return tl.where(odd > 0, float("nan"), tl.min(x, axis, keep_dims=True))
