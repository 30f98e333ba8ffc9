"""Capture: every module that runs gives a module that computes the same; normal form."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import graphopt
from graphopt.ir.capture import capture
from graphopt.ir.graph import written
from graphopt.ir.lint import lint
from graphopt.ir.source import copy_module, reference_run


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def assert_captured(model: nn.Module, *inputs: torch.Tensor, exact: bool = True):
    """Captured as one graph in normal form; the optimized module is the source, input by input."""
    graph = capture(copy.deepcopy(model), inputs).graph
    lint(graph)
    for node in graph.calls:
        assert all(one.op != "call_function" for one in written(node)), node.format_node()
    fast = graphopt.optimize(model, inputs)
    twin = copy.deepcopy(model)
    copies = [one.clone() for one in inputs], [one.clone() for one in inputs]
    expected, found = twin(*copies[0]), fast(*copies[1])
    pairs = zip([*copies[0], expected], [*copies[1], found], strict=True)
    for a, b in pairs:  # in-place changes of the inputs included
        assert torch.equal(a, b) if exact else torch.allclose(a, b)
    return fast


def inplace_chain(x):
    y = x + 1
    y.relu_()
    y += x
    y.mul_(2).clamp_(max=3)
    return y * y


def write_through_views(x):
    y = x * 1.5
    y[:, 0] = 7
    y[0, 1:3] += 1
    z = y.view(-1)
    z[::2].neg_()
    row = y.transpose(0, 1)[1]
    row.copy_(torch.arange(row.shape[0], dtype=x.dtype))
    y.unsqueeze(0).squeeze(0).add_(1)
    first, second = y.split(2, dim=1)
    second.zero_()
    y.narrow(1, 1, 2).mul_(3)
    return y + first.sum() + z[3]


def read_after_write(x):
    y = x.clone()
    view = y[1:]
    before = view * 2
    y.add_(1)
    return before + view


def write_to_the_input(x):
    x.mul_(2)
    x[:, 1] = 0
    return x + 1


def masked(x):
    y = x.clone()
    y.masked_fill_(x > 0, -1.0)
    y.index_fill_(1, torch.tensor([0, 2]), 5.0)
    y[y < -2] = 0
    return y


def write_to_what_is_passed_on(x):
    """Ops that hand back their argument itself, without saying so in their schema."""
    y = x * 2
    torch.dropout(y, 0.5, False)[:, 0] = 7
    torch.feature_dropout(y, 0.5, False).add_(1)
    y.type_as(x)[:, 1:].mul_(3)
    torch.nn.functional.dropout(x, 0.5, training=False).add_(1)
    return y


@pytest.mark.parametrize(
    "function",
    [
        inplace_chain,
        write_through_views,
        read_after_write,
        write_to_the_input,
        masked,
        write_to_what_is_passed_on,
    ],
    ids=lambda f: f.__name__,
)
def test_in_place_ops_become_functional(function):
    assert_captured(Lambda(function), torch.randn(3, 4))


def test_no_grad_regions_keep_their_gradient():
    def detached(x):
        with torch.no_grad():
            scale = x.norm()
        return x / scale

    tuned = graphopt.optimize(Lambda(detached), (torch.randn(3, 4),), mode="tune")
    a, b = (torch.arange(12.0).reshape(3, 4).requires_grad_() for _ in range(2))
    tuned(a).square().sum().backward()
    detached(b).square().sum().backward()
    assert torch.allclose(a.grad, b.grad)


def test_forward_hooks_are_captured_and_noted():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model[0].register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    model[0].register_forward_hook(lambda m, args, out: out + 1)
    fast = assert_captured(model, torch.randn(2, 4))
    assert any("0: 2 forward hook(s) captured" in note for note in fast.report.capture.notes)


def test_parametrizations_are_captured_and_noted():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)))
    fast = assert_captured(model, torch.randn(2, 4), exact=False)
    assert any("parametrized weight" in note for note in fast.report.capture.notes)
    assert list(fast.state_dict()) == ["0.bias", "0.weight"]


def test_training_mode_updates_the_statistics_as_the_source_does():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).train()
    x = torch.randn(4, 3, 8, 8)
    fast = graphopt.optimize(model, (x,), mode="tune")
    (record,) = [one for one in fast.report.refused if one.rewrite == "fold-batch-norm"]
    assert (record.where, "training mode" in record.reason) == ("1", True)
    source = copy.deepcopy(model)
    for _ in range(3):
        assert torch.equal(fast(x), source(x))
    for name, buffer in source.named_buffers():
        assert torch.equal(dict(fast.named_buffers())[name], buffer), name


def test_a_counter_in_a_buffer_counts():
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    fast = graphopt.optimize(Counter(), (torch.ones(2),))
    assert [fast(torch.ones(2))[0].item() for _ in range(3)] == [1, 2, 3]


def test_a_lazy_module_and_a_cache_are_captured():
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.seen = nn.LazyLinear(4), {}

        def forward(self, x):
            y = self.linear(x)
            if "scale" not in self.seen:
                self.seen["scale"] = self.linear.weight.data.abs().sum()
            return y * self.seen["scale"]

    x, model = torch.randn(3, 5), Cached()
    fast = graphopt.optimize(copy.deepcopy(model), (x,))
    assert fast.report.capture.method.startswith("export")
    torch.manual_seed(0)  # as the copy was set up with, on its first run
    assert torch.allclose(fast(x), model(x), atol=1e-6)


def test_what_a_trace_leaves_in_attributes_is_put_back():
    class Remembers(nn.Module):
        """Its forward replaces a parameter and keeps what it computes, as adapters of PEFT do."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.last = nn.Parameter(torch.eye(4)), None

        def forward(self, x):
            weight = self.weight
            del self.weight
            self.weight = weight * 2
            self.last = x @ self.weight
            result = self.last + 0
            del self.weight
            self.register_parameter("weight", weight)
            return result

    x, model = torch.randn(3, 4), Remembers()
    fast = graphopt.optimize(model, (x,))
    assert torch.equal(fast(x), 2 * x)
    copy.deepcopy(model)
    assert type(model.last) in (type(None), torch.Tensor)


