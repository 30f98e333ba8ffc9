"""Attention without softmax: maps, products, and normalizer in one pass, in the cheaper order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor

from graphopt.backends.triton.families import linear_attention
from graphopt.backends.triton.families.attention_kernels import order
from tests.backends.triton.family_helpers import PHASES, Matched, assert_right, matched

Function = Callable[..., Tensor]
MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu + eps": lambda x: F.relu(x) + 0.1,
    "elu + 1": lambda x: F.elu(x) + 1,
    "exp": lambda x: torch.exp(x * 0.5),
    "square": lambda x: (x * 0.5).square(),
    "none": lambda x: x,
}


def summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SLAB: q (k^T v), with the inverse of the sum."""
    z = 1 / (q @ k.sum(-2, keepdim=True).transpose(-2, -1) + 0.5)
    return (q @ (k.transpose(-2, -1) @ v)) * z


def averaged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    den = (q * k.mean(-2).unsqueeze(-2)).sum(-1, keepdim=True)
    return (q @ (k.mT @ v * 0.1)) / den.clamp_min(0.5)


def weighted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = q @ k.mT
    return weights @ v / (weights.sum(-1, keepdim=True) + 0.5)


def divided_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = q @ k.transpose(-1, -2)
    return (weights / (weights.sum(dim=-1, keepdim=True) + 0.5)) @ v


def unnormalized(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q @ (k.mT @ v / 8)


FORMS = (summed, averaged, weighted, divided_first, unnormalized)


def region(one: Matched) -> linear_attention.LinearAttention:
    assert not one.reasons
    (found,) = one.found.regions
    assert isinstance(found, linear_attention.LinearAttention)
    return found


@settings(max_examples=12, phases=PHASES)
@given(st.sampled_from(FORMS), st.sampled_from(sorted(MAPS)), st.data())
def test_every_form_and_map_is_one_region(form: Function, name: str, data: Any):
    phi = MAPS[name]
    m, n = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    d, c = data.draw(st.integers(2, 20)), data.draw(st.integers(2, 20))
    batch = data.draw(st.sampled_from(((2,), (2, 3), (1, 1))))
    dtype = data.draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16)))

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return form(phi(q), phi(k), v)

    q, k, v = (torch.rand(*batch, *size).to(dtype) for size in ((m, d), (n, d), (n, c)))
    if data.draw(st.booleans()):
        k, v = k.mT.contiguous().mT, v.transpose(0, -1).contiguous().transpose(0, -1)
    one = matched(linear_attention.match, function, q, k, v)
    found = region(one)
    computed = {node for node in one.graph.nodes if node.meta.get("kind") in
                ("pointwise", "product", "reduction")}  # fmt: skip
    assert computed == {one for one in found.nodes if one in computed}
    assert found.inputs == tuple(n for n in one.graph.nodes if n.op == "placeholder")
    assert_right(one, function, q, k, v)


def slab(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    """A whole attention: heads cut from channels, a position added to the keys."""
    rows, tokens, channels = q.shape
    heads = 2
    q, k = F.relu(q), F.relu(k + position)
    q, k, v = (
        one.reshape(rows, tokens, heads, channels // heads).permute(0, 2, 1, 3) for one in (q, k, v)
    )
    return summed(q, k, v).transpose(1, 2).reshape(rows, tokens, channels)


def test_heads_are_cut_out_by_strides_and_the_batch_is_dynamic():
    shapes = ((2, 30, 12), (2, 30, 12), (2, 30, 12), (1, 30, 12))
    one = matched(linear_attention.match, slab, *(torch.randn(shape) for shape in shapes))
    found = region(one)
    assert "relu = tl.where(x < 0, 0, x)" in found.source  # before the heads are cut
    for rows in (0, 1, 2, 5):
        inputs = [torch.randn(rows if k < 3 else 1, 30, 12) for k in range(4)]
        assert_right(one, slab, *inputs)


@pytest.mark.parametrize("form", [summed, weighted])
@pytest.mark.parametrize(("tokens", "channels"), [(60, 8), (5, 24)])
def test_the_order_is_that_of_fewer_operations_whatever_the_source(
    form: Function, tokens: int, channels: int
):
    x = torch.rand(3, tokens, channels)
    one = matched(linear_attention.match, form, x, x, x)
    found = region(one)
    assert found.summed == (tokens > channels)
    assert ("_summary" in found.source) == found.summed
    rows = found.sizes[0].meta["val"].node.hint
    least = rows * min(4 * tokens * channels**2, 4 * tokens**2 * channels)
    assert least <= found.flops <= 1.5 * least
    assert found.bytes == 4 * rows * tokens * channels * (len(found.inputs) + 1)
    assert_right(one, form, x, x, x)


@given(*[st.integers(1, 300)] * 4)
def test_order_compares_the_stated_counts(m: int, n: int, d: int, c: int):
    assert order(m, n, d, c) == (2 * d * c * (n + m) <= 2 * n * m * (d + c))


def exponential(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.exp(q @ k.mT) @ v


def kept(q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = q @ k.mT
    return weights @ v, weights


def foreign(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Normalized by the sum of other keys."""
    q = F.relu(q)
    return (q @ (F.relu(k).mT @ v)) / (q @ k.sum(-2, keepdim=True).mT + 9)


def shared(q: Tensor, k: Tensor, v: Tensor) -> Any:
    """The mapped queries are an output, too."""
    q = F.relu(q)
    return q @ (F.relu(k).mT @ v), q


def test_what_is_no_linear_attention_is_left_alone():
    x = torch.rand(2, 9, 4)
    assert not matched(linear_attention.match, exponential, x, x, x).found.regions
    one = matched(linear_attention.match, kept, x, x, x)
    assert not one.found.regions
    assert any("is used elsewhere" in reason for reason in one.reasons)
    wide = x.double()
    one = matched(linear_attention.match, weighted, wide, wide, wide)
    assert any("torch.float64 are the framework's" in reason for reason in one.reasons)


@pytest.mark.parametrize("function", [foreign, shared])
def test_what_does_not_belong_stays_outside(function: Any):
    x = [torch.rand(2, 9, 4) - 0.5 for _ in range(3)]
    one = matched(linear_attention.match, function, *x)
    assert len(one.found.regions) == 1
    assert_right(one, function, *x)


def test_large_values_do_not_overflow_the_sums_of_halves():
    """The sums over the keys exceed what float16 holds; they are kept in float32."""
    x = torch.full((1, 600, 8), 16.0).half()
    one = matched(linear_attention.match, summed, x, x, x)
    assert_right(one, summed, x, x, x)
