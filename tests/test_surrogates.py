"""Gradients of `torch.autograd.Function`s in Tune mode: those of the source, in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import graphopt
from tests.helpers import Net, assert_equal, calls, prepare, tensor

MARK = "graphopt::with_gradient"


class Straight(Function):
    """Nothing kept: the gradient goes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0).to(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Surrogate(Function):
    """A tensor saved, a number kept, an argument without a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.alpha = alpha
        return (x > 0).to(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        slope = torch.sigmoid(ctx.alpha * x)
        return gradient * ctx.alpha * slope * (1 - slope), None


class Clipped(Function):
    """Written as binary networks write it: masks put into a copy of the gradient, in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        found = gradient.clone()
        found[x.ge(1)] = 0
        found[x.le(-1)] = 0
        return found


class Saving(Straight):
    """The input saved for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x)


class Masked(Saving):
    """A gradient read and written through a mask, which has no size before it is known."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        found = gradient * 0.5
        found[x >= 0] = -found[x >= 0]
        return found


class Written(Saving):
    """The gradient given is written to."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.mul_(ctx.saved_tensors[0].abs() < 1)


class Reversed(Function):
    """Gradient reversal: returns its very input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return -ctx.factor * gradient, None


class Quantized(Function):
    """The other way to write one: `setup_context`, defaults, a backward that is differentiable once."""

    @staticmethod
    def forward(x: Tensor, scale: float = 0.25, low: int = -8) -> Tensor:
        return torch.clamp(torch.round(x / scale), low, 7) * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, ctx.scale, ctx.low = inputs
        ctx.save_for_backward(x, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, _ = ctx.saved_tensors
        inside = (x >= ctx.low * ctx.scale) & (x <= 7 * ctx.scale)
        return gradient * inside, None, None


class Sloppy(Function):
    """Tensors kept as attributes, in a dictionary; sizes read; not linear in the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = {"mask": x.abs() < 1, "rows": x.shape[0]}
        return (x > 0).to(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        rows = ctx.kept["rows"]
        return (
            gradient.reshape(rows, -1).clamp(-1, 1).reshape(gradient.shape)
            * ctx.kept["mask"]
            / rows
        )


class TwoByTwo(Function):
    """Two inputs and two results, one of them an index, and an intermediate value that is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor, str]:
        slope = torch.sigmoid(alpha * x)
        ctx.save_for_backward(slope, y)
        top = y.argmax(-1, keepdim=True)
        return (x > 0).to(x), y.round(), top, "name"

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor, top: Tensor, name: None) -> Any:
        slope, y = ctx.saved_tensors
        return first * slope + second * y, second + first.sum(-1, keepdim=True), None


class Fixed(Function):
    """A result that is marked as not differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        spike, rest = (x > 0).to(x), x.abs()
        ctx.mark_non_differentiable(rest)
        return spike, rest

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, rest: Tensor) -> Tensor:
        return gradient + rest.exp()  # zeros


class Blocked(Function):
    """No gradient at all for one of two inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return x * y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, gradient


class Particular(Function):
    """Asks what needs a gradient, takes none for granted, and is called `vjp`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y)
        return x * y, x + y

    @staticmethod
    def vjp(ctx: Any, product: Tensor | None, total: Tensor | None) -> Any:
        x, y = ctx.saved_tensors
        product, total = (torch.zeros_like(x) if one is None else one for one in (product, total))
        return product * y.sign() - total if ctx.needs_input_grad[0] else None, total


def two_by_two(x: Tensor) -> Tensor:
    first, second, top, _ = TwoByTwo.apply(x, 3 * x, 4.0)
    return first + second * top


surrogate = Surrogate.apply  # bound long before a trace
CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "straight": Straight.apply,
    "surrogate": lambda x: surrogate(x, 4.0),
    "clipped": Clipped.apply,
    "masked": Masked.apply,
    "written": Written.apply,
    "reversed": lambda x: Reversed.apply(x, 0.5) * x,
    "quantized": lambda x: Quantized.apply(x, low=-4),
    "sloppy": Sloppy.apply,
    "two by two": two_by_two,
    "fixed": lambda x: torch.cat(Fixed.apply(x)),
    "particular": lambda x: Particular.apply(x, x.exp())[0] * Particular.apply(x, 2 * x)[1],
    "two slopes": lambda x: surrogate(x, 4.0) * surrogate(x + 0.3, 1.0),
    "checkpointed": lambda x: checkpoint(lambda y: surrogate(y, 4.0) * y, x, use_reentrant=True),
    "blocked": lambda x: Blocked.apply(x, x.exp()),
    "nested": lambda x: Outer.apply(x),
    "without gradients": lambda x: without_gradients(x),
}


class Outer(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return Straight.apply(x) + Clipped.apply(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * Straight.apply(x)


def without_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        spike = Straight.apply(x)
    return spike * x + Straight.apply(x.detach() + 0.1 * x)


def layers(function: Callable[[Tensor], Tensor], bound: int = 5) -> nn.Module:
    torch.manual_seed(0)
    body = lambda net, x: net.second(function(net.norm(net.first(x))))  # noqa: E731
    return prepare(Net(body, first=nn.Linear(4, 5), norm=nn.BatchNorm1d(5), second=nn.Linear(5, 3)))


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Those of all parameters and of the input, and the output."""
    model, x = copy.deepcopy(model), x.clone().requires_grad_()
    out = model(x)
    (out * tensor(*out.shape, seed=7).to(out)).sum().backward()
    found = {name: one.grad for name, one in model.named_parameters()}
    return {"output": out.detach(), "input": x.grad, **found}


