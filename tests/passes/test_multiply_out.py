"""The specification of `multiply-out`: products of parameters in their cheapest order.

W (E - p q)  =  W - (W p) q,        E M = M,        W (p q) = (W p) q
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import graphopt
from tests.helpers import assert_equal

SIZE = 24


class Computed(nn.Module):
    """A linear map whose weight is computed from parameters at every step."""

    def __init__(self, weight: Callable[..., Tensor]) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.compute = weight
        self.w = nn.Parameter(torch.randn(10, SIZE, generator=draw).double())
        self.u = nn.Parameter(torch.randn(SIZE, 1, generator=draw).double())
        self.v = nn.Parameter(torch.randn(SIZE, 2, generator=draw).double())
        self.wide = nn.Parameter(torch.randn(SIZE, SIZE, generator=draw).double())

    def forward(self, x: Tensor) -> Tensor:
        e = torch.eye(SIZE, dtype=x.dtype)
        return torch.nn.functional.linear(x, self.compute(self, e))


def products(weight: Callable[..., Tensor]) -> list[tuple[int, ...]]:
    """The sizes of the products that compute the weight, after the pass."""
    model, x = Computed(weight).requires_grad_(False), torch.randn(3, SIZE).double()
    fast = graphopt.optimize(model, (x,), passes="canonicalize,multiply-out,canonicalize")
    assert fast.report.rolled_back == []
    assert_equal(fast(x), model(x))
    found = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default:
                found.append((*args[0].shape, args[1].shape[1]))
            return func(*args, **(kwargs or {}))

    with Watch():
        fast(x)
    assert found.pop()[:2] == (3, SIZE)  # the map itself
    return found


@pytest.mark.parametrize("weight", [
    lambda m, e: m.w @ e, lambda m, e: (e @ m.w.T).T,
    lambda m, e: torch.nn.functional.linear(e, m.w).T,
])  # fmt: skip
def test_identity_is_no_factor(weight: Callable[..., Tensor]) -> None:
    assert products(weight) == []


def test_reflections_are_never_written_out() -> None:
    """HRA's rotation is the identity, reflected time and again."""

    def weight(m: Computed, e: Tensor) -> Tensor:
        rotation = e
        for u in (m.u, m.v[:, :1], m.v[:, 1:]):
            rotation = rotation - (2 * rotation) @ u @ u.T
        return m.w @ (e @ rotation)

    assert (10, SIZE, SIZE) not in products(weight)
    assert (SIZE, 1, SIZE) not in products(weight)


def test_narrow_product_is_taken_in_parts() -> None:
    assert products(lambda m, e: m.w @ (m.v @ m.v.T)) == [(10, SIZE, 2), (10, 2, SIZE)]
    assert products(lambda m, e: ((m.v @ m.v.T) @ m.u).T) == [(2, SIZE, 1), (SIZE, 2, 1)]


def test_dense_product_stays() -> None:
    assert products(lambda m, e: m.w @ (m.wide - m.wide.T)) == [(10, SIZE, SIZE)]
    assert products(lambda m, e: m.w @ (e - m.wide)) == [(10, SIZE, SIZE)]


def test_a_vector_added_to_every_row_is_no_matrix() -> None:
    assert products(lambda m, e: m.w @ (e + m.u.T)) == [(10, SIZE, SIZE)]


def test_activations_are_left_to_other_passes() -> None:
    class Rotated(Computed):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh() @ (self.v @ self.v.T)

    model, x = Rotated(lambda m, e: e), torch.randn(3, SIZE).double()
    fast = graphopt.optimize(model, (x,), passes="multiply-out")
    assert fast.report.applied == []
