"""Kernels as custom operators: with torch.compile, torch.export and autograd, twice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.backends.triton.operators import operator
from tests.backends.triton.helpers import compiled


def _gated(x, gate, weight):
    """Two outputs, one read twice."""
    y = F.silu(gate) * x
    return y, (y * y).mean(-1, keepdim=True).rsqrt() * y * weight


@pytest.fixture(scope="module")
def operated():
    inputs = (torch.randn(4, 3, 8), torch.randn(4, 3, 8), torch.randn(8))
    (region,) = compiled(_gated, *inputs).program(inputs).regions
    return operator(region), region, inputs


def test_torch_finds_nothing_wrong(operated):
    op, region, inputs = operated
    arguments = [
        one.detach().requires_grad_() if isinstance(one, torch.Tensor) else one
        for one in _by_order(region, inputs, 4)
    ]
    found = torch.library.opcheck(op, tuple(arguments))
    assert set(found.values()) == {"SUCCESS"}


def _by_order(region, inputs, rows):
    """The inputs in the order that the region reads them in: by their shapes and use."""
    placeholders = [node for node in region.inputs[0].graph.nodes if node.op == "placeholder"]
    table = dict(zip(placeholders, inputs, strict=True))
    return [*(table[node] for node in region.inputs), *[rows] * len(region.sizes)]


def test_kernel_and_operator_agree(operated):
    op, region, inputs = operated
    arguments = _by_order(region, inputs, 4)
    for a, b in zip(op(*arguments), region.launcher()(*arguments), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_of_gradients():
    inputs = [torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64),
              torch.randn(4, dtype=torch.float64)]  # fmt: skip
    fast = compiled(_gated, *inputs)
    inputs = [one.requires_grad_() for one in inputs]
    assert torch.autograd.gradcheck(fast, inputs)
    assert torch.autograd.gradgradcheck(fast, inputs)


def test_compile_and_export(operated):
    op, region, inputs = operated

    class Around(nn.Module):
        def forward(self, *inputs):
            return op(*_by_order(region, inputs, inputs[0].shape[0]))[1] * 2

    expected = _gated(*inputs)[1] * 2
    fused = torch.compile(Around(), backend="aot_eager", dynamic=True)
    torch.testing.assert_close(fused(*inputs), expected)
    shapes = {"inputs": ({0: torch.export.Dim.AUTO}, {0: torch.export.Dim.AUTO}, None)}
    program = torch.export.export(Around(), inputs, dynamic_shapes=shapes)
    assert any(node.target is op for node in program.graph.nodes)
    fewer = (inputs[0][:3], inputs[1][:3], inputs[2])
    torch.testing.assert_close(program.module()(*fewer), _gated(*fewer)[1] * 2)