def assert_same_gradients(found: nn.Module, truth: nn.Module, x: Tensor) -> None:
    a, b = gradients(found, x), gradients(truth, x)
    assert a.keys() == b.keys()
    assert any(one is not None and bool(one.abs().max() > 1e-3) for one in b.values())
    for name, expected in b.items():
        expected = torch.zeros(()) if expected is None else expected
        got = torch.zeros_like(expected) if a[name] is None else a[name]
        assert_equal(got.expand_as(expected) if not expected.ndim else got, expected)


def tuned(model: nn.Module, x: Tensor, **options: Any) -> graphopt.OptimizedModule:
    fast = graphopt.optimize(model, x, mode="tune", **options)
    assert fast.report.rolled_back == []
    return fast


def marks(fast: graphopt.OptimizedModule) -> int:
    return calls(fast).count(MARK)


@pytest.mark.parametrize("name", CASES)
def test_every_form_of_function(name: str) -> None:
    model, x = layers(CASES[name]), tensor(6, 4)
    fast = tuned(model, x)
    assert marks(fast) > 0 and fast.report.capture.notes == []
    assert_same_gradients(fast, model, x)
    assert_same_gradients(fast, model, tensor(9, 4, seed=3))


# -- gradients cut off without a Function ------------------------------------------------------------


def straight_through(x: Tensor) -> Tensor:
    soft = torch.tanh(x)
    return ((x > 0).to(x) - soft).detach() + soft


