"""The specification of `quantize`: convolutions and linear maps on bytes, within a budget of the error.

The truth is the source model in float64. The quantized graph is a function of its own, which backends compute
as it stands or with kernels for bytes. `force` makes the tests independent of the processor and of what is
faster; the kernels need one that multiplies bytes.
"""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings, strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.backends import onnxruntime, openvino
from graphopt.ir.capture import capture
from graphopt.ir.driver import Session
from graphopt.ir.interpret import Interpreter
from graphopt.passes import quantize
from graphopt.passes.base import PassError
from graphopt.passes.quantize import Quantize
from graphopt.passes.quantizing.equalizing import equalized, factors_of
from graphopt.passes.quantizing.scales import Affine, affine, fitted, weight_codes
from graphopt.pipeline import Pipeline
from tests.helpers import Net, calls, output_of, randomize_norms, reasons, snapshot, tensor

FORCED = "quantize{force=true}"
DEPLOY = f"deploy,{FORCED}"
LEVEL = 1 / 255  # of the range of an activation
bytes_here = pytest.mark.skipif(
    not torch.cpu._is_vnni_supported(), reason="no instructions for int8"
)


def single(*shape: int, seed: int = 1) -> Tensor:
    return tensor(*shape, seed=seed, dtype=torch.float32)


def ready(model: nn.Module) -> nn.Module:
    """In float32 and eval mode, norms randomized."""
    return randomize_norms(model.float().eval())


