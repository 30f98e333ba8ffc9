"""Every entry of the table of pointwise ops against torch, in every dtype it takes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from graphopt.backends.triton import scalars
from tests.backends.triton.helpers import BOUND, compiled, lifted, program, values
from tests.helpers import relative_error

SHAPE = (3, 7)
FLOATS = (torch.float32, torch.float64, torch.bfloat16)
UNARY = [
    torch.neg, torch.abs, torch.square, torch.exp, torch.exp2, torch.expm1, torch.sin, torch.cos,
    torch.erf, torch.tanh, torch.sigmoid, torch.relu, F.silu, F.gelu, F.mish, F.elu, F.selu,
    F.softplus, F.hardtanh, F.relu6, F.hardsigmoid, F.hardswish, F.leaky_relu, torch.floor,
    torch.ceil, torch.round, torch.trunc, torch.sign, torch.reciprocal,
    lambda x: F.gelu(x, approximate="tanh"),
    lambda x: F.softplus(x, 2.0, 3.0),
    lambda x: F.elu(x, 0.7),
    lambda x: x.clamp(-0.5, 0.7),
    lambda x: x.clamp(max=0.1),
    lambda x: x.clamp(min=0.1),
    lambda x: x**2, lambda x: x**3, lambda x: x**4,
    lambda x: 3 - x, lambda x: x / 3, lambda x: 2.5 / x,
    lambda x: torch.sub(x, 2, alpha=0.3),
    lambda x: torch.rsub(x, 2, alpha=0.3),
    lambda x: x.masked_fill(x > 0, 0.1),
    lambda x: torch.where(x < 0, 0.3, x),
    lambda x: x + torch.arange(7),
    lambda x: x.to(torch.float16).to(x.dtype) * 3,
    lambda x: torch.isnan(x / x),
    lambda x: (x > 0).float(),
    lambda x: (x * 3).to(torch.int32),
]  # fmt: skip
POSITIVE = [torch.log, torch.log2, torch.sqrt, torch.rsqrt, torch.log1p, lambda x: x**0.5,
            lambda x: x**-0.5, lambda x: x**-1]  # fmt: skip
BINARY = [
    torch.add, torch.sub, torch.mul, torch.div, torch.maximum, torch.minimum,
    lambda a, b: torch.add(a, b, alpha=0.5),
    lambda a, b: torch.where(a > b, a, b),
    lambda a, b: torch.clamp(a, min=b),
    lambda a, b: (a == b) | (a != b) & (a <= b) ^ (a >= b),
    lambda a, b: torch.logical_and(a > 0, b > 0),
    lambda a, b: torch.logical_or(a > 0, torch.logical_xor(b > 0, a < b)),
    lambda a, b: torch.logical_not(torch.clamp_min(a, 0.5)) & (torch.clamp_max(b, 0.5) < 0),
    lambda a, b: torch.addcmul(a, a, b, value=0.3),
    lambda a, b: torch.lerp(a, b, 0.3),
]  # fmt: skip
WHOLE = [
    torch.add, torch.mul, torch.sub, torch.maximum, torch.div,
    lambda a, b: torch.div(a, b.abs() + 1, rounding_mode="floor"),
    lambda a, b: torch.div(a, -b.abs() - 1, rounding_mode="trunc"),
    lambda a, b: a % (b.abs() + 2),
    lambda a, b: a % -(b.abs() + 2),
    lambda a, b: torch.fmod(a, b.abs() + 2),
    lambda a, b: (a & b) | (a ^ 5),
    lambda a, b: ~a + (b == 0),
    lambda a, b: torch.where(a > b, a, 1.5),
    lambda a, b: a.clamp(-2, 2),
]  # fmt: skip


def _check(functions, dtype, *inputs):
    """One module with an output per function; errors are against float64."""

    def every(*given):
        return tuple(function(*given) for function in functions)

    fast = compiled(every, *inputs)
    with torch.no_grad():
        found, same, truth = fast(*inputs), every(*inputs), lifted(every, *inputs)
    done = program(fast)
    assert done.coverage[0] == done.coverage[1] > 0, done.outside
    for function, a, b, c in zip(functions, found, truth, same, strict=True):
        assert a.dtype == c.dtype, function
        if a.dtype != torch.bool and not a.dtype.is_floating_point:
            b = c  # rounding before a cast to integers is torch's
        limit = max(BOUND.get(dtype, 1e-6), BOUND.get(a.dtype, 0.0))
        error = relative_error(a.double(), b.double())
        assert error <= limit, f"{function}: {error:.1e}"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_unary(dtype):
    _check(UNARY, dtype, values(SHAPE, dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_of_positive_numbers(dtype):
    _check(POSITIVE, dtype, values(SHAPE, dtype).abs() + 0.1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_binary(dtype):
    _check(BINARY, dtype, values(SHAPE, dtype), values(SHAPE, dtype, 1))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_integers(dtype):
    _check(WHOLE, dtype, values(SHAPE, dtype), values(SHAPE, dtype, 1))


def test_every_entry_is_tested():
    """The functions above reach the whole table."""
    reached = set()
    for functions, inputs in (([*UNARY, *POSITIVE], [torch.ones(7)]),
                              (BINARY, [torch.ones(7)] * 2),
                              (WHOLE, [torch.ones(7, dtype=torch.long)] * 2)):  # fmt: skip

        def every(*given, functions=functions):
            return tuple(function(*given) for function in functions)

        done = compiled(every, *inputs).program(inputs)
        reached |= {node.target for region in done.regions for node in region.nodes}
    names = {target._schema.name for target in reached}
    assert {op._schema.name for op in scalars.TABLE} - names == set()
