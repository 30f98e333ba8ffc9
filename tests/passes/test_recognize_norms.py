"""The specification of `recognize-norms`: formulas of layer norms and RMS norms are one op.

Over the last axis, with a number under the root; a gain behind them, as T5, Llama (`w`) and Gemma (`1 + w`)
have it, moves on into the maps that read it.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt
from tests.helpers import Net, assert_equal, calls, prepare, reasons, tensor

TOKENS = (3, 5, 8)


def centred(x):
    return x - x.mean(-1, keepdim=True)


RMS = {
    "rsqrt": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3),
    "sqrt": lambda x: x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-3),
    "the other way around": lambda x: torch.rsqrt(1e-3 + (x * x).mean((-1,), True)) * x,
}


@pytest.mark.parametrize("name", RMS)
def test_a_formula_is_one_op(name):
    for of, kind in ((lambda x: x, "rms_norm"), (centred, "layer_norm")):
        model = prepare(Net(lambda net, x: RMS[name](of(x)).sin()))  # noqa: B023
        x = tensor(*TOKENS)
        fast = graphopt.optimize(model, (x,))
        assert calls(fast) == [kind, "sin"], reasons(fast)
        assert_equal(fast(x), model(x))


@pytest.mark.parametrize("gain", [lambda w: w, lambda w: 1 + w])
def test_gains_move_into_what_reads_the_norm(gain):
    model = prepare(
        Net(lambda net, x: net.a(RMS["rsqrt"](x) * gain(net.w)), w=nn.Parameter(torch.randn(8)),
            a=nn.Linear(8, 4))
    )  # fmt: skip
    x = tensor(*TOKENS)
    fast = graphopt.optimize(model, (x,))
    assert calls(fast) == ["rms_norm", "linear"]
    assert_equal(fast(x), model(x))


def test_in_half_precision_the_norm_is_computed_in_float32():
    def body(net, x):
        wide = x.float()
        return RMS["rsqrt"](wide).to(x.dtype).sin()

    model = Net(body).to(torch.bfloat16).eval()
    x = tensor(*TOKENS).to(torch.bfloat16)
    fast = graphopt.optimize(model, (x,))
    assert "rms_norm" in calls(fast)
    assert_equal(fast(x).double(), model(x).double(), 1e-2)


OTHERS = {
    "another axis": lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-3),
    "two axes": lambda x: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + 1e-3),
    "another value": lambda x: x * torch.rsqrt((2 * x).pow(2).mean(-1, keepdim=True) + 1e-3),
    "cubes": lambda x: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True).abs() + 1e-3),
    "nothing under the root": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)),
    "the root over the value": lambda x: torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) / x,
    "a sum": lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-3),
    "a root that is read": lambda x: (
        lambda r: x * r + r.sin()
    )(torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_norm_stays(name):
    model = prepare(Net(lambda net, x: OTHERS[name](x)))
    x = tensor(*TOKENS)
    fast = graphopt.optimize(model, (x,))
    assert not {"rms_norm", "layer_norm"} & set(calls(fast))
    assert_equal(fast(x), model(x))


def test_a_value_centred_over_another_axis_is_not_a_layer_norm():
    model = prepare(Net(lambda net, x: RMS["rsqrt"](x - x.mean(1, keepdim=True)).sin()))
    x = tensor(*TOKENS)
    fast = graphopt.optimize(model, (x,))
    assert calls(fast) == ["mean", "sub", "rms_norm", "sin"]
    assert_equal(fast(x), model(x))
