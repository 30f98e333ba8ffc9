"""The lowered module: shapes, strides, dtypes, writes, gradients, and what is left out and why."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt.backends import triton as backend
from graphopt.backends.triton import scalars, source
from graphopt.backends.triton.runtime import load
from tests.backends.triton.helpers import assert_right, compiled, program, values
from tests.helpers import Net


def _block() -> nn.Module:
    return Net(
        lambda net, x: net.norm(x + net.two(F.gelu(net.one(x)))).softmax(-1),
        one=nn.Linear(8, 12), two=nn.Linear(12, 8), norm=nn.LayerNorm(8),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_sizes_strides_and_dtypes(dtype):
    model = _block().to(dtype)
    fast = compiled(model, values((4, 3, 8), dtype))
    for rows in (4, 1, 7):
        x = values((8, rows, 3), dtype, rows).permute(1, 2, 0)
        assert_right(fast, model, x, bound=8 * torch.finfo(dtype).eps)
    empty = fast(values((0, 3, 8), dtype).detach())
    assert empty.shape == (0, 3, 8) and empty.dtype == dtype
    assert program(fast).coverage[0] == program(fast).coverage[1] >= 16


def test_nan_and_infinity_go_where_torch_lets_them():
    def function(x):
        return x.amax(-1), x.relu(), x.clamp(-1, 1), x.softmax(-1), torch.maximum(x, x.flip(0))

    x = torch.tensor(
        [[1.0, float("nan"), 2.0], [float("inf"), 0.0, -1.0], [-float("inf"), 1.0, 2.0]]
    )
    fast = compiled(function, x)
    with torch.no_grad():
        for found, expected in zip(fast(x), function(x), strict=True):
            assert torch.equal(found.isnan(), expected.isnan())
            torch.testing.assert_close(found, expected, equal_nan=True)


def test_more_columns_than_a_tile(monkeypatch):
    monkeypatch.setattr(source, "PERSISTENT", 4)
    model = Net(
        lambda net, x: net.norm(x * 2).log_softmax(-1) + x.amax(-1, True), norm=nn.LayerNorm(13)
    )
    x = torch.randn(3, 5, 13)
    fast = compiled(model, x)
    assert_right(fast, model, x)
    assert any("for start in range" in one.source for one in program(fast).regions)


def test_dynamic_columns():
    """A batch that is reduced over."""
    x = torch.randn(6, 5)
    fast = compiled(lambda x: (x.softmax(0), x.mean(0)), x)
    for rows in (6, 1, 9):
        assert_right(fast, lambda x: (x.softmax(0), x.mean(0)), torch.randn(rows, 5))


def test_a_loop_over_as_many_steps_as_there_are_features():
    """A dynamic size may equal a static one by accident; the graph indexes up to the size given."""

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4)

        def forward(self, x):
            state = x[0]
            for step in range(1, 4):
                state = self.one(state).relu() * 0.5 + x[step]
            return state

    model, x = Loop(), torch.randn(4, 4, 4)
    fast = compiled(model, x)
    assert_right(fast, model, x)
    first = fast.kernels[0]
    assert first.bytes == 4 * (16 + 16 + 16 + 4 + 16)  # x[0], x[1] (one buffer), weight, bias; out


def test_a_sum_stays_near_its_consumers_but_is_computed_once():
    x = torch.randn(4, 8)

    def function(x):
        y = x.exp()
        return y.sum(-1, keepdim=True) + x, y

    fast = compiled(function, x)
    assert_right(fast, function, x)
    (only,) = program(fast).regions
    assert only.source.count("tl.exp") == 1


def test_groups_stay_convex():
    """The framework's op between two pointwise ops must run between two kernels."""

    def function(x):
        y = x.relu()
        return y + torch.cumsum(y, 1) * x

    x = torch.randn(4, 8)
    fast = compiled(function, x)
    assert_right(fast, function, x)
    assert len(program(fast).regions) == 2
    assert program(fast).outside == {"cumsum": "no formula for aten.cumsum.default"}