def error_of(found: Any, model: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """Relative in the 2-norm, against the model in float64."""
    exact = copy.deepcopy(model).double()
    truth = output_of(exact, [x.double() if x.is_floating_point() else x for x in inputs])
    return float((found.double() - truth).norm() / truth.norm())


def quantized(model: nn.Module, *inputs: Tensor, passes: Any = DEPLOY, **options: Any) -> Any:
    """`model` on bytes: applied, the source untouched, the reported error that which is measured."""
    unchanged = snapshot(model)
    fast = graphopt.optimize(model, inputs, passes=passes, **options)
    unchanged()
    done = record(fast)
    found, source = output_of(fast, inputs), output_of(model, inputs)
    assert (found.dtype, found.shape) == (source.dtype, source.shape)
    assert 0 < error_of(found, model, inputs) <= 1.5 * done.error <= 1.5 * done.bound
    assert fast.report.check.float64_error == 0  # against the quantized graph
    return fast


def record(fast: Any) -> Any:
    found = [one for one in fast.report.applied if one.rewrite == "quantize"]
    assert len(found) == 1, reasons(fast)
    return found[0]


def refusals(fast: Any) -> list[str]:
    return [one.reason for one in fast.report.refused if one.rewrite == "quantize"]


def refusal(fast: Any) -> str:
    """The reasons, where nothing was done."""
    assert not [one for one in fast.report.applied if one.rewrite == "quantize"]
    return "\n".join(refusals(fast))


# -- scales -------------------------------------------------------------------------------------------

NUMBERS = st.floats(-(2.0**99), 2.0**99, width=32)


@given(NUMBERS, NUMBERS)
def test_integers_of_a_range(one: float, other: float) -> None:
    """Zero is an integer, and what is in the range is off by half a step at most."""
    low, high = min(one, other), max(one, other)
    by = affine(low, high)
    zero = torch.zeros(1, dtype=torch.float64)
    assert by.rounded(zero).item() == 0 and 0 <= by.zero <= 255
    assert by.scale == torch.tensor(by.scale).item()  # a float32 number
    if by == Affine(1.0, 0):
        return
    values = torch.linspace(low, high, 999, dtype=torch.float64)
    inside = values.clamp(min(low, 0.0), max(high, 0.0))
    assert float((by.rounded(inside) - inside).abs().max()) <= by.scale * (1 + 1e-5)
    middle = inside[(inside > low * 0.99) & (inside < high * 0.99)]
    if len(middle):
        assert float((by.rounded(middle) - middle).abs().max()) <= by.scale * 0.51


@given(st.integers(0, 999), st.floats(1.0, 100.0))
@settings(max_examples=20, deadline=None)
def test_a_fitted_range_is_no_worse_than_the_whole(seed: int, outlier: float) -> None:
    values = tensor(4096, seed=seed)
    values[0] *= outlier
    low, high = float(values.min()), float(values.max())

    def error(by: Affine) -> float:
        return float((by.rounded(values) - values).square().mean())

    assert error(fitted(values, low, high)) <= error(affine(low, high))


def test_a_fitted_range_leaves_out_an_outlier() -> None:
    values = torch.cat([tensor(1 << 18), torch.tensor([12.0], dtype=torch.float64)])
    by = fitted(values, float(values.min()), 12.0)
    assert (255 - by.zero) * by.scale < 10


@given(st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_codes_of_weights(seed: int) -> None:
    """Symmetric, of the least square error of each channel, a channel of zeros included."""
    weight = tensor(6, 4, 3, 3, seed=seed)
    weight[2] = 0
    weight[3] *= 1e-6
    codes, scale = weight_codes(weight)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32
    assert codes.abs().max() <= 127 and not codes[2].any() and scale[2] == 1
    whole = weight.flatten(1).abs().amax(1).clamp(min=1e-300) / 127
    rows = weight.flatten(1)
    full = ((rows / whole[:, None]).round() * whole[:, None] - rows).square().sum(1)
    found = (codes.flatten(1) * scale.double()[:, None] - rows).square().sum(1)
    assert bool((found <= full * (1 + 1e-5)).all())


# -- the graph ----------------------------------------------------------------------------------------


class Residual(nn.Module):
    """conv, norm, relu, pool, conv, relu, conv, sum, relu, pool, linear."""

    def __init__(self, wide: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, wide, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(wide)
        self.first = nn.Conv2d(wide, wide, 3, padding=1)
        self.conv = nn.Conv2d(wide, wide, 3, padding=1)
        self.fc = nn.Linear(wide, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        x = F.relu(self.conv(F.relu(self.first(x))) + x)
        x = F.relu(self.conv(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def test_golden() -> None:
    """The operators of PyTorch's own export of quantized models, around every map."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1))
        model[0].bias.zero_()
        model[2].weight.fill_(0.5)
    x = torch.linspace(-1.0, 1.0, 256).reshape(1, 1, 16, 16)
    graph = capture(model, (x,)).graph
    session = Session(graph)
    session.examples = [x]
    for stage in Pipeline("canonicalize,quantize{force=true,correct=false}").stages:
        stage.run.run(session)
    found = str(session.graph)
    names = [line.split(":")[0].strip() for line in found.splitlines()[1:-1]]
    assert [re.sub(r"(_default)?(_\d+)?$", "", one) for one in names] == [
        "quantize_per_tensor", "dequantize_per_tensor", "dequantize_per_channel", "conv2d", "relu",
        "quantize_per_tensor", "dequantize_per_tensor", "dequantize_per_channel", "conv2d",
    ], found  # fmt: skip


MAPS = {
    "plain": (nn.Conv2d(8, 6, 3), (2, 8, 7, 7)),
    "padded": (nn.Conv2d(8, 6, 3, padding=2, stride=2), (2, 8, 7, 7)),
    "grouped": (nn.Conv2d(8, 12, 3, groups=2), (2, 8, 7, 7)),
    "depthwise": (nn.Conv2d(8, 8, 3, groups=8), (2, 8, 7, 7)),
    "dilated": (nn.Conv2d(8, 6, 3, dilation=2, padding="same"), (2, 8, 7, 7)),
    "1x1": (nn.Conv2d(8, 6, 1, bias=False), (2, 8, 7, 7)),
    "linear": (nn.Linear(8, 6), (2, 3, 8)),
    "matrix": (nn.Linear(8, 6, bias=False), (5, 8)),
}


@pytest.mark.parametrize("offset", [0.0, 2.0, -2.0])
@pytest.mark.parametrize("kind", MAPS)
def test_maps(kind: str, offset: float) -> None:
    """Half a step of each factor is off at most, evenly: sqrt(1/12) steps of either in the 2-norm."""
    model, shape = MAPS[kind]
    model = copy.deepcopy(model)
    model.reset_parameters()
    x = single(*shape) + offset  # all ranges hold zero, wherever they lie
    fast = quantized(ready(model), x)
    assert record(fast).error < 8 * LEVEL
    state = fast.state_dict()
    assert state["weight"].dtype == torch.int8
    if torch.cpu._is_vnni_supported():
        packed = graphopt.optimize(model, (x,), passes=DEPLOY, backend="prepacked")
        assert_kernels(packed, x, exact=1e-5)


def assert_kernels(packed: Any, *inputs: Tensor, exact: float) -> list[str]:
    """The backend computes the quantized graph, in float64 but for what rounds to a byte, with kernels for
    bytes alone. Returns the names of its calls."""
    assert packed.report.backend == "prepacked", packed.report.backend_notes
    with torch.no_grad():
        found, eager = packed(*inputs), packed.graph_module(*inputs)
    assert float((found - eager).norm() / eager.norm()) <= exact
    program = packed.__dict__["_run"].packed
    names = [str(one.target) for one in program.graph.nodes if one.op == "call_function"]
    assert not [one for one in names if "conv2d.default" in one or "linear.default" in one]
    assert any("onednn" in one for one in names)
    return names


ACTIVATIONS = {
    "relu": F.relu, "relu6": F.relu6, "gelu": F.gelu, "tanh": torch.tanh, "silu": F.silu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"), "hardswish": F.hardswish,
    "leaky": lambda x: F.leaky_relu(x, 0.1), "sigmoid": torch.sigmoid, "exp": torch.exp,
}  # fmt: skip


@bytes_here
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("layer", [nn.Linear(16, 16), nn.Conv2d(16, 16, 3, padding=1)])
def test_activations_between_maps(kind: str, layer: nn.Module) -> None:
    """Kernels round what the graph rounds: a byte may differ where rounding in float32 decides."""
    model = ready(Net(lambda net, x: net.b(ACTIVATIONS[kind](net.a(x))), a=copy.deepcopy(layer),
                      b=copy.deepcopy(layer)))  # fmt: skip
    x = single(4, 5, 16) if isinstance(layer, nn.Linear) else single(4, 16, 6, 6)
    packed = quantized(model, x, backend="prepacked")
    names = assert_kernels(packed, x, exact=LEVEL)
    if kind in ("relu", "gelu") and isinstance(layer, nn.Linear):
        assert "exp" not in str(names) and len([one for one in names if "round" in one]) == 1


@bytes_here
def test_bytes_go_from_kernel_to_kernel() -> None:
    """The input is rounded and what the mean pools; nothing between is float32, and the pool and the sum
    are of bytes."""
    model, x = ready(Residual()), single(2, 3, 12, 12)
    packed = quantized(model, x, backend="prepacked")
    names = assert_kernels(packed, x, exact=0.02)
    assert len([one for one in names if "round_" in one]) == 2
    assert not [one for one in names if "decomposed" in one]
    assert [one for one in names if "quantized.max_pool2d" in one]
    assert [one for one in names if "qconv2d_pointwise.binary" in one]
    assert len(packed.report.backend_notes) == 1 and "5 conv" in packed.report.backend_notes[0]


@bytes_here
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_what_is_added_is_not_overwritten_before_it_is_read(flipped: bool, late: bool) -> None:
    """A kernel adds onto the bytes of the other side: a copy of these, where they are read again."""

    def body(net: Any, x: Tensor) -> Tensor:
        y = F.relu(net.a(x))
        z = F.relu(net.b(y))
        s = F.relu(y + net.c(z)) if flipped else F.relu(net.c(z) + y)
        last = net.d(s)
        return last + net.e(y) if late else last

    model = Net(body, **{one: nn.Conv2d(8, 8, 3, padding=1) for one in "abcde"})
    x = single(2, 8, 6, 6)
    packed = quantized(ready(model), x, passes=f"canonicalize,{FORCED}", backend="prepacked")
    assert any("binary" in one for one in assert_kernels(packed, x, exact=2 * LEVEL))
    again = output_of(packed, (x,))
    assert again.equal(output_of(packed, (x,)))


@bytes_here
def test_pooled_bytes_have_the_scale_of_what_is_pooled() -> None:
    """Else they would be rounded again: of silu, the maximum has another range."""
    body = lambda net, x: net.b(F.max_pool2d(F.silu(net.a(x)), 2))  # noqa: E731
    model = ready(Net(body, a=nn.Conv2d(8, 8, 3, padding=1), b=nn.Conv2d(8, 8, 1)))
    x = single(2, 8, 8, 8)
    names = assert_kernels(quantized(model, x, backend="prepacked"), x, exact=LEVEL)
    assert len([one for one in names if "round_" in one]) == 1
    assert [one for one in names if "quantized.max_pool2d" in one]


@bytes_here
def test_other_batches_and_changed_codes() -> None:
    model, x = ready(Residual()), single(4, 3, 12, 12)
    packed = quantized(model, x, backend="prepacked")
    for rows in (4, 1, 3):
        assert_kernels(packed, x[:rows], exact=0.03)
    with torch.no_grad():
        before = packed(x)
        packed.state_dict()["fc.weight_scale"].mul_(2)
        packed.state_dict()["fc.bias"].zero_()
        assert not packed(x).equal(before)
        assert_kernels(packed, x, exact=0.03)


def test_a_value_that_others_read_is_float32_for_them() -> None:
    """What rounds to a byte for a map is not rounded for a norm beside it."""

    def body(net: Any, x: Tensor) -> Tensor:
        y = net.norm(x)
        return net.b(y) + y

    model = ready(Net(body, norm=nn.LayerNorm(16), b=nn.Linear(16, 16)))
    fast = quantized(model, single(3, 16), passes=f"canonicalize,{FORCED}")
    (norm,) = [one for one in fast.graph_module.graph.nodes if "layer_norm" in str(one.target)]
    assert sorted("quantize" in str(one.target) for one in norm.users) == [False, True]


def test_weights_and_values_with_several_readers() -> None:
    """One rounding of a value and one of a weight, however many read them."""
    body = lambda net, x: net.a(x) + net.a(net.b(x)) + x  # noqa: E731
    model = ready(Net(body, a=nn.Linear(16, 16), b=nn.Linear(16, 16)))
    fast = quantized(model, single(3, 16), passes=["canonicalize", Quantize(force=True)])
    found = calls(fast)
    assert found.count("linear") == 3
    assert found.count("quantized_decomposed::dequantize_per_channel") == 2
    assert found.count("quantized_decomposed::quantize_per_tensor") == 2


def test_zeros_stay_zeros() -> None:
    """A range holds zero, so that padding adds nothing."""
    model = ready(nn.Conv2d(4, 4, 3, padding=1, bias=False))
    fast = quantized(
        model, single(1, 4, 6, 6) + 9, passes=["deploy", Quantize(0.1, correct=False, force=True)]
    )
    assert not output_of(fast, (torch.zeros(1, 4, 6, 6),)).any()


# -- biases -------------------------------------------------------------------------------------------


def test_biases_take_back_the_mean() -> None:
    """E over rows of the error of every channel: zero but for what few rows do not tell."""
    torch.manual_seed(0)
    model, x = nn.Linear(32, 24, bias=False), F.relu(single(4096, 32))
    worst = {}
    for correct in (False, True):
        fast = quantized(model.eval(), x, passes=["deploy", Quantize(correct=correct, force=True)])
        away = output_of(fast, (x,)).double() - output_of(model, (x,)).double()
        worst[correct] = float(away.mean(0).abs().max())
        error = away.norm()
    assert worst[True] < 0.1 * worst[False]
    plain = quantized(model, x, passes=["deploy", Quantize(correct=False, force=True)])
    assert error <= (output_of(plain, (x,)) - output_of(model, (x,))).double().norm()


def test_one_row_tells_no_mean() -> None:
    model, x = ready(nn.Linear(32, 24)), single(1, 32)
    fast = quantized(model, x)
    assert fast.state_dict()["bias"].equal(model.bias)


# -- equal channels -----------------------------------------------------------------------------------


class Uneven(nn.Module):
    """Channels of very different ranges, which the second map evens out."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        groups = {"depthwise": 16, "grouped": 4}.get(kind, 1)
        if kind == "linear":
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        else:
            self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, groups=groups)
        with torch.no_grad():
            ranges = torch.logspace(-2, 2, 16).view(-1, *(1 for _ in self.a.weight.shape[1:]))
            self.a.weight.mul_(ranges)
            self.a.bias.mul_(ranges.flatten())
            read = ranges.view(groups, 1, -1).expand(-1, 16 // groups, -1).flatten(0, 1)
            self.b.weight.div_(read.view(*read.shape, *(1 for _ in self.b.weight.shape[2:])))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.leaky_relu(self.a(x), 0.1))


@pytest.mark.parametrize("kind", ["linear", "plain", "depthwise", "grouped"])
def test_equal_channels_are_the_same_function_and_lose_less(kind: str) -> None:
    torch.manual_seed(0)
    model = Uneven(kind).eval()
    x = single(8, 16) if kind == "linear" else single(2, 16, 6, 6)
    graph = capture(model, (x,)).graph
    even = equalized(graph, [[x]])
    assert even is not None
    source, found = (Interpreter(one).run([x])[0] for one in (graph, even))
    assert float((source - found).abs().max()) == 0  # powers of two
    before, after = (dict(zip(graph.states, (one.states[n].tensor for n in graph.states), strict=True))
                     for one in (graph, even))  # fmt: skip
    assert any(not before[name].equal(after[name]) for name in before)
    errors = [
        record(graphopt.optimize(model, (x,), passes=["deploy", Quantize(
            9.0, equalize=one, force=True)])).error for one in (False, True)
    ]  # fmt: skip
    assert errors[1] < 0.2 * errors[0] and errors[1] < 8 * LEVEL


@given(st.integers(0, 999), st.sampled_from([1, 2, 8]))
@settings(max_examples=20, deadline=None)
def test_factors(seed: int, groups: int) -> None:
    """Powers of two that bring both ranges together; 1 where either is 0."""
    largest, weight = (
        tensor(8, seed=seed).abs().exp2() ** 4,
        tensor(16, 8 // groups, 3, seed=seed + 1),
    )
    largest[1] = 0
    if groups == 1:
        weight[:, 2] = 0
    factors = factors_of(largest, weight, groups)
    assert factors[1] == 1 and (groups > 1 or factors[2] == 1)
    assert bool((factors.log2() == factors.log2().round()).all())
    parts = weight.unflatten(0, (groups, -1)).abs().amax((1, 3)).flatten()
    known = (largest > 0) & (parts > 0)
    ratio = (largest / factors)[known].log2() - (parts * factors)[known].log2()
    assert float(ratio.max() - ratio.min()) <= 2 + 1e-9


@pytest.mark.parametrize(
    "body",
    [
        lambda net, x: net.b(F.gelu(net.a(x))),  # not homogeneous
        lambda net, x: net.b(F.relu(net.a(x))) + net.a(x),  # read twice
        lambda net, x: net.a(F.relu(net.a(x))),  # one weight
        lambda net, x: (lambda y: net.b(y) + y)(F.relu(net.a(x))),
        lambda net, x: net.b(F.relu(net.a(x) + 1)),
    ],
)
def test_channels_that_cannot_be_equalized(body: Any) -> None:
    model, x = ready(Net(body, a=nn.Linear(8, 8), b=nn.Linear(8, 8))), single(4, 8)
    assert equalized(capture(model, (x,)).graph, [[x]]) is None


def test_pooling_over_the_channels_mixes_them() -> None:
    layers = nn.Linear(16, 16), nn.ReLU(), nn.MaxPool1d(2), nn.Linear(8, 4)
    model, x = ready(nn.Sequential(*layers)), single(2, 5, 16)
    assert equalized(capture(model, (x,)).graph, [[x]]) is None
    quantized(model, x)


# -- data and budget ----------------------------------------------------------------------------------


def test_ranges_are_those_of_the_data() -> None:
    model, x = ready(nn.Linear(16, 16)), single(8, 16)
    wide = [((100 * single(8, 16, seed=seed),), None) for seed in range(3)]
    scales = []
    for data in ((), wide):
        passes = ["deploy", Quantize(budget=9, force=True, data=data)]
        fast = graphopt.optimize(model, (x,), passes=passes)
        names = {one.name: one for one in fast.graph_module.graph.nodes}
        scales.append(names["quantize_per_tensor_default"].args[1])
    assert 30 < scales[1] / scales[0] < 300


def test_all_rows_of_the_example_inputs_are_seen() -> None:
    """Checks look at two rows; ranges at all."""
    x = single(16, 16)
    x[-1] *= 50
    model = ready(nn.Linear(16, 16))
    assert record(quantized(model, x)).error < 8 * LEVEL


def test_ranges_are_those_of_all_batches() -> None:
    model, x = ready(nn.Linear(16, 16)), single(8, 16)
    data = [((scale * x,), None) for scale in (0.1, 20.0, 0.1)]
    fast = graphopt.optimize(
        model, (x,), passes=["deploy", Quantize(budget=9, force=True, data=data)]
    )
    names = {one.name: one for one in fast.graph_module.graph.nodes}
    assert names["quantize_per_tensor_default"].args[1] > 20 * float(x.max() - x.min()) / 255 / 2


def test_data_of_another_form() -> None:
    bad = [({"x": single(2, 16)}, None)]
    with pytest.raises(PassError, match="quantize: data\\[0\\]: expected inputs of the form"):
        graphopt.optimize(
            nn.Linear(16, 16).eval(), (single(2, 16),), passes=[Quantize(force=True, data=bad)]
        )


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (single(2, 16), r"data\[1\]: expected \(inputs, target\), found a Tensor"),
        ((single(2, 16).double(), None), r"data\[1\]: input input_1: expected torch.float32 \[\?, 16\], "
         r"found torch.float64 \[2, 16\]"),
        ((single(2, 8), None), r"expected torch.float32 \[\?, 16\], found torch.float32 \[2, 8\]"),
        ((single(16), None), r"expected torch.float32 \[\?, 16\], found torch.float32 \[16\]"),
    ],
)  # fmt: skip
def test_data_that_the_model_does_not_take(bad: Any, message: str) -> None:
    data = [((single(2, 16),), None), bad]
    with pytest.raises(PassError, match=f"quantize: .*{message}"):
        graphopt.optimize(
            nn.Sequential(nn.Linear(16, 16)).eval(), (single(2, 16),),
            passes=[Quantize(force=True, data=data)],
        )  # fmt: skip


def test_blank_example_inputs_say_nothing_about_ranges() -> None:
    """Normal draws stand for them, which is said."""
    model = ready(nn.Sequential(nn.Linear(16, 16)))
    passes = ["deploy", Quantize(force=True)]
    for x, drawn in ((torch.zeros(4, 16), True), (single(4, 16), False)):
        said = record(graphopt.optimize(model, (x,), passes=passes)).reason
        assert drawn == said.endswith(", on normal draws in place of blank example inputs")


def test_one_row_without_a_batch() -> None:
    model = ready(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)))
    quantized(model, single(16))


def test_data_without_rows_says_nothing() -> None:
    model = ready(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)))
    none = [((single(0, 16),), None)]
    for data, applied in ((none, 0), ([*none, ((single(4, 16),), None)], 1)):
        passes = ["deploy", Quantize(force=True, data=data)]
        fast = graphopt.optimize(model, (single(4, 16),), passes=passes)
        assert applied == sum(one.rewrite == "quantize" for one in fast.report.applied)