def no_grad_statistics(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.abs().amax(1, keepdim=True)
    return x / scale


def no_grad_write(x: Tensor) -> Tensor:
    u = x * 1.5
    with torch.no_grad():
        u.mul_(x)
    return u * x


def no_grad_write_to_a_part(x: Tensor) -> Tensor:
    u = x * 1.5
    with torch.no_grad():
        u[:, :2].mul_(x[:, :2])
    return u.square()


def checkpointed(x: Tensor) -> Tensor:
    return checkpoint(lambda y: y.exp() * y, x, use_reentrant=True)


def written_as_data(x: Tensor) -> Tensor:
    u = x * 2
    u.data.mul_(3)
    return u * x


def detached_in_place(x: Tensor) -> Tensor:
    u = x * 1.5
    v = u.relu()
    u.detach_()
    return u * x + v


CUT: dict[str, Callable[[Tensor], Tensor]] = {
    one.__name__: one for one in (
        checkpointed, straight_through, no_grad_statistics, no_grad_write, no_grad_write_to_a_part,
        written_as_data, detached_in_place)
}  # fmt: skip


@pytest.mark.parametrize("name", CUT)
def test_gradients_that_are_cut_off(name: str) -> None:
    model, x = layers(CUT[name]), tensor(6, 4)
    assert_same_gradients(tuned(model, x), model, x)


def test_a_buffer_written_without_gradient_has_none() -> None:
    def body(net: Any, x: Tensor) -> Tensor:
        u = net.first(x)
        with torch.no_grad():
            net.mean[:3].mul_(0.9).add_(u.mean(0)[:3])
        return u * net.mean

    model, x = prepare(Net(body, first=nn.Linear(4, 5))), tensor(6, 4)
    model.register_buffer("mean", torch.ones(5, dtype=torch.float64))
    fast = tuned(model, x)
    assert marks(fast) == 0
    assert_same_gradients(fast, model, x)


# -- spiking networks ------------------------------------------------------------------------------


def leaky(steps: int = 4, norm: bool = False, detach: bool = False) -> nn.Module:
    """Leaky integrate-and-fire over time, a norm of the potential in front of the spike (MPBN) if asked."""

    def body(net: Any, x: Tensor) -> Tensor:
        u, spikes = torch.zeros_like(net.first(x[:, 0])), []
        for step in range(steps):
            u = 0.5 * u + net.first(x[:, step])
            spike = surrogate((net.norm(u) if norm else u) - 0.5, 4.0)
            u = u * (1 - (spike.detach() if detach else spike))
            spikes.append(net.second(spike))
        return torch.stack(spikes, 1)

    torch.manual_seed(0)
    parts = {"norm": nn.BatchNorm1d(5)} if norm else {}
    return prepare(Net(body, first=nn.Linear(4, 5), second=nn.Linear(5, 3), **parts))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("detach", [False, True])
def test_a_loop_over_time(norm: bool, detach: bool) -> None:
    model, x = leaky(norm=norm, detach=detach), 2 * tensor(6, 4, 4)
    fast = tuned(model, x)
    assert marks(fast) == 4
    assert_same_gradients(fast, model, x)
    assert_same_gradients(fast, model, 2 * tensor(3, 4, 4, seed=5))


def jelly(neuron: Any) -> nn.Module:
    """A SpikingJelly neuron, which starts from rest in every call."""

    def body(net: Any, x: Tensor) -> Tensor:
        net.neuron.reset()
        return net.second(net.neuron(net.first(x)))

    torch.manual_seed(0)
    return prepare(Net(body, first=nn.Linear(4, 5), neuron=neuron, second=nn.Linear(5, 3)))


@pytest.mark.parametrize("kind", ["IFNode", "LIFNode", "ParametricLIFNode"])
@pytest.mark.parametrize("slope", ["Sigmoid", "ATan", "PiecewiseQuadratic"])
def test_spikingjelly(kind: str, slope: str) -> None:
    base = pytest.importorskip("spikingjelly.activation_based")
    from spikingjelly.activation_based import neuron, surrogate as slopes

    assert base
    node = getattr(neuron, kind)(
        step_mode="m", detach_reset=slope == "ATan", surrogate_function=getattr(slopes, slope)()
    )
    model, x = jelly(node), 3 * tensor(3, 6, 4)
    fast = tuned(model, x)
    assert marks(fast) == 3 and fast.report.capture.notes == []
    assert_same_gradients(fast, model, x)


@pytest.mark.parametrize("slope", ["fast_sigmoid", "atan", "triangular"])
def test_snntorch(slope: str) -> None:
    snn = pytest.importorskip("snntorch")
    slopes = pytest.importorskip("snntorch.surrogate")

    def body(net: Any, x: Tensor) -> Tensor:
        potential, out = net.neuron.init_leaky(), []
        for step in range(3):
            spike, potential = net.neuron(net.first(x[step]), potential)
            out.append(net.second(spike.to(x)))
        return torch.stack(out)

    neuron = snn.Leaky(beta=0.8, spike_grad=getattr(slopes, slope)(), learn_beta=True)
    torch.manual_seed(0)
    model = prepare(Net(body, first=nn.Linear(4, 5), neuron=neuron, second=nn.Linear(5, 3)))
    x = 3 * tensor(3, 6, 4)
    fast = tuned(model, x)
    assert marks(fast) > 0 and fast.report.capture.notes == []
    assert_same_gradients(fast, model, x)


def stepped(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(10):
        optimizer.zero_grad()
        model(x + 0.1 * step).square().sum().backward()
        optimizer.step()
    return {name: one.detach() for name, one in model.named_parameters()}


def test_ten_steps_of_training_end_at_the_same_weights() -> None:
    model, x = leaky(norm=True), tensor(6, 4, 4)
    truth, found = stepped(model, x), stepped(tuned(model, x), x)
    assert found.keys() == truth.keys()
    for name, one in truth.items():
        assert_equal(found[name], one, 1e-9)
    assert (truth["first.weight"] - model.first.weight).norm() > 1e-2


# -- what is done with the result ------------------------------------------------------------------


def test_copied_pickled_saved_and_moved_to_float32(tmp_path: Any) -> None:
    model, x = leaky(norm=True), 2 * tensor(6, 4, 4)
    fast = tuned(model, x)
    fast.save(tmp_path / "artifact")
    for one in (
        copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), graphopt.load(tmp_path / "artifact")
    ):  # fmt: skip
        assert marks(one) == 4
        assert_same_gradients(one, model, x)
    single = gradients(fast.float(), x.float())
    truth = gradients(model.float(), x.float())
    assert (single["input"] - truth["input"]).norm() <= 1e-5 * truth["input"].norm()


class Mixed(Straight):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient @ torch.eye(5).roll(1, 0).to(gradient)


def test_the_dtypes_of_a_backward_move_with_the_module() -> None:
    model, x = layers(Mixed.apply), tensor(6, 4)
    fast = tuned(model, x).float()
    found, truth = gradients(fast, x.float())["input"], gradients(model, x)["input"]
    assert found.dtype == torch.float32 and (found - truth).norm() <= 1e-5 * truth.norm()


def test_exported_with_its_gradients() -> None:
    model, x = leaky(), 2 * tensor(6, 4, 4)
    program = torch.export.export(tuned(model, x), (x,))
    assert_same_gradients(program.module(), model, x)
    plain = program.run_decompositions()
    assert MARK.replace("::", ".") not in str(plain.graph)
    assert_equal(plain.module()(x), model(x))


def test_compiled() -> None:
    model, x = layers(CASES["surrogate"]), tensor(6, 4)
    fast = tuned(model, x, backend="inductor")
    assert fast.report.backend == "inductor"
    assert_equal(fast(x), model(x))
    assert_same_gradients(fast, model, x)


def test_deployed_there_is_no_gradient_left() -> None:
    model, x = leaky(norm=True), 2 * tensor(6, 4, 4)
    fast = graphopt.optimize(model, x, passes="drop-gradients,deploy")
    assert marks(fast) == 0 and "batch_norm" not in calls(fast)
    assert_equal(fast(x), model(x))


def test_a_function_that_returns_its_input_does_not_share_it() -> None:
    model, x = Net(lambda net, x: Reversed.apply(x, 2.0)), tensor(6, 4)
    fast = graphopt.optimize(model, x, passes="drop-gradients")
    assert marks(fast) == 0
    assert fast(x).data_ptr() != x.data_ptr()


def test_channels_are_pruned_where_the_backward_works_by_entry() -> None:
    x = tensor(6, 4)
    for name in ("clipped", "sloppy"):
        model = layers(CASES[name])
        fast = tuned(model, x, passes="prune{ratio=0.4}")
        width = fast.first.weight.shape[0]
        assert width == (3 if name == "clipped" else 5)
        model.first, model.norm = nn.Linear(4, width), nn.BatchNorm1d(width)
        model.second = nn.Linear(width, 3)
        model.double().eval().load_state_dict(fast.state_dict())
        assert_same_gradients(fast, model, x)


# -- what cannot be kept ---------------------------------------------------------------------------


def refused(function: Callable[[Tensor], Tensor]) -> str:
    model, x = layers(function), tensor(6, 4)
    fast = tuned(model, x)
    assert marks(fast) == 0 and fast.report.capture.method == "export"
    assert_equal(fast(x), model(x))
    (note,) = fast.report.capture.notes
    assert note.startswith(f"{__name__}.") and "its gradient is now that of" in note
    return note


class ByValue(Straight):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient if gradient.sum() > 0 else -gradient


class ByState(Straight):
    state = torch.ones(5, dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ByState.state


class InPlace(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.add_(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Spoiling(Surrogate):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return gradient * x.clamp_(-1, 1), None


def test_what_cannot_be_kept_is_said() -> None:
    assert "ByValue" in (note := refused(ByValue.apply)) and "cannot be traced" in note
    assert "did not save" in refused(ByState.apply)
    assert "writes to its inputs" in refused(lambda x: InPlace.apply(x * 2))
    assert "what the forward saved" in refused(lambda x: Spoiling.apply(x, 1.0))


class ByCall(Straight):
    count = 0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        ByCall.count += 1
        return gradient * ByCall.count


class BySize(Straight):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (2 if gradient.shape[0] > 7 else 3)


def test_what_another_call_could_do_otherwise_is_not_kept() -> None:
    assert "depends on values" in refused(ByCall.apply)
    assert "sizes that may change" in refused(BySize.apply)


def test_strict_export_says_what_it_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = layers(Straight.apply), tensor(6, 4)
    export = torch.export.export

    def only_strict(*args: Any, strict: bool = False, **kwargs: Any) -> Any:
        if not strict:
            raise RuntimeError("not today")
        return export(*args, strict=True, **kwargs)

    monkeypatch.setattr(torch.export, "export", only_strict)
    notes = tuned(model, x).report.capture.notes
    assert any("Straight: its gradient is now that of" in note for note in notes)


def test_a_second_derivative_is_an_error() -> None:
    model, x = layers(CASES["surrogate"]), tensor(6, 4).requires_grad_()
    (first,) = torch.autograd.grad(tuned(model, x.detach())(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_frozen_parameter_stays_frozen() -> None:
    model, x = leaky(norm=True), 2 * tensor(6, 4, 4)
    model.first.weight.requires_grad_(False)
    fast = tuned(model, x)
    assert not dict(fast.named_parameters())["first.weight"].requires_grad
    assert_same_gradients(fast, model, x)
