"""OptimizedModule: what a user may do with the result."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt.module import InputError
from graphopt.verify import SiteValidator


class Pair(NamedTuple):
    first: torch.Tensor
    rest: dict[str, Any]


class Model(nn.Module):
    """Keywords, defaults, structured inputs and outputs, tied weights, a transient buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)
        self.tied = nn.Linear(4, 5)
        self.tied.weight = self.head.weight
        self.register_buffer("offset", torch.arange(5.0), persistent=False)

    def forward(self, image, extra=None, *, scale: float = 1.0):
        features = self.norm(self.conv(image)).relu().mean((2, 3))
        out = self.head(features) + self.tied(features.sin()) + self.offset
        if extra is not None:
            out = out + extra["bias"]
        return Pair(out * scale, {"features": features, "count": 3, "none": None})


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = Model()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(model.norm.weight)
    return model.eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(1, 3, 8, 8)


@pytest.fixture
def fast(model, x) -> graphopt.OptimizedModule:
    return graphopt.optimize(model, (x,))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() <= 1e-5 * b.norm())


def test_same_signature_and_pytree_outputs(model, fast, x):
    found, expected = fast(image=x), model(x)
    assert isinstance(found, Pair)
    assert found.rest.keys() == expected.rest.keys()
    assert (found.rest["count"], found.rest["none"]) == (3, None)
    assert close(found.first, expected.first)
    assert close(fast(x, None, scale=1.0).first, expected.first)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_batch_is_dynamic(model, fast, rows):
    x = torch.randn(rows, 3, 8, 8)
    assert close(fast(x).first, model(x).first)


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((torch.randn(1, 3, 9, 8),), {}, "input image: expected float32 of shape [any, 3, 8, 8], "
         "found shape [1, 3, 9, 8]"),
        ((torch.randn(3, 8, 8),), {}, "found shape [3, 8, 8]"),
        (("text",), {}, "found str"),
        ((), {}, "input image is missing"),
        ((torch.randn(1, 3, 8, 8),), {"scale": 2.0}, "scale was not given when"),
        ((torch.randn(1, 3, 8, 8),), {"size": 2}, "unexpected input size"),
        ((torch.randn(1, 3, 8, 8),), {"extra": {"bias": torch.ones(5)}}, "extra was not given"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit_are_explained(fast, args, kwargs, words):
    with pytest.raises(graphopt.InputError) as caught:
        fast(*args, **kwargs)
    assert words in str(caught.value)


def test_structured_inputs(model, x):
    extra = {"bias": torch.randn(1, 5)}
    fast = graphopt.optimize(model, (x, extra), {"scale": 0.5})
    assert close(fast(x, extra, scale=0.5).first, model(x, extra, scale=0.5).first)
    with pytest.raises(
        graphopt.InputError, match=r"scale is 2\.0; the model was captured with 0.5"
    ):
        fast(x, extra, scale=2.0)


@pytest.mark.parametrize("mode", ["deploy", "tune"])
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles(model, x, mode, copier):
    fast = graphopt.optimize(model, (x,), mode=mode)
    twin = copier(fast)
    assert torch.equal(twin(x).first, fast(x).first)
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in fast.named_parameters()]
    assert twin.head.weight is twin.tied.weight
    assert len(twin.report.applied) == len(fast.report.applied)
    with torch.no_grad():
        twin.head.weight.zero_()
    assert not torch.equal(twin(x).first, fast(x).first)


def test_exports_again(model, fast, x):
    program = torch.export.export(fast, (x,))
    assert close(program.module()(x).first, model(x).first)


def test_is_optimized_again(model, fast, x):
    assert close(graphopt.optimize(fast, (x,))(x).first, model(x).first)


def test_moves_to_another_dtype(model, fast, x):
    found = copy.deepcopy(fast).double()(x.double())
    expected = copy.deepcopy(model).double()(x.double())
    assert found.first.dtype == torch.float64
    assert close(found.first, expected.first)


def test_example_inputs_move_too(fast, x):
    assert copy.deepcopy(fast).double().example_inputs()[0][0].dtype == torch.float64


