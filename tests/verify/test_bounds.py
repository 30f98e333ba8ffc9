"""Bounds of products take no product of matrices, and are never below the sums of absolute products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from torch import Tensor

from graphopt.ir.capture import capture
from graphopt.verify.bounds import Site
from tests.helpers import Lambda, tensor


def bound(body: Any, *args: Tensor) -> Tensor:
    graph = capture(Lambda(body), args, {}).graph
    site = Site(graph, dict(zip(graph.inputs, args, strict=True)))
    for node in graph.calls:
        site.add(node)
    return site.magnitudes[graph.calls[-1]]


def holds(body: Any, *args: Tensor, loose: float = 4) -> None:
    """The bound holds, and is of use: at most a few times the least there is."""
    least, found = body(*(one.abs() for one in args)), bound(body, *args)
    assert found.shape == least.shape
    assert bool((found >= (1 - 1e-12) * least).all())
    assert float(found.median()) <= loose * float(least.median()) + 1e-100


@given(
    groups=st.sampled_from([1, 2, 4]), per=st.sampled_from([1, 4, 6]), stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, "same"]), dilation=st.integers(1, 2),
    size=st.sampled_from([1e-200, 1e-3, 1.0, 1e20]), batched=st.booleans(),
)  # fmt: skip
def test_convolutions(groups, per, stride, padding, dilation, size, batched):
    x, weight, bias = (
        tensor(2, 8, 7, 6),
        tensor(per * groups, 8 // groups, 3, 2),
        tensor(per * groups),
    )
    x = size * (x if batched else x[0])
    stride = 1 if padding == "same" else stride
    holds(lambda *all: F.conv2d(*all, stride, padding, dilation, groups), x, weight, bias)  # fmt: skip


@given(size=st.sampled_from([0.0, 1e-200, 1.0, 1e20]))
@pytest.mark.parametrize(
    ("body", "shapes"),
    {
        "linear": (F.linear, [(2, 3, 8), (5, 8), (5,)]),
        "linear without a bias": (F.linear, [(8,), (5, 8)]),
        "linear of one output": (F.linear, [(3, 8), (8,)]),
        "matmul": (torch.matmul, [(2, 1, 3, 8), (4, 8, 5)]),
        "of a vector": (torch.matmul, [(8,), (8, 5)]),
        "addmm": (torch.addmm, [(5,), (3, 8), (8, 5)]),
        "baddbmm": (torch.baddbmm, [(2, 1, 5), (2, 3, 8), (2, 8, 5)]),
        "transposed": (F.conv_transpose2d, [(2, 8, 5, 5), (8, 4, 3, 3), (4,)]),
    }.values(),
)
def test_products(body, shapes, size):
    first, *others = (tensor(*shape) for shape in shapes)
    holds(body, size * first, *others)


def test_signs_of_the_factors_do_not_matter():
    args = tensor(3, 5), tensor(3, 8), tensor(8, 5)
    found = bound(lambda c, a, b: torch.addmm(c, a, b, beta=-2, alpha=-0.5), *args)
    c, a, b = (one.abs() for one in args)
    assert bool((found >= 2 * c + 0.5 * (a @ b)).all())


def test_a_convolution_of_a_tensor_with_itself():
    x = tensor(4, 4, 3, 3)
    holds(lambda x: F.conv2d(x, x), x)


def test_attention_does_not_count_what_the_mask_hides_from_every_query():
    """As the unused rest of a cache."""
    query, key, values = tensor(2, 3, 4), tensor(2, 5, 4, seed=1), tensor(2, 5, 4, seed=2)
    mask = torch.tensor([True, True, False, True, False]).expand(3, 5)
    seen = mask[0].nonzero().flatten()
    rest = bound(F.scaled_dot_product_attention, query, key[:, seen], values[:, seen])
    key[:, ~mask[0]], values[:, ~mask[0]] = 1e12, 1e15
    found = bound(F.scaled_dot_product_attention, query, key, values, mask)
    torch.testing.assert_close(found, rest, rtol=1e-12, atol=0)