def test_nan_in_one_batch_is_no_range() -> None:
    """Whichever comes first."""
    model, good = ready(nn.Sequential(nn.Linear(16, 16))), single(4, 16)
    for batches in ((good, good / 0 * 0), (good / 0 * 0, good)):
        data = [((one,), None) for one in batches]
        fast = graphopt.optimize(
            model, (good,), passes=["deploy", Quantize(force=True, budget=9, data=data)]
        )
        assert "what it reads is not finite on the data" in refusal(fast)


def test_what_is_added_is_not_finite() -> None:
    """Then only the map is integers."""

    def body(net: Any, x: Tensor) -> Tensor:
        return net.c((net.b(x) + F.relu(net.a(x))).clamp(max=6.0))

    model = ready(Net(body, **{name: nn.Conv2d(3, 3, 1) for name in "abc"}))
    with torch.no_grad():
        model.a.weight.fill_(3e38)
        model.a.bias.zero_()
    x = tensor(2, 3, 6, 6, dtype=torch.float32).abs() + 1
    fast = graphopt.optimize(model, (x,), passes="canonicalize,quantize{force=true,budget=9}")
    assert record(fast).error < 9 and output_of(fast, (x,)).isfinite().all()


def test_values_that_are_not_finite_are_no_range() -> None:
    model = ready(
        Net(lambda net, x: net.a(x) + net.b(x / 0), a=nn.Linear(16, 16), b=nn.Linear(16, 16))
    )
    fast = graphopt.optimize(
        model, (single(4, 16),), passes="canonicalize,quantize{force=true,budget=1}"
    )
    assert "what it reads is not finite on the data" in refusals(fast)