class Stateful(nn.Module):
    """Keeps the states of its last run: in a buffer that is replaced, in a dictionary of attributes.
    A run starts anew, from zeros or from a state of the size of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.kept = nn.Linear(4, 4), {"v": None}
        self.register_buffer("mem", torch.zeros(0), persistent=False)

    def forward(self, x):
        current = self.linear(x)
        self.mem = torch.zeros_like(self.mem)
        if self.mem.shape != current.shape:
            self.mem = torch.zeros_like(current)
        for _ in range(2):
            self.mem = 0.5 * self.mem + current
        self.kept["v"] = [self.mem * 2]
        return self.mem + self.kept["v"][0]


@pytest.mark.parametrize("trained_on", [None, 1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 3])
def test_states_that_training_left_neither_hinder_nor_fix_the_batch(trained_on, rows):
    model = nn.Sequential(Stateful())
    if trained_on:
        model(torch.randn(trained_on, 4)).sum().backward()
    before = model[0].mem, model[0].kept["v"]
    fast = graphopt.optimize(model, (torch.randn(rows, 4),))
    assert fast.report.capture.notes == []
    assert model[0].mem is before[0] and model[0].kept["v"] is before[1]
    for other in (2, 5, 7):
        x = torch.randn(other, 4)
        assert torch.allclose(fast(x), copy_module(model)(x), atol=1e-6)


def test_reference_runs_leave_states_as_they_were_and_keep_caches():
    class Cached(Stateful):
        def forward(self, x):
            if "scale" not in self._buffers:
                self.register_buffer("scale", torch.ones(4))
            return super().forward(x) * self.scale

    model = Cached()
    before = model.mem
    _, deterministic = reference_run(model, (torch.randn(3, 4),), {})
    assert deterministic and model.mem is before and "scale" in model._buffers


def test_a_batch_that_only_a_state_fixes_is_noted():
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("memory", torch.randn(3, 4))

        def forward(self, x):
            return x + self.memory

    fast = graphopt.optimize(Strict(), (torch.randn(3, 4),))
    (note,) = fast.report.capture.notes
    assert note == "the batch is fixed to 3: the states memory are of this size"


def test_a_copy_keeps_what_shares_memory():
    model = Stateful()
    model(torch.randn(2, 4))
    model.views = [model.mem[0], model.mem]
    twin = copy_module(model)
    twin.mem.detach().add_(1)
    assert torch.equal(twin.views[0], twin.mem[0]) and twin.views[1] is twin.mem
    assert not twin.mem.requires_grad and model.mem.requires_grad
    assert not torch.equal(twin.mem, model.mem)


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.embed(tokens))

    for mode in ("deploy", "tune"):
        fast = graphopt.optimize(Tied(), (torch.randint(0, 10, (2, 3)),), mode=mode)
        assert fast.embed.weight is fast.head.weight
        assert sum(p.numel() for p in fast.parameters()) == 40


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_the_batch_is_dynamic_whatever_the_example(rows):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    fast = graphopt.optimize(model, (torch.randn(rows, 3, 8, 8),))
    for other in (1, 2, 5):
        x = torch.randn(other, 3, 8, 8)
        assert torch.allclose(fast(x), model(x), atol=1e-6)


def test_a_model_for_one_row_only_is_captured_static():
    def single(x):
        assert x.shape[0] == 1
        return x.squeeze(0) + 1

    fast = assert_captured(Lambda(single), torch.randn(1, 4))
    with pytest.raises(graphopt.InputError, match="expected float32 of shape"):
        fast(torch.randn(2, 4))


class Branchy(nn.Module):
    """A branch on data between capturable parts, a loop over a list, a shared block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(2)
        )
        self.loose = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        if x.mean() > 0:
            x = self.blocks[0](x)
        return self.loose(x)