def test_dtypes_written_into_the_graph_move_too():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x) @ torch.ones(4, 4, dtype=x.dtype)

    fast = graphopt.optimize(Masked(), (torch.randn(2, 4),), mode="tune", passes="canonicalize")
    assert fast.double()(torch.randn(2, 4).double()).dtype == torch.float64


def test_state_dict_round_trips(model, x):
    tuned = graphopt.optimize(model, (x,), mode="tune")
    assert tuned.state_dict().keys() == model.state_dict().keys()
    other = Model().eval()
    tuned.load_state_dict(other.state_dict())
    assert close(tuned(x).first, other(x).first)
    deployed = graphopt.optimize(model, (x,))
    twin = graphopt.optimize(other, (x,))
    twin.load_state_dict(deployed.state_dict())
    assert torch.equal(twin(x).first, deployed(x).first)


def test_the_graph_module_is_plain_and_shares_the_parameters(fast, x):
    assert isinstance(fast.graph_module, torch.fx.GraphModule)
    assert torch.equal(fast.graph_module(x).first, fast(x).first)
    assert fast.graph_module.conv.weight is fast.conv.weight


def test_the_source_model_is_not_touched(model, x):
    model.train()
    model.norm.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calls = []
    handle = model.conv.register_forward_hook(lambda *a: calls.append(1))
    modes = {name: one.training for name, one in model.named_modules()}
    ids = {name: id(p) for name, p in model.named_parameters()}
    rng = torch.get_rng_state()
    graphopt.optimize(model, (x,))
    assert torch.equal(rng, torch.get_rng_state())
    assert modes == {name: one.training for name, one in model.named_modules()}
    assert ids == {name: id(p) for name, p in model.named_parameters()}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert handle.id in model.conv._forward_hooks


def test_the_report_is_data_and_text(fast):
    text = json.dumps(fast.report.to_dict(), allow_nan=False)
    again = graphopt.Report.from_dict(json.loads(text))
    assert str(again) == str(fast.report)
    for word in ("fold-batch-norm", "deploy", "float64", "batch norms 1 -> 0"):
        assert word in text or word in str(fast.report)
    report = fast.report
    assert report.before.parameters > report.after.parameters
    assert report.before.nodes > report.after.nodes
    assert report.before.flops > report.after.flops
    assert {name for name, _ in report.passes} >= {"canonicalize", "materialize"}
    for record in report.applied:
        assert record.error <= record.bound or record.error == record.bound == 0


def test_records_say_where_and_how_exactly(fast):
    (record,) = [one for one in fast.report.applied if one.rewrite == "fold-batch-norm"]
    assert record.where == "norm"
    assert record.contract == "Algebraic"
    assert 0 <= record.error <= record.bound < 1e-12


# -- artifacts ----------------------------------------------------------------------------------


def test_saves_and_loads(fast, x, tmp_path):
    fast.save(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "graph.json", "manifest.json", "weights.safetensors",
    ]  # fmt: skip
    again = graphopt.load(tmp_path / "model")
    assert torch.equal(again(x).first, fast(x).first)
    assert str(again.report) == str(fast.report)
    assert again.head.weight is again.tied.weight
    assert again.state_dict().keys() == fast.state_dict().keys()
    with pytest.raises(graphopt.InputError):
        again(torch.randn(1, 4, 8, 8))
    fast.save(tmp_path / "model")  # an artifact may be replaced
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_tuned_model_trains_after_loading(model, x, tmp_path):
    tuned = graphopt.optimize(model, (x,), mode="tune")
    tuned.save(tmp_path / "model")
    again = graphopt.load(tmp_path / "model")
    again(x).first.sum().backward()
    model(x).first.sum().backward()
    for (name, a), (_, b) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert close(a.grad, b.grad), name