def test_buffers_are_written_and_read():
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(3))

        def forward(self, x):
            self.count += x.mean(0)
            return x * self.count

    x = torch.randn(4, 3)
    model, twin = Counter(), Counter()
    fast = graphopt.optimize(model, (x,), backend="triton")
    assert fast.report.backend == "triton"
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(fast(x), twin(x))
    torch.testing.assert_close(fast.count, twin.count)


def test_what_cannot_be_generated_is_left_with_a_reason():
    def function(x):
        y = (x + 1j).abs()
        return y**0.3 + torch.sort(x, dim=-1).values

    x = torch.randn(4, 3)
    fast = compiled(function, x)
    reasons = " | ".join(program_of(fast, x).outside.values())
    assert "no kernels for complex64" in reasons
    assert "a power with this exponent" in reasons
    with torch.no_grad():
        torch.testing.assert_close(fast(x), function(x))


def program_of(fast, *inputs):
    return fast.program(list(inputs))


def test_products_take_in_their_neighbours():
    model = Net(
        lambda net, x, y: (net.fc(F.silu(x)), net.conv(y).relu() + 1, (x @ x.transpose(1, 2)) / 3),
        fc=nn.Linear(8, 6), conv=nn.Conv2d(4, 6, 1, stride=2),
    )  # fmt: skip
    inputs = torch.randn(4, 3, 8), torch.randn(4, 4, 5, 7)
    fast = compiled(model, *inputs)
    assert_right(fast, model, *inputs)
    assert [one.kind for one in program(fast).regions] == ["product"] * 3
    assert_right(fast, model, torch.randn(1, 3, 8), torch.randn(1, 4, 7, 5).transpose(2, 3))


def test_double_products_are_the_frameworks():
    model = Net(lambda net, x: net.fc(x).relu(), fc=nn.Linear(8, 6)).double()
    x = torch.randn(2, 8, dtype=torch.float64)
    fast = compiled(model, x)
    assert_right(fast, model, x)
    assert program(fast).outside == {"linear": "products in float64"}


# -- through optimize ----------------------------------------------------------------------------


def test_optimize_lists_its_kernels():
    model, x = _block().eval(), torch.randn(4, 3, 8)
    fast = graphopt.optimize(model, (x,), backend="triton")
    assert fast.report.backend == "triton", fast.report.backend_notes
    assert {one.kind for one in fast.kernels} == {"product", "reduction"}
    for one in fast.kernels:
        assert f"def {one.name}(" in one.source
        assert one.bytes > 0 and one.flops > 0
    assert ("norm",) in [one.origins for one in fast.kernels]
    plain = graphopt.optimize(model, (x,))
    assert plain.kernels == ()
    twin = pickle.loads(pickle.dumps(fast))
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model(x))
    assert [one.name for one in twin.kernels] == [one.name for one in fast.kernels]


def test_the_report_says_why_an_op_is_the_frameworks(monkeypatch):
    model = Net(
        lambda net, x: net.two(net.pool(net.one(x).relu())).erf(),
        one=nn.Conv2d(3, 4, 3), two=nn.Conv2d(4, 4, 3), pool=nn.MaxPool2d(2),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 12, 12)
    report = graphopt.optimize(model, (x,), backend="triton").report
    assert report.backend_notes == [
        "triton: 2 kernels with 2 of 2 pointwise ops and reductions",
        "triton: the framework's: 2 x a convolution over more than one place (one, two)",
        "triton: the framework's: 1 x no formula for aten.max_pool2d.default (pool)",
    ]
    assert all(note in str(report) for note in report.backend_notes)

    def fails(dtype, x):
        raise ValueError("no such text")

    entry = dataclasses.replace(scalars.TABLE[torch.ops.aten.erf.default], text=fails)
    monkeypatch.setitem(scalars.TABLE, torch.ops.aten.erf.default, entry)
    notes = graphopt.optimize(model, (x,), backend="triton").report.backend_notes
    assert notes[0] == "triton: 1 kernel with 1 of 2 pointwise ops and reductions"
    assert notes[-1].startswith("triton: erf: no kernel: ValueError: no such text")


