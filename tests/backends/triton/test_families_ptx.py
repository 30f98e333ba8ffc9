"""The families' kernels compile for real GPUs, and keep what they hold in registers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.backends.triton.families import grouped, linear_attention, scan
from graphopt.backends.triton.ptx import compile_all
from tests.backends.triton.family_helpers import matched
from tests.backends.triton.test_families_grouped import plain
from tests.backends.triton.test_families_linear_attention import MAPS, summed, weighted
from tests.backends.triton.test_families_scan import synaptic, unrolled


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    phi = MAPS["elu + 1"]
    return summed(phi(q), phi(k), v)


def test_every_family_compiles_without_spills():
    half = torch.bfloat16
    steps = [torch.rand(4, 6, 40), torch.rand(())]
    tokens, few = torch.rand(3, 200, 64), torch.rand(3, 40, 64)
    tables = [torch.rand(2, 3, 256), torch.rand(4, 256, 16), torch.rand(4, 16, 256)]
    ids = torch.tensor([0, 3])
    neuron = unrolled(synaptic, 4, 0, "zeros", "stack and state")
    cases: list[tuple[Any, ...]] = [
        (scan.match, neuron, *steps),
        (linear_attention.match, attention, *[tokens.to(half)] * 3),
        (linear_attention.match, weighted, *[few.to(half)] * 3),
        (grouped.match, plain, *(one.to(half) for one in tables), ids),
        (linear_attention.match, attention, *[tokens[..., :32]] * 3),
        (grouped.match, plain, *tables, ids),
    ]
    units = []
    for match, function, *inputs in cases:
        (region,) = matched(match, function, *inputs).found.regions
        units.append(region.units())
    assert [len(one) for one in units] == [1, 2, 1, 2, 2, 2]
    flat = [one for many in units for one in many]
    # Products in float32 take long to compile.
    found = compile_all(flat[:6]) + compile_all(flat[6:], targets=[90])
    assert len(found) == 2 * 6 + 4
    for one in found:
        assert not one.error, one
        assert one.spills == 0, one
        assert one.shared <= 96 * 1024, one