def test_saving_twice_gives_the_same_bytes(fast, tmp_path):
    fast.save(tmp_path / "a")
    copy.deepcopy(fast).save(tmp_path / "b")
    for name in ("graph.json", "weights.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("name", ["graph.json", "weights.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_artifacts_are_refused(fast, tmp_path, name, damage):
    fast.save(tmp_path / "model")
    file = tmp_path / "model" / name
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.unlink()
    with pytest.raises(graphopt.ArtifactError, match=name):
        graphopt.load(tmp_path / "model")


def test_a_manifest_that_is_not_one(tmp_path):
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(graphopt.ArtifactError, match="not a JSON object"):
        graphopt.load(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(graphopt.ArtifactError, match="format 99, expected 2"):
        graphopt.load(tmp_path)
    with pytest.raises(graphopt.ArtifactError, match="is not a graphopt artifact"):
        graphopt.load(tmp_path / "nowhere")


def test_saving_never_destroys_what_is_there(fast, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(graphopt.ArtifactError, match="not overwriting"):
        fast.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"

    fast.save(tmp_path / "model")
    before = (tmp_path / "model" / "manifest.json").read_text()
    import safetensors.torch

    def full(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="disk full"):
        fast.save(tmp_path / "model")
    assert (tmp_path / "model" / "manifest.json").read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "model"]


def test_loading_looks_up_nothing_but_ops(fast, tmp_path):
    """A graph that names a Python function outside the list is refused, hash intact or not."""
    from graphopt.artifact import dismantle, rebuild

    graph, *rest = dismantle(fast)
    for target in ("os.system", "builtins.eval", "operator.attrgetter"):
        node = next(one for one in graph["nodes"] if one["op"] == "call_function")
        node["target"] = target
        with pytest.raises(graphopt.ArtifactError, match="unknown op"):
            rebuild(graph, *rest)


# -- without inputs -----------------------------------------------------------------------------


class Declared(nn.Linear):
    example_input_array = torch.randn(2, 4)


def test_declared_inputs_are_used():
    assert graphopt.optimize(Declared(4, 3)).report.capture.method == "export"

    class Dummy(nn.Linear):
        @property
        def dummy_inputs(self):
            return {"input": torch.randn(2, 4)}

    assert graphopt.optimize(Dummy(4, 3)).report.capture.method == "export"


@pytest.mark.parametrize("mode", ["deploy", "tune"])
def test_else_the_first_call_captures(model, x, mode):
    fast = graphopt.optimize(model, mode=mode)
    assert fast.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(RuntimeError, match="not captured yet"):
        _ = fast.report
    assert close(fast(x).first, model(x).first)
    assert fast.report.after.batch_norms == 0
    assert close(fast(x).first, model(x).first)


def test_what_is_set_before_the_first_call_stays(model, x):
    fast, seen = graphopt.optimize(model), []
    fast.register_forward_hook(lambda *_: seen.append("hook"))
    fast.note = "mine"
    fast.double()
    assert close(fast(x.double()).first, copy.deepcopy(model).double()(x.double()).first)
    assert seen == ["hook"] and fast.note == "mine"
    twin = copy.deepcopy(fast)
    twin(x.double())
    assert seen == ["hook"] * 2 and twin.note == "mine"


def test_under_inference_mode(model, x):
    """Captured there, on the first call too, it is as outside: trainable, and changed weights are noticed."""
    for given in ((x,), None):
        with torch.inference_mode():
            fast = graphopt.optimize(model, given, mode="tune", backend="prepacked")
            assert close(fast(x).first, model(x).first)
        assert not any(one.is_inference() for one in fast.parameters())
        fast(x).first.sum().backward()
        assert all(one.grad is not None for one in fast.parameters() if one.requires_grad)
        before = fast(x).first
        with torch.no_grad():
            fast(x)
            for one in fast.parameters():
                one.mul_(1.5)
            assert not close(fast(x).first, before)


def test_two_threads_call_first_at_once(model, x):
    from concurrent.futures import ThreadPoolExecutor

    def call(fast):
        with torch.no_grad():
            return fast(x).first

    for backend in ("eager", "prepacked"):
        fast = graphopt.optimize(model, backend=backend)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(call, [fast] * 8))
        assert all(close(one, model(x).first) for one in found)
        assert fast.report.backend == backend


class Switch(nn.Linear):
    def forward(self, x, times=1, table=None):
        return super().forward(x) * times


@pytest.mark.parametrize("value", [True, 1.0, torch.ones(2, 3), np.ones(3)])
def test_a_constant_is_told_from_others_that_are_equal(value):
    fast = graphopt.optimize(Switch(4, 3), (torch.randn(2, 4), 1))
    fast(torch.randn(2, 4), 1)
    with pytest.raises(InputError, match="the model was captured with 1"):
        fast(torch.randn(2, 4), value)
    with pytest.raises(InputError, match="input table was not given"):
        fast(torch.randn(2, 4), 1, table=value)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m, x: graphopt.optimize(lambda x: x, (x,)), TypeError, "expected an nn.Module"),
        (lambda m, x: graphopt.optimize(m, (x,), mode="fast"), ValueError, "unknown mode 'fast'"),
        (
            lambda m, x: graphopt.optimize(m, (x,), backend="egaer"),
            ValueError,
            "did you mean eager",
        ),
        (lambda m, x: graphopt.optimize(m, 3), TypeError, "expected a tuple of inputs"),
    ],
)
def test_arguments_of_the_wrong_kind(model, x, call, error, words):
    with pytest.raises(error, match=words):
        call(model, x)


