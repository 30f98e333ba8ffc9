"""torch.compile(model, backend="graphopt") computes what the model does, now and after its weights change."""

from __future__ import annotations

import copy
import importlib.metadata
import logging

import pytest
import torch
from torch import nn

from graphopt import dynamo
from tests.helpers import Net, Spike, randomize_norms

pytestmark = pytest.mark.filterwarnings("ignore")
LIMIT = 1e-5


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)
        self.register_buffer("scale", torch.tensor([1.0, -2.0, 0.5, 3.0]))

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)) * self.scale)


class Transformer(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 17)
        self.register_buffer("positions", torch.arange(64))

    def forward(self, ids):
        return self.head(
            self.layers(self.embed(ids) + self.embed(self.positions[: ids.shape[1]] % 17))
        )


@pytest.fixture
def made(monkeypatch) -> list[dynamo.Compiled]:
    """Every graph that the backend gets in a test."""
    found: list[dynamo.Compiled] = []

    class Noted(dynamo.Compiled):
        def __init__(self, module, options) -> None:
            super().__init__(module, options)
            found.append(self)

    monkeypatch.setattr(dynamo, "Compiled", Noted)
    torch._dynamo.reset()
    return found


def compiled(model: nn.Module, **options):
    return torch.compile(model, backend=dynamo.backend, options=options)


def states(made: list[dynamo.Compiled]) -> list[str]:
    return [one.state for one in made]


def close(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=LIMIT, atol=LIMIT)


def image(rows: int) -> torch.Tensor:
    return torch.randn(rows, 3, 8, 8)


def convnet() -> nn.Module:
    return randomize_norms(ConvNet()).eval()


def change(model: nn.Module) -> None:
    """Write other values, signs and zeros among them, to every floating weight and statistic."""
    with torch.no_grad():
        for name, one in model.state_dict().items():
            if one.is_floating_point():
                one.copy_(torch.rand_like(one) + 0.5 if "var" in name else torch.randn_like(one))
                if one.ndim and "var" not in name:
                    one[0] = 0


def test_it_is_found_by_name(made):
    entries = importlib.metadata.entry_points(group="torch_dynamo_backends")
    if "graphopt" not in entries.names:
        pytest.skip("installed before it had the entry point: pip install -e .")
    assert entries["graphopt"].load() is dynamo.backend
    model, x = convnet(), image(2)
    with torch.no_grad():
        close(torch.compile(model, backend="graphopt")(x), model(x))
    assert states(made) == ["tune"]


@pytest.mark.parametrize("mode", ["tune", "deploy"])
def test_weights_that_change_are_in_the_next_result(made, mode):
    model, x = convnet(), image(2)
    fast = compiled(model, mode=mode)
    with torch.no_grad():
        fast(x)
        assert states(made) == [mode]
        for _ in range(2):
            close(fast(x), model(x))
            change(model)
        model.load_state_dict(convnet().state_dict(), assign=True)
        close(fast(x), model(x))
        model.norm.running_mean = torch.ones(4)
        close(fast(x), model(x))


def test_deploy_folds_and_ends_that_when_weights_keep_changing(made):
    model, x = convnet(), image(2)
    fast = compiled(model, mode="deploy")
    with torch.no_grad():
        fast(x)
        report = made[0].report
        assert report.mode == "deploy" and report.after.batch_norms == 0
        for _ in range(dynamo.ANEW + 1):
            model.conv.weight.mul_(1.5)
            close(fast(x), model(x))
    assert states(made) == ["tune"]


@pytest.mark.parametrize("mode", ["tune", "deploy"])
def test_batches_of_any_size(made, mode):
    model = convnet()
    fast = compiled(model, mode=mode)
    with torch.no_grad():
        for rows in (2, 3, 1):
            x = image(rows)
            close(fast(x), model(x))
    assert set(states(made)) == {mode}


@pytest.mark.parametrize(
    "options", [{}, {"mode": "deploy", "backend": "prepacked"}], ids=["tune", "deploy"]
)
def test_a_transformer_on_sequences_of_any_length(made, options):
    model = Transformer().eval()
    fast = compiled(model, **options)
    with torch.no_grad():
        for shape in ((2, 5), (3, 9), (4, 7)):
            ids = torch.randint(0, 17, shape)
            close(fast(ids), model(ids))
    assert all(one == options.get("mode", "tune") for one in states(made))


@pytest.mark.parametrize("mode", ["tune", "deploy"])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_and_statistics_are_those_of_the_model(made, mode, training):
    """Two steps of training, statistics of batch norms included."""
    model = convnet().train(training)
    twin = copy.deepcopy(model)
    fast = compiled(model, mode=mode)
    optimizers = [torch.optim.SGD(one.parameters(), 0.1) for one in (model, twin)]
    for _ in range(2):
        x = image(3)
        for optimizer, one in zip(optimizers, (fast, twin), strict=True):
            optimizer.zero_grad()
            one(x).square().sum().backward()
            optimizer.step()
        for (name, a), b in zip(
            model.state_dict().items(), twin.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    assert states(made) == ["tune"]


def test_mode_of_the_model_is_looked_at_on_every_call(made):
    model = convnet()
    twin = copy.deepcopy(model)
    fast = compiled(model)
    with torch.no_grad():
        for training in (False, True, False):
            x = image(3)
            model.train(training)
            twin.train(training)
            close(fast(x), twin(x))
            close(model.norm.running_var, twin.norm.running_var)


def test_graph_breaks_no_inputs_and_structures(made):
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, inputs, *, times=1.0):
            y = self.a(inputs["x"])
            if y.sum() > 0:
                y = y * 2
            return {"y": self.b(y) * times, "rest": (inputs["x"], 3)}

    model, x = Breaks(), torch.randn(3, 4)
    found, expected = (one({"x": x}, times=2.0) for one in (compiled(model), model))
    close(found["y"], expected["y"])
    assert found["rest"][0] is x and len(made) == 2
    model = Net(lambda net: net.a.weight.exp() * 2, a=nn.Linear(3, 3))
    close(compiled(model)(), model())


