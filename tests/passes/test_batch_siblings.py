"""The specification of `batch-siblings`: one function applied to several values is applied once.

    f(x_1), ..., f(x_n)  =  chunk(f(cat(x_1, ..., x_n)))

Every model is compared in float64 with its source, on two inputs, and no site may be rolled back. What is
counted are the calls that are left: after the pass a layer is one call, however many steps there are.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.ir.capture import capture
from graphopt.ir.driver import Session
from graphopt.ir.printer import text
from graphopt.passes.base import PassError
from graphopt.pipeline import Pipeline
from tests.helpers import (
    Net,
    assert_equal,
    calls,
    optimized,
    output_of,
    prepare,
    reasons,
    snapshot,
    tensor,
)

BATCH = "canonicalize,batch-siblings{slack=100},canonicalize"  # whatever it costs
IMAGE = (2, 3, 6, 6)


def batched(model: nn.Module, *shapes: tuple[int, ...], **options: Any) -> Any:
    """`model` in float64, its norms random, after the pass; right on two inputs."""
    return optimized(prepare(model), "tune", *shapes, passes=BATCH, **options)


def left(fast: Any) -> Counter[str]:
    return Counter(calls(fast))


def conv(i: int = 3, o: int = 4, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, padding=1, **options)


# -- spiking networks ---------------------------------------------------------------------------------


class Neuron(nn.Module):
    """Leaky integrate and fire, with `reset` "hard", "soft" or "none"; `norm`: of the membrane (MPBN)."""

    def __init__(self, reset: str = "hard", norm: nn.Module | None = None) -> None:
        super().__init__()
        self.reset, self.norm = reset, norm

    def forward(self, x: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
        v = x if v is None else 0.5 * v + x
        seen = v if self.norm is None else self.norm(v)
        spike = (seen > 0.3141592654).to(x.dtype)
        if self.reset == "hard":
            return spike, v * (1 - spike)
        return spike, v - 0.3141592654 * spike if self.reset == "soft" else v


class Spiking(nn.Module):
    """Two layers, pooled, and a readout, step by step."""

    def __init__(self, steps: int = 4, encoding: str = "frames", **neuron: Any) -> None:
        super().__init__()
        self.steps, self.encoding = steps, encoding
        self.conv1, self.norm1, self.lif1 = conv(), nn.BatchNorm2d(4), Neuron(**neuron)
        self.conv2, self.norm2, self.lif2 = conv(4, 4), nn.BatchNorm2d(4), Neuron(**neuron)
        self.pool, self.out = nn.MaxPool2d(2), nn.Linear(4 * 9, 5)

    def block(self, spikes: Tensor) -> Tensor:
        return self.norm2(self.conv2(spikes))

    def read(self, x: Tensor, t: int) -> Tensor:
        return x if self.encoding == "direct" else x[:, t] if self.encoding == "second" else x[t]

    def forward(self, x: Tensor) -> Tensor:
        if self.encoding == "repeated":
            x = x.unsqueeze(0).repeat(self.steps, *(1,) * x.ndim)
        v1 = v2 = None
        total: Any = 0
        for t in range(self.steps):
            spikes, v1 = self.lif1(self.norm1(self.conv1(self.read(x, t))), v1)
            spikes, v2 = self.lif2(self.block(spikes), v2)
            total = total + self.out(self.pool(spikes).flatten(1))
        return total / self.steps


class Residual(Spiking):
    """The second layer is a spiking residual block."""

    def block(self, spikes: Tensor) -> Tensor:
        return self.norm2(self.conv2(spikes)) + spikes


ONCE = {"conv2d": 2, "batch_norm": 2, "max_pool2d": 1, "linear": 1}


def only(found: Counter[str], *names: str) -> dict[str, int]:
    return {name: found[name] for name in names}


@pytest.mark.parametrize("reset", ["hard", "soft", "none"])
@pytest.mark.parametrize("cls", [Spiking, Residual])
def test_every_layer_is_one_call(cls: Any, reset: str):
    fast = batched(cls(reset=reset), (4, *IMAGE))
    found = left(fast)
    assert only(found, *ONCE) == ONCE
    assert found["stack"] == 2  # what the neurons compute
    assert found["gt"] == 8  # neurons stay as they are


def test_a_residual_sum_is_batched_with_what_it_adds():
    found = left(batched(Residual(), (4, *IMAGE)))
    unrolled = 3 * 2 + 3  # of neurons from their second step on, of readouts
    assert found["add"] == unrolled + 1


def test_frames_that_are_entries_of_the_input_are_not_moved():
    """[T, N, ...] with a T that is fixed by the model is reshaped; the convolution reads a view."""
    model = Net(lambda net, x: torch.stack([net.a(one).relu() for one in x]), a=conv())
    assert calls(batched(model, (4, *IMAGE))) == ["flatten", "conv2d", "relu", "unflatten"]


def test_the_batch_first():
    """[N, T, ...]: one copy, and not one for each step."""
    found = left(batched(Spiking(encoding="second"), (2, 4, 3, 6, 6)))
    assert only(found, *ONCE) == ONCE
    assert found["stack"] == 2


@pytest.mark.parametrize("encoding", ["direct", "repeated"])
def test_the_same_image_at_every_step_is_convolved_once(encoding: str):
    fast = batched(Spiking(encoding=encoding), IMAGE)
    assert only(left(fast), *ONCE) == ONCE
    assert left(fast)["stack"] == 2
    assert left(fast)["repeat"] == 0


def test_more_frames_than_steps():
    """The first axis is dynamic, and the model reads the first four of it."""
    model = prepare(Spiking())
    fast = graphopt.optimize(
        model, (tensor(5, *IMAGE),), passes="canonicalize,batch-siblings{slack=100}"
    )
    assert only(left(fast), *ONCE) == ONCE
    for frames in (4, 5, 7):
        x = tensor(frames, *IMAGE, seed=frames)
        assert_equal(output_of(fast, [x]), output_of(model, [x]))


@pytest.mark.parametrize("encoding", ["second", "direct"])
def test_any_number_of_rows(encoding: str):
    shape = (3, 4, 3, 6, 6) if encoding == "second" else (3, 3, 6, 6)
    model = prepare(Spiking(encoding=encoding))
    fast = optimized(model, "deploy", shape, passes=BATCH)
    assert only(left(fast), *ONCE) == ONCE
    for rows in (1, 2, 5):
        x = tensor(rows, *shape[1:], seed=rows)
        assert_equal(output_of(fast, [x]), output_of(model, [x]))


def test_norms_of_their_own_at_every_step():
    """BNTT: the convolution is one, its norms are one product and one sum with stacked parameters."""
    norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))

    def body(net: Any, x: Tensor) -> Tensor:
        v, spikes = None, []
        for t in range(4):
            one, v = net.lif(net.norms[t](net.a(x[t])), v)
            spikes.append(one)
        return torch.stack(spikes)

    found = left(batched(Net(body, a=conv(), lif=Neuron(), norms=norms), (4, *IMAGE)))
    assert only(found, "conv2d", "batch_norm") == {"conv2d": 1, "batch_norm": 0}


def test_the_norm_of_a_membrane_stays():
    """MPBN: what the norm reads depends on what it has computed a step before."""

    def body(net: Any, x: Tensor) -> Tensor:
        v, total = None, 0.0
        for t in range(4):
            spikes, v = net.lif(net.a(x[t]), v)
            total = total + spikes
        return total

    norm = nn.BatchNorm2d(4)
    fast = batched(Net(body, a=conv(), lif=Neuron(norm=norm)), (4, *IMAGE))
    assert only(left(fast), "conv2d", "batch_norm") == {"conv2d": 1, "batch_norm": 4}
    assert "depends on its result, through Add" in reasons(fast, "lif.norm")


def test_a_recurrent_connection_stays():
    def body(net: Any, x: Tensor) -> Tensor:
        spikes, v = net.lif(net.a(x[0]), None)
        for t in range(1, 4):
            spikes, v = net.lif(net.a(x[t]) + net.back(spikes), v)
        return spikes

    fast = batched(Net(body, a=conv(), back=conv(4, 4), lif=Neuron()), (4, *IMAGE))
    assert left(fast)["conv2d"] == 1 + 3
    assert reasons(fast, "back") == "its next call depends on its result, through Cast (lif)"
    assert not reasons(fast, "a")


def test_what_comes_after_works_on_what_is_one():
    """One batch norm to fold for all steps, and nothing between it and its convolution."""
    model = prepare(Residual())
    fast = optimized(model, "deploy", (4, *IMAGE), passes=f"{BATCH},deploy")
    assert only(left(fast), "conv2d", "batch_norm") == {"conv2d": 2, "batch_norm": 0}


# -- several inputs -----------------------------------------------------------------------------------


def tower(net: Any, x: Tensor) -> Tensor:
    return net.head(F.avg_pool2d(net.norm(net.a(x)).relu(), 2).flatten(1))


def towers(body: Any, **more: nn.Module) -> nn.Module:
    return Net(body, a=conv(), norm=nn.BatchNorm2d(4), head=nn.Linear(36, 5), **more)


def test_a_siamese_network():
    model = towers(lambda net, x, y: (tower(net, x) - tower(net, y)).square().sum(1))
    fast = batched(model, IMAGE, IMAGE)
    chain = "conv2d batch_norm relu avg_pool2d reshape linear"
    assert calls(fast) == f"stack flatten {chain} unflatten select select sub square sum".split()


def test_outputs_keep_memory_of_their_own():
    model = towers(lambda net, x, y: (tower(net, x + y), tower(net, y)))
    fast = batched(model, IMAGE, IMAGE)
    assert left(fast)["linear"] == 1
    one, other = fast(tensor(*IMAGE), tensor(*IMAGE))
    assert one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()


def test_views_as_outputs():
    """The reshape in front of the outputs is one too, and they share no memory."""
    model = Net(lambda net, x: [net.a(one).flatten(1) for one in x.unbind()], a=conv())
    fast = batched(model, (3, *IMAGE))
    assert left(fast)["flatten"] + left(fast)["reshape"] <= 2
    places = {one.untyped_storage().data_ptr() for one in fast(tensor(3, *IMAGE))}
    assert left(fast)["conv2d"] == 1 and len(places) == 3


def test_crops_of_one_image():
    def body(net: Any, x: Tensor) -> Tensor:
        crops = [x[..., :4, :4], x[..., 2:, 2:], x[..., :4, 2:].flip(-1)]
        return sum(net.a(one).relu().mean((2, 3)) for one in crops)

    found = left(batched(Net(body, a=conv()), IMAGE))
    assert only(found, "conv2d", "relu", "mean") == {"conv2d": 1, "relu": 1, "mean": 1}


def test_chunks_of_a_batch():
    model = Net(lambda net, x: torch.cat([net.a(one) for one in x.chunk(3)]), a=nn.Linear(4, 5))
    assert calls(batched(model, (6, 4), dynamic_shapes=(({},),))) == ["linear"]


def test_inputs_of_different_sizes():
    model = Net(lambda net, x, y: net.a(x).sum() + net.a(y).sum(), a=conv())
    fast = batched(model, IMAGE, (2, 3, 8, 8))
    assert left(fast)["conv2d"] == 2
    assert "different sizes" in reasons(fast, "a")


def test_those_of_one_size():
    def body(net: Any, x: Tensor, y: Tensor) -> Any:
        return sum(net.a(one).mean((2, 3)) for one in (x, y, x[:, :, 1:], y.tanh(), y[:, :, 1:]))

    found = left(batched(Net(body, a=conv()), IMAGE, IMAGE))
    assert found["conv2d"] == 2


def test_a_weight_for_several_depths():
    """Shared by layers too: what depends on each other is not one, what does not is."""
    model = Net(
        lambda net, x, y: net.a(net.a(x).tanh()) * net.a(net.a(y).tanh()), a=nn.Linear(4, 4)
    )
    found = left(batched(model, (2, 4), (2, 4)))
    assert only(found, "linear", "tanh") == {"linear": 2, "tanh": 1}


def test_a_longer_way():
    """The first call of `f` waits for the second, which comes behind `g`."""

    def body(net: Any, x: Tensor, y: Tensor) -> Tensor:
        return net.f(x) * net.f(net.g(y).tanh() + net.g(x * y).relu())

    fast = batched(Net(body, f=nn.Linear(4, 4), g=nn.Linear(4, 4)), (2, 4), (2, 4))
    assert left(fast)["linear"] == 2


def test_classes_that_cross():
    """One after the other, in both orders: only one of both can be one."""

    def body(net: Any, x: Tensor, y: Tensor) -> Tensor:
        return net.g(net.f(x).tanh()) + net.f(net.g(y).tanh())

    fast = batched(Net(body, f=nn.Linear(4, 4), g=nn.Linear(4, 4)), (2, 4), (2, 4))
    assert left(fast)["linear"] == 3
    assert "wait for each other" in reasons(fast)


def test_parameters_that_are_used_elsewhere():
    model = Net(
        lambda net, x, y: (
            net.a(x).tanh() * net.a(y) + F.linear(x, net.a.weight.T) + net.a.weight[0]
        ),
        a=nn.Linear(4, 4),
    )
    assert left(batched(model, (2, 4), (2, 4)))["linear"] == 2


def test_parameters_that_are_computed_anew():
    def body(net: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.linear(x, net.w * 2, net.a.bias) * F.linear(y, net.w * 2, net.a.bias)

    model = Net(body, a=nn.Linear(4, 4), w=nn.Parameter(torch.randn(4, 4)))
    assert left(batched(model, (2, 4), (2, 4)))["linear"] == 1


def test_other_numbers_or_parameters():
    def body(net: Any, x: Tensor, y: Tensor) -> Tensor:
        left = F.conv2d(x, net.a.weight, net.a.bias, padding=1)
        return left + F.conv2d(y, net.a.weight, None, padding=1) + F.conv2d(
            y, net.a.weight, net.a.bias, padding=2, dilation=2
        )  # fmt: skip

    assert left(batched(Net(body, a=conv()), IMAGE, IMAGE))["conv2d"] == 3


def test_keyword_arguments():
    def body(net: Any, x: Tensor, y: Tensor) -> Tensor:
        w, b = net.a.weight, net.a.bias
        one = F.conv2d(x, w, bias=b, padding=1)
        return F.relu(input=one) + F.conv2d(weight=w, input=y, bias=b, padding="same").relu()

    found = left(batched(Net(body, a=conv()), IMAGE, IMAGE))
    assert only(found, "conv2d", "relu") == {"conv2d": 1, "relu": 1}


def test_something_that_is_the_same_for_all():
    """It is broadcast over the steps, not repeated for them."""
    model = Net(lambda net, x, y: torch.stack([net.a(one) + y for one in x]), a=nn.Linear(4, 5))
    assert left(batched(model, (3, 2, 4), (2, 5)))["add"] == 1


# -- what may not be one --------------------------------------------------------------------------------


def test_statistics_of_the_batch():
    model = prepare(towers(lambda net, x, y: tower(net, x) + tower(net, y)))
    model.norm.train()
    unchanged = snapshot(model)
    x, y = tensor(*IMAGE), tensor(*IMAGE, seed=2)
    fast = graphopt.optimize(model, (x, y), passes=BATCH)
    unchanged()
    assert_equal(output_of(fast, [y, x]), output_of(model, [y, x]))
    assert only(left(fast), "conv2d", "batch_norm") == {"conv2d": 1, "batch_norm": 2}
    assert reasons(fast, "norm") == "it normalizes with batch statistics"


def interrupted(net: Any, x: Tensor, y: Tensor) -> Tensor:
    """What `last` does to `y` is needed for the second call of `a`, the first of which comes early."""
    one = net.a(x)
    first = net.last(net.b(x))
    return one * net.a(net.last(y)) + first


def test_dropout_that_trains_draws_the_same_numbers():
    model = prepare(Net(interrupted, a=nn.Linear(4, 4), b=nn.Linear(4, 4), last=nn.Dropout(0.5)))
    model.last.train()
    x, y = tensor(8, 4), tensor(8, 4, seed=2)
    fast = graphopt.optimize(model, (x, y), passes=BATCH)
    assert only(left(fast), "linear", "dropout") == {"linear": 2, "dropout": 2}
    torch.manual_seed(5)
    truth = output_of(model, [x, y])
    torch.manual_seed(5)
    assert_equal(output_of(fast, [x, y]), truth)


def test_running_statistics_are_updated_in_the_same_order():
    model = prepare(Net(interrupted, a=nn.Linear(4, 4), b=nn.Linear(4, 4), last=nn.BatchNorm1d(4)))
    model.last.train()
    x, y = tensor(8, 4), tensor(8, 4, seed=2)
    fast = graphopt.optimize(model, (x, y), passes=BATCH)
    assert only(left(fast), "linear", "batch_norm") == {"linear": 2, "batch_norm": 2}
    assert_equal(fast(x, y), model(x, y))
    assert_equal(fast.get_buffer("last.running_mean"), model.last.running_mean)


def test_states_that_are_written():
    """A membrane that is kept from call to call."""

    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.register_buffer("v", torch.zeros(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            for t in range(3):
                self.v.mul_(0.5).add_(self.a(x[t]).tanh())
            return self.v.clone()

    model = prepare(Kept())
    x = tensor(3, 2, 4)
    fast = graphopt.optimize(model, (x,), passes=BATCH, dynamic_shapes=({},))
    assert only(left(fast), "linear", "tanh") == {"linear": 1, "tanh": 1}
    for rows in (x, x * 2):
        assert_equal(fast(rows), model(rows))


def test_what_it_costs():
    """Two matrices of a number each are not worth bringing their inputs together."""
    model = prepare(Net(lambda net, x, y: net.a(x) * net.a(y), a=nn.Linear(4000, 1)))
    shape = (200, 4000)
    fast = optimized(model, "deploy", shape, shape, passes="canonicalize,batch-siblings")
    assert left(fast)["linear"] == 2
    assert "it would take" in reasons(fast, "a")
    with pytest.raises(PassError, match="slack"):
        Pipeline("batch-siblings{slack=none}")


def test_few_applications(monkeypatch: pytest.MonkeyPatch):
    """With every limit of applications, what has been done so far is right; nothing else is left over."""
    model, x = prepare(Residual(steps=2)), tensor(2, *IMAGE)
    truth = output_of(model, [x])
    for limit in range(0, 12, 3):
        fast = graphopt.optimize(
            model, (x,), passes="batch-siblings", bisect_limit=limit, dynamic_shapes=({},)
        )
        assert_equal(output_of(fast, [x]), truth)
        assert limit or not {"stack", "select"} & left(fast).keys() - {"select"}


# -- what each op does to rows ----------------------------------------------------------------------------


def pairs(f: Any) -> Any:
    """A linear map of two inputs, `f` of what it computes, and what would not be one if `f` were not."""
    return lambda net, x, y: f(net, net.a(x)).sigmoid() * f(net, net.a(y)).sigmoid()


STEPS = {
    "softmax over features": lambda net, z: z.softmax(-1),
    "softmax over the batch": lambda net, z: z.softmax(0),
    "a sum over the batch": lambda net, z: z.sum(0),
    "a mean of all": lambda net, z: z.mean(),
    "a sum of tokens": lambda net, z: z.sum(1, keepdim=True),
    "running sums over the batch": lambda net, z: z.cumsum(0),
    "layer norm": lambda net, z: net.norm(z),
    "group norm": lambda net, z: F.group_norm(z, 5),
    "windows": lambda net, z: z.reshape(-1, 5, 2, 3).transpose(1, 2).flatten(2),
    "rows to features": lambda net, z: z.reshape(4, 15),
    "tokens first": lambda net, z: z.permute(1, 0, 2),
    "half of the rows": lambda net, z: z[1:],
    "every second token": lambda net, z: z[:, ::2],
    "one row": lambda net, z: z[0],
    "a token": lambda net, z: z[:, -1],
    "flipped": lambda net, z: z.flip((0, 1)),
    "rolled": lambda net, z: z.roll(1, 1),
    "padded": lambda net, z: F.pad(z, (1, 0, 0, 1, 0, 1)),
    "a token beside": lambda net, z: torch.cat([net.p.expand(2, 1, 6), z], 1),
    "rows beside": lambda net, z: torch.cat([z, z.tanh()]),
    "a vector added": lambda net, z: z * net.v - 1,
    "a map added": lambda net, z: z + net.q,
    "attention": lambda net, z: F.scaled_dot_product_attention(z, z.tanh(), z),
    "a product of its own": lambda net, z: z @ z.transpose(1, 2),
    "a product with a matrix": lambda net, z: z @ net.m,
    "a product from the left": lambda net, z: net.r @ z,
    "a product with one matrix a row": lambda net, z: z @ net.s,
    "an op without a view": lambda net, z: torch.maximum(z, net.v).expm1(),
    "a choice": lambda net, z: torch.where(z > 0, z, net.v),
    "a lookup": lambda net, z: z[:, net.i],
    "pooled": lambda net, z: F.max_pool1d(z, 2, 1),
    "interpolated": lambda net, z: F.interpolate(z, scale_factor=2.0, mode="linear"),
    "repeated": lambda net, z: z.repeat(2, 1, 1),
    "a cast": lambda net, z: z.to(torch.float32).to(z.dtype),
}


@pytest.mark.parametrize("name", STEPS)
def test_one_op(name: str):
    model = Net(
        pairs(STEPS[name]), a=nn.Linear(4, 6), norm=nn.LayerNorm(6),
        p=nn.Parameter(torch.randn(1, 1, 6)), v=nn.Parameter(torch.randn(6)),
        q=nn.Parameter(torch.randn(2, 5, 6)), m=nn.Parameter(torch.randn(6, 3)),
        r=nn.Parameter(torch.randn(3, 5)), s=nn.Parameter(torch.randn(2, 6, 3)),
    )  # fmt: skip
    model.register_buffer("i", torch.tensor([3, 0, 3]))
    fast = batched(model, (2, 5, 4), (2, 5, 4), dynamic_shapes=(({}, {}),))
    assert only(left(fast), "linear", "sigmoid") == {"linear": 1, "sigmoid": 1}


# -- anything ---------------------------------------------------------------------------------------------

LAYERS = ("conv", "wide", "norm", "relu", "pool", "scale", "add", "mul", "maximum", "before")


class Drawn(nn.Module):
    """Columns that go through the same layers; sums and products with other columns between."""

    def __init__(self, program: list[tuple[str, int, list[int]]], columns: int) -> None:
        super().__init__()
        self.program, self.columns = program, columns
        self.conv = nn.ModuleList([conv(2, 2), conv(2, 2, bias=False)])
        self.norm = nn.ModuleList([nn.BatchNorm2d(2), nn.BatchNorm2d(2)])
        self.wide = nn.Linear(4, 4)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        now, past = list(inputs), list(inputs)
        for name, which, others in self.program:
            kept = list(now)
            for t in range(self.columns):
                x, other = now[t], now[others[t]]
                if name == "conv":
                    y = self.conv[which](x).tanh()
                elif name == "norm":
                    y = self.norm[which](x)
                elif name == "wide":
                    y = self.wide(x)
                elif name == "pool":
                    y = F.max_pool2d(x, 3, 1, 1)
                elif name == "scale":
                    y = x * 0.5 if t != which else x
                elif name == "before":
                    y = x + past[t]
                elif name == "relu":
                    y = x.relu()
                else:
                    y = getattr(torch, name)(x, other)
                now[t] = y  # later columns may read it: a step that depends on the one before
            past = kept
        return now


@st.composite
def programs(draw: Any) -> tuple[Drawn, tuple[Tensor, ...]]:
    columns = draw(st.integers(2, 4))
    steps = st.tuples(
        st.sampled_from(LAYERS), st.integers(0, 1),
        st.lists(st.integers(0, columns - 1), min_size=columns, max_size=columns),
    )  # fmt: skip
    program = draw(st.lists(steps, min_size=3, max_size=9))
    inputs = tuple(
        tensor(2, 2, 4, 4, seed=draw(st.integers(0, 9)) + 10 * i) for i in range(columns)
    )
    return prepare(Drawn(program, columns)), inputs


def test_random_columns():
    """Unchecked, so that nothing is rolled back."""
    applied = 0

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
    @given(programs())
    def check(drawn: Any) -> None:
        nonlocal applied
        model, inputs = drawn
        fast = graphopt.optimize(
            model, inputs, passes=BATCH, validate=False,
            dynamic_shapes=(tuple({} for _ in inputs),),
        )  # fmt: skip
        applied += sum(one.rewrite == "batch-siblings" for one in fast.report.applied)
        other = tuple(one.flip(0) * 2 for one in inputs)
        assert_equal(output_of(fast, other), output_of(model, other))

    check()
    assert applied > 20


# -- as text ----------------------------------------------------------------------------------------------


def test_the_page():
    """docs/batching.md shows what comes out."""

    def body(net: Any, x: Tensor) -> Tensor:
        v, total = 0.0, 0.0
        for t in range(2):
            v = 0.5 * v + net.norm(net.conv(x[t]))
            total = total + net.out((v > 1).float().mean((2, 3)))
            v = v * (v <= 1)
        return total  # type: ignore[return-value]

    norm, out = nn.BatchNorm2d(4), nn.Linear(4, 5)
    model = Net(body, conv=conv(bias=False), norm=norm, out=out).eval()
    shapes: Any = (({1: torch.export.Dim("N")},),)
    session = Session(capture(model, (torch.randn(2, *IMAGE),), {}, shapes).graph)
    page = (Path(__file__).parents[2] / "docs" / "batching.md").read_text()
    for passes in ("canonicalize", "batch-siblings,canonicalize"):
        Pipeline(passes).run(session)
        rows = str(session.graph.inputs[0].meta["val"].shape[1])
        found = text(session.graph).replace(rows, "N")
        assert found in page, found


def test_entries_of_stacks_of_one_are_what_was_stacked() -> None:
    """As code for several steps does it that is given one: unsqueezed, taken apart, stacked again."""

    def body(net: Any, x: Tensor) -> Tensor:
        made = []
        for t in range(4):
            y = torch.stack([one.relu() for one in net.conv(x[:, t]).unsqueeze(0)])[0]
            z = torch.stack([one.sigmoid() for one in torch.stack([y, y + 1], 1).unbind(1)][:1])[0]
            made.append(net.out(z))
        return torch.stack(made)

    model = Net(body, conv=conv(), out=conv(4, 2))
    fast = batched(model, (2, 4, *IMAGE[1:]))
    assert left(fast)["convolution"] + left(fast)["conv2d"] == 2
    assert left(fast)["stack"] == left(fast)["select"] == 0, left(fast)