SHARING = {
    "a constant": lambda x: torch.tensor([2, 0, 1]),
    "a view of x * 1": lambda x: (x * 1)[:, :1],
    "a view of a copy": lambda x: x.clone()[:, :2],
    "a copy, detached, and itself": lambda x: (lambda v: ((v * 1).detach(), v))(x.relu()),
    "views of equal values": lambda x: ((x + 1).view(-1), (x + 1).view(-1)),
    "a copy in another layout, and flattened": lambda x: (lambda v: (v, v.flatten()))(
        x.relu().T.contiguous().T
    ),
    "a copy through eval dropout": lambda x: F.dropout(x.clone(), 0.5, training=False),
}


@pytest.mark.parametrize("name", SHARING)
def test_outputs_share_no_memory_that_the_sources_do_not_share(name):
    class Model(nn.Module):
        def forward(self, x):
            return SHARING[name](x)

    def memory(values) -> list[int]:
        return [one.untyped_storage().data_ptr() for one in values]

    x = torch.randn(5, 3)
    fast = graphopt.optimize(Model(), (x,))
    found = fast(x)
    found = found if isinstance(found, tuple) else (found,)
    places = memory(found)
    assert len(set(places)) == len(places)
    assert not set(places) & set(memory([x, *fast.buffers()]))


def test_a_batch_that_becomes_another_axis_is_not_cut_for_the_check():
    class Transposes(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm1d(1), nn.Conv1d(1, 1, 3)

        def forward(self, x):
            return self.conv(self.norm(x).permute(2, 1, 0))

    report = graphopt.optimize(Transposes().eval(), (torch.randn(5, 1, 1),)).report
    assert report.check.ok and not report.rolled_back and report.after.batch_norms == 0


@pytest.mark.parametrize(("body", "rows"), [
    (lambda x: x * 2, 2),
    (lambda x: x.unflatten(1, (3, 2)).permute(1, 0, 2).unbind(0)[0] * 2, 2),  # as heads of attention
    (lambda x: (x.T @ x).inverse(), 8),  # of two rows it has none
    (lambda x: x.T * 2, 8),
])  # fmt: skip
def test_two_rows_are_checked_where_no_computation_is_along_the_batch(monkeypatch, body, rows):
    class Model(nn.Module):
        def forward(self, x):
            return body(x)

    checked = []
    make = SiteValidator.__init__

    def seen(self, graph, inputs):
        checked.append(len(inputs[0]))
        make(self, graph, inputs)

    monkeypatch.setattr(SiteValidator, "__init__", seen)
    report = graphopt.optimize(Model(), (torch.randn(8, 6),)).report
    assert report.check.ok and checked == [rows]


def test_a_batch_that_must_have_some_size_is_cut_to_that():
    class Steps(nn.Module):
        def forward(self, x):
            return sum(x[t] for t in range(4)) * 1

    report = graphopt.optimize(Steps(), (torch.randn(6, 3),)).report
    assert report.check.ok and report.applied