@pytest.mark.parametrize("mode", ["deploy", "tune"])
def test_a_branch_on_data_leaves_regions(mode):
    model = Branchy().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.running_mean)
    x = torch.randn(2, 3, 8, 8)
    fast = graphopt.optimize(model, (x,), mode=mode)
    assert fast.report.capture.method == "regional"
    assert "data-dependent" in fast.report.capture.left_out[""]
    assert set(fast.report.regions) == {"stem", "blocks.0", "blocks.1"}
    assert {one.where for one in fast.report.applied if one.rewrite == "fold-batch-norm"} == {
        "stem.1", "blocks.0.1", "blocks.1.1",
    }  # fmt: skip
    (refused,) = [one for one in fast.report.refused if one.where == "loose"]
    assert "not captured" in refused.reason
    for other in (x, -x, torch.randn(5, 3, 8, 8), torch.randn(1, 3, 11, 6)):
        assert torch.allclose(fast(other), model(other), atol=1e-5)
    if mode == "tune":
        assert fast.state_dict().keys() == model.state_dict().keys()
        fast(x).sum().backward()
        model(x).sum().backward()
        gradients = {name: p.grad for name, p in fast.named_parameters()}
        for name, parameter in model.named_parameters():
            assert torch.allclose(gradients[name], parameter.grad, atol=1e-4), name
    assert torch.allclose(copy.deepcopy(fast).double()(x.double()).float(), model(x), atol=1e-5)


def test_a_module_that_nothing_captures_still_runs():
    class Stubborn(nn.Module):
        def forward(self, x):
            return x * int(x.sum().item() > 0) + len(str(x.max().item()))

    model = Stubborn()
    fast = graphopt.optimize(model, (torch.ones(3),))
    x = torch.randn(3)
    assert torch.equal(fast(x), model(x))
    assert fast.report.capture.method == "regional"
    assert fast.graph_module is None
    with pytest.raises(graphopt.ArtifactError, match="by region"):
        fast.save("nowhere")


def test_random_models_draw_what_the_source_draws():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.ReLU(), nn.Dropout(0.5)).train()
    x = torch.randn(8, 4)
    fast = graphopt.optimize(model, (x,))
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    assert torch.equal(fast(x), expected)


def test_printing_names_ops_states_and_modules():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten())
    graph = capture(model, (torch.randn(1, 3, 9, 9),)).graph
    batch = graph.inputs[0].meta["val"].shape[0]
    assert (
        str(graph).replace(str(batch), "s0")
        == """\
graph(input_1: f32[s0, 3, 9, 9])
  conv2d: f32[s0, 4, 4, 4] = Conv(input_1, @0.weight, @0.bias, stride=(2, 2), padding=(0, 0), \
dilation=(1, 1))  # 0
  relu: f32[s0, 4, 4, 4] = Relu(conv2d)  # 1
  flatten: f32[s0, 64] = Reshape(relu, shape=(s0, 64))  # 2
  return flatten"""
    )


def test_a_batch_beside_other_leading_axes_is_dynamic():
    def weighted(x, per_column):
        return x * per_column

    fast = graphopt.optimize(Lambda(weighted), (torch.randn(3, 4), torch.randn(4)))
    assert fast(torch.randn(7, 4), torch.randn(4)).shape == (7, 4)


def test_a_size_that_tracing_specializes_is_the_examples_own():
    def python_loop(x):
        return sum(row for row in x) / len(list(x))

    fast = graphopt.optimize(Lambda(python_loop), (torch.randn(1, 4),))
    x = torch.randn(1, 4)
    assert torch.allclose(fast(x), python_loop(x))


def test_a_list_of_views_taken_before_a_write():
    def late(x):
        y = x * 2
        parts = y.split(2, dim=1)
        y.add_(1)
        return parts[0] + parts[1]

    assert_captured(Lambda(late), torch.randn(3, 4))


class Unrolled(nn.Module):
    """A loop over the first axis, which tracing fixes to the size it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        total = torch.zeros_like(x[0])
        for step in self.linear(x.flatten(0, 1)).unflatten(0, x.shape[:2]):
            total = total * 0.5 + step
        return total


def test_sizes_that_tracing_fixed_are_not_dynamic():
    model, x = Unrolled().double(), torch.randn(3, 2, 4, dtype=torch.float64)
    graph = capture(copy.deepcopy(model), (x,)).graph
    assert all(isinstance(size, int) for node in graph.inputs for size in node.meta["val"].shape)
    fast = assert_captured(model, x, exact=False)
    assert fast.report.rolled_back == []
    with pytest.raises(ValueError, match=r"expected float64 of shape \[3, 2, 4\]"):
        fast(torch.randn(4, 2, 4, dtype=torch.float64))