class Sensitive(nn.Module):
    """Two heads, of which one is all cancellation: it needs more than bytes have."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.bad = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.bad(x + 100.0)
        return self.good(x), y - y.mean(0)


def test_over_budget_the_worst_maps_stay() -> None:
    model, x = ready(Sensitive()), single(64, 16)
    fast = graphopt.optimize(model, (x,), passes=f"canonicalize,{FORCED}")
    done = record(fast)
    assert "1 of 2 maps" in done.reason and done.error <= 0.1
    (reason,) = refusals(fast)
    assert re.match(r"alone it would put the outputs off by \d.*, all by \d", reason)
    state = fast.state_dict()
    assert state["good.weight"].dtype == torch.int8 and state["bad.weight"].dtype == torch.float32


def test_a_budget_that_nothing_keeps() -> None:
    model, x = ready(Residual()), single(2, 3, 12, 12)
    fast = graphopt.optimize(model, (x,), passes="deploy,quantize{force=true,budget=0}")
    assert re.search(r"error \d.*; the budget is 0$", refusal(fast))
    assert output_of(fast, (x,)).equal(output_of(graphopt.optimize(model, (x,)), (x,)))


def test_maps_that_are_kept() -> None:
    model, x = ready(Residual()), single(2, 3, 12, 12)
    fast = quantized(model, x, passes="deploy,quantize{force=true,keep=stem}")
    state = fast.state_dict()
    assert state["stem.weight"].dtype == torch.float32 and state["fc.weight"].dtype == torch.int8
    assert refusals(fast) == ["it is kept by 'stem'"]
    both = quantized(model, x, passes=["deploy", Quantize(keep="stem;f*", force=True)])
    # `first` fits, too
    assert (
        both.state_dict()["first.weight"].dtype
        == both.state_dict()["fc.weight"].dtype
        == torch.float32
    )


def test_what_is_kept_by_a_name_that_was_merged_into_another() -> None:
    layers = {name: nn.Linear(16, 16) for name in "qkv"}

    def body(net: Any, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(net.q(x), net.k(x), net.v(x))

    model, x = ready(Net(body, **layers, o=nn.Linear(16, 16))), single(2, 5, 16)
    model.body = lambda net, x: net.o(body(net, x))
    for name in "qkv":
        fast = graphopt.optimize(
            model, (x,), passes=f"deploy,quantize{{force=true,keep={name}.*;{name}}}"
        )
        assert f"it is kept by '{name}'" in refusals(fast) and "1 of 2 maps" in record(fast).reason


def test_a_pattern_that_keeps_nothing_is_said() -> None:
    model, x = ready(Residual()), single(2, 3, 12, 12)
    fast = quantized(model, x, passes="deploy,quantize{force=true,keep=stme}")
    assert " maps, none is called 'stme'; " in record(fast).reason


@pytest.mark.parametrize(
    "move", [lambda y: y.flatten(1), lambda y: y.permute(0, 2, 3, 1) + 1, lambda y: y]
)
def test_what_others_read_of_a_rounded_value_is_not_rounded(move: Any) -> None:
    """Behind data movement too: here the rounded map `b` has no part in the second output."""

    def body(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(net.a(x))
        return net.b(y), move(y)

    model = ready(Net(body, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 8, 3))).eval()
    x = single(2, 3, 10, 10)
    fast = graphopt.optimize(model, (x,), passes="canonicalize,quantize{force=true,keep=a}")
    assert record(fast) and fast(x)[1].equal(model(x)[1])
    assert not fast(x)[0].equal(model(x)[0])


# -- what stays ---------------------------------------------------------------------------------------

STAYS = {
    "decides by what it computes": (
        lambda net, x: net.a(x) * (net.b(x) > 0), {"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)}),
    "transposed convolution": (
        lambda net, x: net.a(x), {"a": nn.ConvTranspose2d(8, 8, 3)}),
    "rank 1, expected 2": (lambda net, x: net.a(x), {"a": nn.Conv1d(8, 8, 3)}),
    "its weight is computed from the inputs": (
        lambda net, x: F.linear(net.b(x), net.a(x)), {"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)}),
    "Attention: expected": (
        lambda net, x: F.scaled_dot_product_attention(net.a(x), x, x), {"a": nn.Linear(16, 16)}),
}  # fmt: skip
SHAPES = {
    "transposed convolution": (2, 8, 5, 5), "rank 1, expected 2": (2, 8, 9),
    "its weight is computed from the inputs": (16, 16),
}  # fmt: skip


@pytest.mark.parametrize("reason", STAYS)
def test_stays_in_float32(reason: str) -> None:
    body, modules = STAYS[reason]
    model = ready(Net(body, **copy.deepcopy(modules)))
    x = single(*SHAPES.get(reason, (2, 16, 16)))
    fast = graphopt.optimize(model, (x,), passes="canonicalize,quantize{force=true,budget=1}")
    assert any(reason in one for one in refusals(fast)), refusals(fast)


def test_embeddings_stay() -> None:
    model = nn.Sequential(nn.Embedding(9, 16), nn.Linear(16, 16)).eval()
    fast = quantized(model, torch.arange(8).reshape(2, 4) % 9, passes=f"canonicalize,{FORCED}")
    assert fast.state_dict()["0.weight"].dtype == torch.float32
    assert any(one.startswith("Embedding") for one in refusals(fast))


def test_what_is_no_faster_stays(monkeypatch: Any) -> None:
    monkeypatch.setattr(quantize, "unsupported", lambda device: "")
    fast = graphopt.optimize(nn.Linear(64, 64).eval(), (single(2, 64),), precision="int8")
    assert "its 4096 products of an input take less time than rounding" in refusal(fast)
    assert "nothing to compute in int8" in refusal(fast)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    model = nn.Linear(8, 8).eval().to(dtype)
    fast = graphopt.optimize(model, (single(2, 8).to(dtype),), passes=FORCED)
    assert refusal(fast).startswith("the model computes in ")


def test_a_quantized_graph_is_not_quantized_again() -> None:
    model, x = ready(Residual()), single(2, 3, 12, 12)
    fast = quantized(model, x, passes=f"deploy,{FORCED},{FORCED},canonicalize,materialize")
    assert fast.state_dict()["conv.weight"].dtype == torch.int8


def test_a_processor_without_the_instructions(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    fast = graphopt.optimize(ready(Residual()), (single(2, 3, 12, 12),), precision="int8")
    assert refusal(fast) == "this processor has no instructions for int8 (avx512_vnni)"
    assert quantize.unsupported("cuda") == "int8 is not known to be faster on cuda"


# -- optimize(precision=) -----------------------------------------------------------------------------


def test_precision_is_the_pass_at_the_end(monkeypatch: Any) -> None:
    monkeypatch.setattr(quantize, "unsupported", lambda device: "")
    model, x = ready(nn.Linear(1024, 1024)), single(8, 1024)
    data = [(10 * x, None)]
    fast = graphopt.optimize(model, (x,), precision="int8", data=data)
    assert fast.report.pipeline == "deploy,quantize"
    other = graphopt.optimize(model, (x,), precision="int8")
    assert record(fast).error < 8 * LEVEL and record(other).error < 8 * LEVEL
    assert error_of(output_of(fast, (x,)), model, (x,)) > 3 * error_of(
        output_of(other, (x,)), model, (x,)
    )


def test_wrong_calls() -> None:
    model, x = nn.Linear(8, 8), single(2, 8)
    with pytest.raises(ValueError, match="expected mode='deploy', found mode='tune'"):
        graphopt.optimize(model, (x,), precision="int8", mode="tune")
    with pytest.raises(ValueError, match="did you mean 'int8'"):
        graphopt.optimize(model, (x,), precision="int4")
    with pytest.raises(ValueError, match="data: expected a precision"):
        graphopt.optimize(model, (x,), data=[((x,), None)])
    with pytest.raises(PassError, match="expected at least 0"):
        Pipeline("quantize{budget=-1}")


# -- other runs of the graph --------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path: Any) -> None:
    model, x = ready(Residual()), single(2, 3, 12, 12)
    fast = quantized(model, x)
    fast.save(tmp_path / "art")
    assert output_of(graphopt.load(tmp_path / "art"), (x,)).equal(output_of(fast, (x,)))
    stream = io.BytesIO()
    torch.save(fast, stream)
    stream.seek(0)
    assert output_of(torch.load(stream, weights_only=False), (x,)).equal(output_of(fast, (x,)))


@pytest.mark.skipif(bool(onnxruntime.missing()), reason=onnxruntime.missing())
def test_onnxruntime_runs_it_or_is_found_off() -> None:
    model, x = ready(Residual()), single(2, 3, 12, 12)
    fast = quantized(model, x, backend="onnxruntime")
    notes = str(fast.report.backend_notes)
    assert (
        "QuantizeLinear" in notes if fast.report.backend == "onnxruntime" else "differ by" in notes
    )


@pytest.mark.skipif(bool(openvino.missing()), reason=openvino.missing())
def test_openvino_declines_it() -> None:
    model, x = ready(Residual()), single(2, 3, 12, 12)
    fast = quantized(model, x, backend="openvino")
    assert fast.report.backend == "eager" and "no conversion" in str(fast.report.backend_notes)


@bytes_here
def test_inductor_makes_kernels_for_bytes() -> None:
    from torch._dynamo.utils import counters

    model = ready(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)))
    x = single(16, 64)
    counters.clear()
    fast = quantized(model, x, backend="inductor")
    assert fast.report.backend == "inductor", fast.report.backend_notes
    assert counters["inductor"]["qlinear_weight_prepack_matcher_count"] >= 2
    with torch.no_grad():
        eager = fast.graph_module(x)
        assert float((fast(x) - eager).norm() / eager.norm()) < LEVEL


# -- random nets --------------------------------------------------------------------------------------

LAYERS = ("conv", "down", "relu", "gelu", "norm", "sum", "pool", "cat", "mean", "linear")


def chain(net: Any, layers: tuple[str, ...], x: Tensor) -> Tensor:
    kept = x
    for one in layers:
        if one == "conv":
            x = net.conv(x)
        elif one == "down":
            x = net.down(x)
        elif one == "relu":
            x = F.relu(x)
        elif one == "gelu":
            x = F.gelu(x)
        elif one == "norm":
            x = net.norm(x)
        elif one == "sum":
            x, kept = x + kept, x
        elif one == "pool":
            x = F.max_pool2d(x, 3, 1, 1)
        elif one == "cat":
            x = torch.cat([x[:, 4:], kept[:, :4]], 1)
        elif one == "mean":
            x = x + x.mean((2, 3), keepdim=True)
        elif one == "linear":
            x = net.fc(x.flatten(2)).unflatten(2, (6, 6))
    return x


@given(st.lists(st.sampled_from(LAYERS), min_size=1, max_size=8), st.integers(0, 99))
@settings(max_examples=15, deadline=None, phases=[Phase.generate])
def test_random_nets(layers: list[str], seed: int) -> None:
    """Each layer adds an error of a few steps; the kernels compute what the graph does, but where rounding
    in float32 decides between two bytes."""
    torch.manual_seed(seed)
    model = Net(
        lambda net, x: chain(net, ("conv", *layers), x), conv=nn.Conv2d(8, 8, 3, padding=1),
        down=nn.Conv2d(8, 8, 1), norm=nn.GroupNorm(2, 8), fc=nn.Linear(36, 36),
    ).eval()  # fmt: skip
    x = single(2, 8, 6, 6, seed=seed)
    fast = graphopt.optimize(
        model, (x,), passes=["deploy", Quantize(1.0, force=True)],
        backend="prepacked" if torch.cpu._is_vnni_supported() else "eager",
    )  # fmt: skip
    assert record(fast).error < 6 * (len(layers) + 1) * LEVEL
    with torch.no_grad():
        eager = fast.graph_module(x)
        found = output_of(fast, (x,))
    assert float((found - eager).norm() / eager.norm()) < 2 * (len(layers) + 1) * LEVEL
