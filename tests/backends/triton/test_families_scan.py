"""Recurrences that were unrolled over steps run as one kernel, whatever the step is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from graphopt.backends.triton.families import scan
from graphopt.backends.triton.families.strided import layout
from tests.backends.triton.family_helpers import PHASES, Matched, assert_right, matched

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def spike(v: Tensor, threshold: Any = 1.0) -> Tensor:
    return (v >= threshold).to(v.dtype)


def integrate(x: Tensor, state: Any, w: Tensor) -> Any:
    (v,) = state
    v = v + x
    s = spike(v)
    return s, (v * (1 - s),)


def leaky(x: Tensor, state: Any, w: Tensor) -> Any:
    """A decay of every channel, hard reset to a value."""
    (v,) = state
    v = v + (x - v) * w
    s = spike(v)
    return s, (torch.where(s > 0, 0.25, v),)


def soft(x: Tensor, state: Any, w: Tensor) -> Any:
    (v,) = state
    v = v * 0.5 + x
    s = spike(v, w + 0.5)
    return s, (v - s * w,)


def adaptive(x: Tensor, state: Any, w: Tensor) -> Any:
    v, a = state
    v = v + x
    s = spike(v - a)
    return s, (v - s, a * 0.5 + s * w)


def synaptic(x: Tensor, state: Any, w: Tensor) -> Any:
    i, v = state
    i = i * 0.5 + x
    v = v * w + i
    s = spike(v)
    return s, (i, torch.where(s > 0, torch.zeros_like(v), v))


NEURONS = {integrate: 1, leaky: 1, soft: 1, adaptive: 2, synaptic: 2}


def unrolled(neuron: Any, steps: int, axis: int, start: str, result: str) -> Any:
    """A network of one layer of neurons, as PyTorch code has it."""

    def run(x: Tensor, w: Tensor, *given: Tensor) -> Any:
        inputs = x.unbind(axis)
        empty = torch.zeros_like(inputs[0])
        state: Any = {"zeros": [empty] * NEURONS[neuron], "number": [0.0] * NEURONS[neuron],
                      "given": given[: NEURONS[neuron]]}[start]  # fmt: skip
        spikes = []
        for t in range(steps):
            s, state = neuron(inputs[t], state, w)
            spikes.append(s)
        if result == "list":
            return spikes
        if result == "rate":
            return sum(spikes[1:], spikes[0]) / steps
        return torch.stack(spikes, axis), state[0]

    return run


def quarters(shape: Any, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Multiples of 1/4, so that spikes do not hang on rounding and thresholds are met exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 9, tuple(shape), generator=generator).to(dtype) / 4


def only(one: Matched) -> scan.Scan:
    assert not one.reasons
    (region,) = one.found.regions
    assert isinstance(region, scan.Scan)
    return region


@settings(max_examples=12, phases=PHASES)
@given(
    st.sampled_from(sorted(NEURONS, key=lambda one: one.__name__)), st.integers(2, 10), st.data()
)
def test_every_neuron_is_one_kernel(neuron: Any, steps: int, data: Any):
    start = data.draw(st.sampled_from(("zeros", "number", "given")))
    result = data.draw(st.sampled_from(("stack and state", "list", "rate")))
    dtype = data.draw(st.sampled_from(FLOATS))
    rest = data.draw(st.sampled_from(((7,), (2, 3), (2, 3, 2, 5))))
    axis = data.draw(st.integers(0, len(rest)))
    x = quarters((*rest[:axis], steps, *rest[axis:]), dtype, steps)
    if data.draw(st.booleans()):  # any memory format
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    w = torch.tensor([0.5, 0.25]).to(dtype)[torch.arange(rest[0]) % 2]
    w = w.reshape(rest[0], *(1,) * (len(rest) - 1)) if data.draw(st.booleans()) else w[0]
    function = unrolled(neuron, steps, axis, start, result)
    inputs = [x, w, *(quarters(rest, dtype, seed) for seed in (1, 2))]
    one = matched(scan.match, function, *inputs)
    region = only(one)
    pointwise = {node for node in one.graph.nodes if node.meta.get("kind") == "pointwise"}
    if result != "rate":
        assert pointwise <= set(region.nodes)
    assert region.source.count("tl.load(x0_ptr") == 1
    assert_right(one, function, *inputs)


def separate(a: Tensor, b: Tensor, c: Tensor, v: Tensor) -> Any:
    spikes = []
    for x in (a, b, c):
        s, (v,) = leaky(x, (v,), torch.tensor(0.5))
        spikes.append(s)
    return torch.stack(spikes), v


def test_steps_may_come_as_tensors_of_their_own():
    """As from a network that runs layer by layer within a step; strides may differ."""
    inputs = [quarters((3, 5), torch.float32, seed) for seed in range(4)]
    inputs[1] = inputs[1].T.contiguous().T
    one = matched(scan.match, separate, *inputs)
    assert len(only(one).inputs) >= 4
    assert_right(one, separate, *inputs)


def backwards(x: Tensor) -> Tensor:
    v, spikes = torch.zeros_like(x[0]), []
    for t in reversed(range(4)):
        s, (v,) = soft(x[t], (v,), 1.0)
        spikes.insert(0, s)
    return torch.stack(spikes, 1)


def test_time_may_run_backwards():
    x = quarters((4, 6), torch.float32)
    one = matched(scan.match, backwards, x)
    assert [node.target for node in only(one).outputs] == [torch.ops.aten.cat.default]
    assert_right(one, backwards, x)


def test_batch_is_dynamic_and_may_be_empty_or_one():
    function = unrolled(leaky, 4, 1, "zeros", "stack and state")
    w = torch.rand(3, 1)
    one = matched(scan.match, function, quarters((5, 4, 3, 6), torch.float32), w)
    assert only(one).sizes
    for rows in (0, 1, 2, 9):
        assert_right(one, function, quarters((rows, 4, 3, 6), torch.float32), w)


def test_many_steps_are_a_loop_and_few_are_unrolled():
    texts = []
    for steps in (4, 12):
        function = unrolled(soft, steps, 0, "zeros", "stack and state")
        region = only(
            matched(scan.match, function, quarters((steps, 5), torch.float32), torch.ones(()))
        )
        texts.append(region.source)
    assert "for t in tl.static_range(0, 4):" in texts[0]
    assert "for t in range(0, 12):" in texts[1]


def test_bytes_are_those_of_one_pass():
    function = unrolled(integrate, 6, 0, "zeros", "stack and state")
    region = only(matched(scan.match, function, quarters((6, 10), torch.float32), torch.ones(())))
    assert region.bytes == 4 * (6 * 10 + 6 * 10 + 10)
    assert region.flops > 0


def recurrent(x: Tensor) -> Tensor:
    v = s = torch.zeros_like(x[0])
    spikes = []
    for t in range(4):
        s, (v,) = soft(x[t] + s.cumsum(-1), (v,), 1.0)
        spikes.append(s)
    return torch.stack(spikes)


def uneven(x: Tensor) -> Tensor:
    v, spikes = torch.zeros_like(x[0]), []
    for t in range(5):
        s, (v,) = soft(x[t] * (1.0 + t), (v,), 1.0)
        spikes.append(s)
    return torch.stack(spikes)


def alternating(x: Tensor) -> Tensor:
    """Two thresholds take turns."""
    v, spikes = torch.zeros_like(x[0]), []
    mean = x.mean(0)
    low, high = mean.abs() + 1, mean.abs() + 2
    for t in range(4):
        s, (v,) = soft(x[t], (v,), (low, high)[t % 2])
        spikes.append(s)
    return torch.stack(spikes)


def longer(x: Tensor) -> Tensor:
    """Reads the state of two steps before."""
    a = b = torch.zeros_like(x[0])
    spikes = []
    for t in range(5):
        v = x[t] * a + b
        a, b = b, v
        spikes.append(v)
    return torch.stack(spikes)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (recurrent, "cumsum.default) between steps is not pointwise"),
        (uneven, "steps 1 and 2 differ"),
        (alternating, "steps 1 and 2 differ"),
        (longer, "of more than one step before"),
    ],
)
def test_what_is_no_scan_is_refused_with_the_operation(function: Any, reason: str):
    x = quarters((5, 6), torch.float64)
    one = matched(scan.match, function, x)
    assert not one.found.regions
    assert any(reason in found for found in one.reasons), one.reasons
    assert_right(one, function, x)


def apart(x: Tensor) -> Tensor:
    return torch.stack([torch.relu(x[t]) * 2 for t in range(4)])


def single(x: Tensor) -> Tensor:
    return torch.stack([integrate(x[0], (torch.zeros_like(x[0]),), x)[0]])


def residual(x: Tensor, w: Tensor) -> Tensor:
    for _ in range(4):
        x = torch.relu(x + torch.relu(x @ w))
    return x


def test_what_only_looks_alike_is_left_alone():
    x = quarters((4, 6), torch.float64)
    for function in (apart, single):
        assert not matched(scan.match, function, x).found.regions
    one = matched(scan.match, residual, x, torch.eye(6, dtype=torch.float64))
    assert not one.found.regions
    assert not one.reasons


def test_offsets_have_64_bits_where_32_do_not_reach():
    small, large = torch.empty(4, 8, device="meta"), torch.empty(1 << 16, 1 << 15, device="meta")
    assert not layout(small.shape, [small])[0].wide
    assert layout(large.shape, [large])[0].wide
    assert layout(small.shape, [small], extent=1 << 31)[0].wide


def test_axes_merge_as_far_as_all_strides_allow():
    plain, rows = torch.empty(2, 3, 4), torch.empty(3, 1)
    assert layout(plain.shape, [plain, plain])[0].rank == 1
    where, values = layout(plain.shape, [plain, rows])
    assert where.kinds == ("ss1", "010")
    assert values == [3, 4, 12, 4]
    assert where.offset(1, "w") == " + i1"
