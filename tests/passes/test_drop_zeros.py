"""The specification of `drop-zeros`: a term that is zero whatever the input is goes away.

y + (0 x + b)  =  y + b,        y + 0 * f(x)  =  y
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt
from tests.helpers import Net, assert_equal, output_of, prepare, tensor
from tests.passes.test_not_exact import acting


def zeroed(module: nn.Module, bias: bool = True) -> nn.Module:
    """A map whose weight is zero, and its bias if so said."""
    nn.init.zeros_(module.weight)
    if bias and module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


def net(body, **modules) -> nn.Module:
    made = prepare(Net(body, **{"main": nn.Linear(8, 8), "down": nn.Linear(8, 2),
                                "up": nn.Linear(2, 8), **modules}))  # fmt: skip
    return made


def leaves(model: nn.Module, left: str, shape=(3, 5, 8)) -> None:
    x = tensor(*shape)
    fast = graphopt.optimize(model, (x,), passes="canonicalize,drop-zeros")
    assert acting(fast) == left.split()
    assert fast.report.rolled_back == []
    assert_equal(output_of(fast, (x,)), output_of(model, (x,)))


def test_an_adapter_that_was_never_trained() -> None:
    model = net(lambda net, x: (net.main(x) + net.up(net.down(x).relu())).tanh())
    zeroed(model.up)
    leaves(model, "linear tanh")


def test_its_bias_stays() -> None:
    model = net(lambda net, x: net.main(x).relu() + net.up(net.down(x).relu()))
    zeroed(model.up, bias=False)
    leaves(model, "linear relu add")


def test_on_either_side_and_subtracted() -> None:
    model = net(lambda net, x: net.up(net.down(x).relu()) + net.main(x).relu() - net.up(x[..., :2]))
    zeroed(model.up)
    leaves(model, "linear relu")


def test_a_gate_that_is_off() -> None:
    model = net(lambda net, x: net.main(x) + net.gate * net.up(net.down(x).relu()),
                gate=nn.Parameter(torch.zeros(())))  # fmt: skip
    model.gate.data.zero_()
    leaves(model, "linear")


def test_a_block_that_was_inserted_as_the_identity() -> None:
    # LLaMA-Pro: the last map of each branch starts from zero.
    def body(net, x):
        x = x + net.up(net.down(x).sigmoid())
        return x + net.out(net.main(x).relu())

    model = net(body, out=nn.Linear(8, 8))
    zeroed(model.up), zeroed(model.out)
    leaves(net_with_tail(model), "tanh")


def net_with_tail(model: nn.Module) -> nn.Module:
    return nn.Sequential(model, nn.Tanh()).double().eval()


def test_what_a_zero_stays_zero_in() -> None:
    """f(0) = 0 for relu, gelu and tanh, and a product with a zero; not for a sigmoid."""
    model = net(
        lambda net, x: net.main(x) + (net.up(net.down(x)).relu() * net.main(x).sigmoid()).tanh()
    )
    zeroed(model.up)
    leaves(model, "linear")
    model = net(lambda net, x: net.main(x) + net.up(net.down(x)).sigmoid())
    zeroed(model.up)
    leaves(model, "linear linear linear sigmoid add")
    model = net(lambda net, x: net.main(x) + net.up(net.down(x)).relu())
    zeroed(model.up, bias=False)  # relu(b) is not zero
    leaves(model, "linear linear linear relu add")


def test_a_convolution() -> None:
    model = prepare(Net(lambda net, x: net.a(x) + net.b(x.relu()), a=nn.Conv2d(4, 4, 3, padding=1),
                        b=nn.Conv2d(4, 4, 1)))  # fmt: skip
    zeroed(model.b, bias=False)
    leaves(model, "conv2d add", (2, 4, 6, 6))


def test_what_only_broadcasts_with_the_rest_stays() -> None:
    # The sum has the shape of the zeros.
    model = prepare(Net(lambda net, x: net.main(x)[:, :1] + net.up(x), main=nn.Linear(8, 8),
                        up=nn.Linear(8, 8)))  # fmt: skip
    zeroed(model.up)
    leaves(model, "linear slice linear add")


@pytest.mark.parametrize("mode", ["tune", "deploy"])
def test_in_deploy_mode_only(mode: str) -> None:
    # In Tune mode zeros are where training starts.
    model = net(lambda net, x: (net.main(x) + net.up(net.down(x).relu())).tanh())
    zeroed(model.up)
    fast = graphopt.optimize(model, (tensor(3, 5, 8),), mode=mode)
    assert ("relu" in acting(fast)) == (mode == "tune")


def test_a_sum_that_widens_its_dtype_stays() -> None:
    model = net(lambda net, x: net.main(x).float() + net.up(net.down(x).relu()))
    zeroed(model.up)
    leaves(model, "linear to linear relu linear add")


def test_a_scale_of_one() -> None:
    """On either side; not where it broadcasts, nor one that is not one everywhere."""
    model = net(
        lambda net, x: (net.scale * net.main(x)).relu() * net.scale,
        scale=nn.Parameter(torch.ones(8)),
    )
    leaves(model, "linear relu")
    model.scale.data[3] = -1.0
    leaves(model, "linear mul relu mul")
    wide = net(lambda net, x: net.main(x)[..., :1] * net.scale, scale=nn.Parameter(torch.ones(8)))
    leaves(wide, "linear slice mul")