def test_the_report_of_a_model_captured_by_region_says_where_kernels_run():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = _block()

        def forward(self, x):
            return self.block(x) if x.sum().item() > -1e9 else x

    x = torch.randn(4, 3, 8)
    report = graphopt.optimize(Branching().eval(), (x,), backend="triton").report
    assert report.capture.method == "regional"
    assert report.backend_notes == ["triton: runs 1 of 1 regions; what was not captured runs eager"]
    assert report.regions["block"].backend_notes[0].startswith("triton: 2 kernels with")


def test_their_sources_are_kept_in_the_artifact(tmp_path):
    model, x = _block(), torch.randn(4, 3, 8)
    fast = graphopt.optimize(model, (x,), backend="triton")
    fast.save(tmp_path / "model")
    text = (tmp_path / "model" / "kernels.py").read_text()
    assert all(one.source in text for one in fast.kernels)
    again = graphopt.load(tmp_path / "model")
    torch.testing.assert_close(again(x), fast(x), rtol=0, atol=0)
    assert [one.source for one in again.kernels] == [one.source for one in fast.kernels]
    again.save(tmp_path / "model")


def test_tune_mode_trains_the_same_parameters():
    model, x = _block(), torch.randn(4, 3, 8)
    fast = graphopt.optimize(copy.deepcopy(model), (x,), mode="tune", backend="triton")
    fast(x).square().sum().backward()
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(fast.get_parameter(name).grad, parameter.grad)


def test_parameters_that_change_are_read_again():
    model, x = _block().eval(), torch.randn(4, 3, 8)
    fast = graphopt.optimize(model, (x,), backend="triton")
    with torch.no_grad():
        for one in (fast, model):
            one.get_parameter("norm.weight").mul_(3)
        torch.testing.assert_close(fast(x), model(x))


def test_without_an_interpreter_or_a_gpu_the_backend_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "no GPU" in backend.missing()
    with pytest.raises(
        graphopt.backends.base.BackendError, match="cannot run here: there is no GPU"
    ):
        graphopt.optimize(nn.ReLU(), (torch.randn(2),), backend="triton")


def test_wide_offsets_and_strides_print_and_run():
    """What more than 2^31 elements would get, on few."""
    model = Net(
        lambda net, x: (net.fc(x).relu(), x.softmax(1), x.relu().sum((0, 1))), fc=nn.Linear(8, 6)
    )
    x = torch.randn(4, 3, 8)
    fast = compiled(model, x)
    assert_right(fast, model, x)
    for region in program(fast).regions:
        wide = region.printed(region.kernel, True)
        assert "tl.program_id(0).to(tl.int64)" in wide.text
        assert wide.text.replace(".to(tl.int64)", "") != region.source or "start" not in wide.text
        launch = region.launcher()
        launch.variants[frozenset(), False] = load(wide.text, region.name), wide
        arguments = [x if node.op == "placeholder" else model.fc.get_parameter(node.name.split("_")[-1])
                     for node in region.inputs]  # fmt: skip
        arguments += [4] * len(region.sizes)
        with torch.no_grad():
            for a, b in zip(launch(*arguments), region.reference(*arguments), strict=True):
                torch.testing.assert_close(a, b)


def test_tensors_on_the_wrong_device_are_refused_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    fast = graphopt.optimize(nn.Linear(3, 3), (torch.randn(2, 3),), backend="triton")
    assert fast.report.backend == "eager"
    assert (
        "the tensors are on cpu; Triton's kernels need them on a GPU"
        in fast.report.backend_notes[0]
    )


def test_a_gradient_that_the_source_cuts_stays_cut():
    def function(x):
        return (x * x).detach() * x + x.relu()

    x = torch.randn(4, 8)
    fast = compiled(function, x)
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    fast(found).sum().backward()
    function(expected).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad)
    assert any("sets itself" in note for note in fast.notes)
