"""Every formula of an op against torch, in float64 and in half."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from graphopt.backends.triton import kinds
from graphopt.backends.triton.rules import RULES
from tests.backends.triton.helpers import compiled, program
from tests.helpers import relative_error

WEIGHT, BIAS, MEAN = (torch.linspace(low, 2, 6) for low in (-1, 0.5, -2))
VAR = torch.linspace(0.1, 2, 6)


def _written(x):
    x[:, 2:, 1:3] = x[:, :-2, 2:4] * 2
    x[:, 0] = 1.5
    return x


FUNCTIONS = {
    "softmax": lambda x: x.softmax(1),
    "softmax in another dtype": lambda x: x.softmax(-1, dtype=torch.float64),
    "log_softmax": lambda x: x.log_softmax(-1),
    "layer_norm": lambda x: F.layer_norm(x, (5, 4), eps=0.1),
    "rms_norm": lambda x: F.rms_norm(x, (4,), eps=0.1) + F.rms_norm(x, (5, 4)),
    "group_norm": lambda x: F.group_norm(x, 3, WEIGHT.to(x), BIAS.to(x), 0.1),
    "batch_norm": lambda x: F.batch_norm(x, MEAN.to(x), VAR.to(x), WEIGHT.to(x), BIAS.to(x)),
    "batch_norm without scale": lambda x: F.batch_norm(x, MEAN.to(x), VAR.to(x), eps=0.2),
    "instance_norm": lambda x: F.instance_norm(x, weight=WEIGHT.to(x), bias=BIAS.to(x)),
    "var": lambda x: x.var((1, 2)),
    "var of a population": lambda x: x.var(-1, correction=0, keepdim=True),
    "std": lambda x: x.std(-1),
    "var_mean": lambda x: torch.stack(torch.var_mean(x, -1)),
    "average": lambda x: F.adaptive_avg_pool2d(x, 1),
    "split": lambda x: torch.cat([one.sin() for one in x.split([1, 3, 2], 1)][::-1], 1),
    "chunk": lambda x: x.chunk(4, 1)[1] + x.unbind(1)[2].unsqueeze(1),
    "stack": lambda x: torch.stack([x, x * 2], 2),
    "sum": lambda x: x.sum() + torch.ones_like(x) + torch.zeros_like(x),
    "expand": lambda x: x[:1].mean(1, keepdim=True).expand_as(x) * x,
    "norms": lambda x: x.norm(dim=-1, keepdim=True) + x.norm(1, (1, 2), True) + F.normalize(x),
    "largest": lambda x: torch.linalg.vector_norm(x, math.inf, -1),
    "slice_scatter": lambda x: torch.slice_scatter(x, x[:, 1:4] * 2, 1, -5, 4),
    "slice_scatter of all": lambda x: torch.slice_scatter(x, x.sin(), 2),
    "select_scatter": lambda x: torch.select_scatter(x, x[:, 0] * 2, 1, -1),
    "written": lambda x: _written(x.clone()),
    "tril": lambda x: x.tril(1) + x.triu(),
    "roll": lambda x: x.roll(1, -1) + x.repeat(1, 1, 1, 1),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_formulas(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 6, 5, 4, generator=generator).to(dtype)

    def every(x):
        return tuple(function(x) for function in FUNCTIONS.values())

    fast = compiled(every, x)
    with torch.no_grad():
        found, same, truth = fast(x), every(x), every(x.double())
    fusible, inside = program(fast).coverage
    assert fusible == inside, program(fast).outside
    for name, a, b, c in zip(FUNCTIONS, found, same, truth, strict=True):
        assert a.dtype == b.dtype, name
        assert relative_error(a.double(), c.double()) <= 8 * torch.finfo(dtype).eps, name


def test_statistics_of_the_batch_are_the_frameworks():
    x = torch.randn(3, 6, 5)
    fast = compiled(lambda x: F.batch_norm(x, None, None, training=True).relu(), x)
    fast.program([x])
    assert "no formula for aten.batch_norm.default" in fast.outside.values()


def test_a_rule_is_for_an_op_of_the_dispatcher():
    assert all(isinstance(op, torch._ops.OpOverload) for op in (*RULES, *kinds.KEPT))