def test_inputs_that_are_written_to(made):
    x = torch.ones(3)
    found = compiled(Net(lambda net, x: x.add_(1) * 2))(x)
    assert found.tolist() == [4, 4, 4] and x.tolist() == [2, 2, 2]


def test_what_does_not_fit_runs_as_captured_with_a_reason(made, caplog):
    caplog.set_level(logging.WARNING)
    torch.manual_seed(3)
    x = torch.ones(2, 8)
    model = nn.Dropout(0.5).train()
    found = compiled(model)(x)
    assert set(found.unique().tolist()) == {0.0, 2.0}
    assert states(made) == ["eager: it draws random numbers"]
    assert "the graph runs as captured: it draws random numbers" in caplog.text
    with torch.autocast("cpu"):
        model = nn.Linear(8, 8)
        assert torch.equal(compiled(model)(x), model(x))
    assert made[-1].state == "eager: autocast is on"
    model = Net(lambda net, x, n: x * n + torch.arange(n).sum())
    fast = compiled(model)
    for n in (3, 4, 5):
        close(fast(x, n), model(x, n))
    assert "is none of a tensor that it gets" in made[-1].state


def test_inference_mode(made):
    model, x = convnet(), image(2)
    for mode in ("tune", "deploy"):
        torch._dynamo.reset()
        with torch.inference_mode():
            close(compiled(model, mode=mode)(x), model(x))
        assert made[-1].state == mode


def test_the_backend_that_is_asked_for_runs_it(made):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(3, 8)
    fast = compiled(model, mode="deploy", backend="auto", tune_seconds=0)
    with torch.no_grad():
        close(fast(x), model(x))
    assert made[-1].report.backend == "prepacked"
    torch._dynamo.reset()
    fast = compiled(model, mode="deploy", passes="canonicalize")
    with torch.no_grad():
        close(fast(x), model(x))
    assert made[-1].report.pipeline == "canonicalize"


@pytest.mark.parametrize(("options", "message"), [
    ({"mod": "deploy"}, "unknown option 'mod'; expected one of mode, passes, backend, tune_seconds"),
    ({"mode": "fast"}, "option mode: expected one of deploy, tune, found 'fast'"),
    ({"backend": "indctor"}, "did you mean inductor"),
    ({"passes": "canonicalize"}, 'option passes: needs "mode": "deploy"'),
    ({"mode": "deploy", "passes": "canonicalise"}, "canonicalise"),
    ({"tune_seconds": -1}, "tune_seconds: expected a number of seconds >= 0"),
])  # fmt: skip
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        dynamo.checked(options)


def test_modes_of_inductor_are_refused():
    with pytest.raises(ValueError, match="mode='reduce-overhead' is of another backend"):
        dynamo.backend(torch.fx.symbolic_trace(nn.ReLU()), [], mode="reduce-overhead")


# -- what is special about graphs of Dynamo's ---------------------------------------------------------


@pytest.mark.parametrize("mode", ["tune", "deploy"])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d(8), nn.LayerNorm(8)])
def test_the_eps_of_a_norm_where_all_is_dynamic(norm, mode, caplog):
    caplog.set_level(logging.WARNING)
    model = randomize_norms(nn.Sequential(nn.Linear(8, 8), norm).eval())
    torch._dynamo.reset()
    fast = torch.compile(model, backend="graphopt", dynamic=True, options={"mode": mode})
    with torch.no_grad():
        for norm.eps in (1e-5, 1.0, 2.0):
            for rows in (2, 3, 5):
                x = torch.randn(rows, 8)
                assert torch.allclose(fast(x), model(x), atol=LIMIT)
    assert "runs as captured" not in caplog.text


def test_numbers_that_are_passed_as_tensors(caplog):
    """They are constants; others are noticed, and when there are too many, the graph is left as it is."""
    caplog.set_level(logging.WARNING)
    graph = torch.fx.Graph()
    x, number = graph.placeholder("x"), graph.placeholder("number")
    graph.output((graph.call_function(torch.mul, (x, graph.call_method("item", (number,)))),))
    run, x = dynamo.backend(torch.fx.GraphModule({}, graph), []), torch.randn(4, 8)
    for times, state in (
        (2, "tune"),
        (2, "tune"),
        (3, "tune"),
        (4, "tune"),
        (5, "tune"),
        (6, "eager"),
    ):
        (found,) = run(x, torch.tensor(times, dtype=torch.float64))
        assert torch.equal(found, times * x) and run.state.startswith(state)
    assert "a number that it gets keeps changing" in caplog.text


def test_a_gradient_of_its_own_is_kept(caplog):
    """A spike with a surrogate gradient: optimized where no gradient is asked for, else left."""
    caplog.set_level(logging.WARNING)
    layers = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model, x = Net(lambda net, x: net.l.b(Spike.apply(net.l.a(x))), l=layers), torch.randn(4, 8)
    fast, twin = torch.compile(model, backend="graphopt"), copy.deepcopy(model)
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), atol=LIMIT) and not caplog.text
    fast(x).square().sum().backward()
    twin(x).square().sum().backward()
    assert "a gradient of its own" in caplog.text
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(found.grad, expected.grad, atol=LIMIT)
