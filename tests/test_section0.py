"""The models on which shipped conv + batch norm folds are silently wrong (or crash) today.

Every row of the table in section 0 of the rewriting reference, as a user would write it. Ours is
right to rounding and folds, or is right because it refuses, and then says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import graphopt
from tests.helpers import (
    EXACT,
    assert_equal,
    gradient_error,
    gradients,
    norms_left,
    output_of,
    prepare,
    reasons,
    snapshot,
    tensor,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """`build()` makes a model; `shape` is that of its input. `left` norms stay, with `reason`."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (2, 4, 7, 6)
    left: int = 0
    reason: str = ""

    def __str__(self) -> str:
        return self.name


IMAGE = (2, 4, 7, 6)


# -- plain PyTorch code -------------------------------------------------------------------------


class Keywords(nn.Module):
    """A functional convolution with its arguments given by keyword."""

    def __init__(self, *keywords: str) -> None:
        super().__init__()
        self.keywords = keywords
        self.weight = nn.Parameter(torch.randn(5, 4, 3, 3))
        self.bias = nn.Parameter(torch.randn(5))
        self.bn = nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        given = {"weight": self.weight, "bias": self.bias, "stride": 2, "padding": 1}
        positional = [given.pop(name) for name in list(given) if name not in self.keywords]
        return self.bn(F.conv2d(x, *positional, **given))


class AllKeywords(Keywords):
    """Not even the input is positional, and the norm is a function too."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(stride=(2, 1), bias=self.bias, weight=self.weight, input=x)
        return F.batch_norm(
            running_var=self.bn.running_var, running_mean=self.bn.running_mean, input=y,
            eps=1e-3, bias=self.bn.bias, weight=self.bn.weight,
        )  # fmt: skip


class Transposed(nn.Module):
    """x -> norm(linear(x)^T): here the norm's channels are the features."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3, features)
        self.bn = nn.BatchNorm1d(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.linear(x).transpose(1, 2))


class ConvReused(nn.Module):
    """One convolution module called twice, a norm of its own behind each call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.bn2 = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv(F.relu(self.bn1(self.conv(x)))))


class OneConvTwoNorms(ConvReused):
    """Two norms read one convolution."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn1(y) * torch.sigmoid(self.bn2(y))


class OneConvTwoNormsCalledTwice(ConvReused):
    """The same, but the convolution is called once for each norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv(x)) * torch.sigmoid(self.bn2(self.conv(x)))


class PairCalledTwice(nn.Module):
    """One convolution and one norm, called in a row and again on something else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return self.bn(self.conv(F.relu(y)))


class PairCalledInARow(PairCalledTwice):
    """Nothing stands between the calls."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.bn(self.conv(x))))


class ConvReadTwice(nn.Module):
    """The convolution's output has another reader than the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + torch.tanh(y)


def pair(**options: object) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 5, 3, **options), nn.BatchNorm2d(5))


def hooked(hook: Callable[..., object], pre: bool = False, index: int = 0) -> nn.Sequential:
    model = pair(padding=1)
    register = model[index].register_forward_pre_hook if pre else model[index].register_forward_hook
    register(hook)
    return model


def twice(_: nn.Module, __: object, y: Tensor) -> Tensor:
    return y * 2


def softened(_: nn.Module, __: object, y: Tensor) -> Tensor:
    return torch.tanh(y)


def halved_input(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] / 2,)


def parametrized(by: Callable[..., nn.Module], conv: nn.Module) -> nn.Sequential:
    return nn.Sequential(by(conv), nn.BatchNorm2d(conv.out_channels))


FOLDED = [
    Case("conv1d", lambda: nn.Sequential(nn.Conv1d(4, 5, 3), nn.BatchNorm1d(5)), (2, 4, 9)),
    Case("conv2d", pair),
    Case(
        "conv3d",
        lambda: nn.Sequential(nn.Conv3d(4, 5, 2), nn.BatchNorm3d(5)),
        (2, 4, 4, 3, 5),
    ),
    Case("no bias, strided", lambda: pair(bias=False, stride=2, padding=1)),
    Case("bias= and stride= by keyword", lambda: Keywords("bias", "stride", "padding")),
    Case("stride= by keyword", lambda: Keywords("stride", "padding")),
    Case("weight= by keyword", lambda: Keywords("weight", "bias", "stride", "padding")),
    Case("everything by keyword", AllKeywords),
    *(
        Case(
            f"conv_transpose{n}d, C_in = C_out{', groups' * (groups > 1)}",
            lambda n=n, groups=groups: nn.Sequential(
                getattr(nn, f"ConvTranspose{n}d")(4, 4, 3, stride=2, groups=groups),
                getattr(nn, f"BatchNorm{n}d")(4),
            ),
            (2, 4, *(5, 4, 3)[:n]),
        )
        for n in (1, 2, 3)
        for groups in (1, 2)
    ),
    Case(
        "conv_transpose2d, C_in != C_out, groups=2",
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), nn.BatchNorm2d(6)
        ),
    ),
    Case(
        "conv_transpose2d, depthwise",
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)),
    ),
    Case(
        "linear on (N, C)",
        lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)),
        (4, 3),
    ),
    Case("linear on (N, L, C), transposed", lambda: Transposed(5), (2, 5, 3)),
    Case("conv module reused", ConvReused),
    Case("pair called twice", PairCalledTwice),
    Case("pair called in a row", PairCalledInARow),
    Case("forward hook that scales", lambda: hooked(twice)),
    Case("forward pre-hook", lambda: hooked(halved_input, pre=True)),
    Case("forward hook on the norm", lambda: hooked(softened, index=1)),
    Case("weight_norm", lambda: parametrized(weight_norm, nn.Conv2d(4, 5, 3))),
    Case("spectral_norm", lambda: parametrized(spectral_norm, nn.Conv2d(4, 5, 3))),
    Case(
        "weight_norm, transposed",
        lambda: parametrized(weight_norm, nn.ConvTranspose2d(4, 4, 3)),
    ),
]

REFUSED = [
    Case(
        "linear on (N, L, C), L = C",
        lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)),
        (2, 5, 3), left=1, reason="axis",
    ),
    Case(
        "linear on (N, L, C), L != C",
        lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(6)),
        (2, 6, 3), left=1, reason="axis",
    ),
    Case("one conv, two norms", OneConvTwoNorms, left=2, reason="used elsewhere"),
    Case("conv with another reader", ConvReadTwice, left=1, reason="used elsewhere"),
    Case("forward hook that bends", lambda: hooked(softened), left=1, reason="Tanh"),
    Case(
        "no running statistics",
        lambda: nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, track_running_stats=False)),
        left=1, reason="running statistics",
    ),
]  # fmt: skip


def optimized(case: Case, mode: str) -> tuple[nn.Module, Tensor, graphopt.OptimizedModule]:
    model, x = prepare(case.build()), tensor(*case.shape)
    unchanged = snapshot(model)
    fast = graphopt.optimize(model, (x,), mode=mode)
    unchanged()
    return model, x, fast


@pytest.mark.parametrize("mode", ["deploy", "tune"])
@pytest.mark.parametrize("case", FOLDED, ids=str)
def test_folds(case: Case, mode: str) -> None:
    model, x, fast = optimized(case, mode)
    assert norms_left(fast) == 0, reasons(fast)
    assert fast.report.rolled_back == []
    assert_equal(fast(x), output_of(model, (x,)))
    if mode == "tune":
        assert gradient_error(gradients(fast, (x,)), gradients(model, (x,))) <= EXACT


@pytest.mark.parametrize("mode", ["deploy", "tune"])
@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_refuses_with_a_reason(case: Case, mode: str) -> None:
    model, x, fast = optimized(case, mode)
    assert norms_left(fast) == case.left
    assert case.reason in reasons(fast)
    assert fast.report.rolled_back == []
    assert_equal(fast(x), output_of(model, (x,)))
    if mode == "tune":
        assert gradient_error(gradients(fast, (x,)), gradients(model, (x,))) <= EXACT


@pytest.mark.parametrize("mode", ["deploy", "tune"])
def test_one_conv_called_for_two_norms_is_right(mode: str) -> None:
    """Either both norms fold, into two copies, or both stay behind one merged convolution."""
    model, x, fast = optimized(Case("", OneConvTwoNormsCalledTwice), mode)
    assert norms_left(fast) == 0 or "used elsewhere" in reasons(fast)
    assert_equal(fast(x), output_of(model, (x,)))


@pytest.mark.parametrize("mode", ["deploy", "tune"])
def test_training_norm_stays_and_keeps_learning_its_statistics(mode: str) -> None:
    model = nn.Sequential(*pair(), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4))
    prepare(model)[1].train()
    x = tensor(*IMAGE)
    unchanged = snapshot(model)
    fast = graphopt.optimize(model, (x,), mode=mode)
    unchanged()
    assert norms_left(fast) == 1
    assert "training" in reasons(fast, "1")
    assert torch.equal(fast.state_dict()["1.running_mean"], model[1].running_mean)
    for step in range(3):
        y = tensor(*IMAGE, seed=step)
        assert_equal(fast(y), model(y))
    after = fast.state_dict()
    assert_equal(after["1.running_mean"], model[1].running_mean)
    assert_equal(after["1.running_var"], model[1].running_var)
    assert int(after["1.num_batches_tracked"]) == int(model[1].num_batches_tracked) == 3


@pytest.mark.parametrize("mode", ["deploy", "tune"])
def test_model_in_training_mode(mode: str) -> None:
    """Nothing of a whole training model is folded, and it says what to do."""
    model, x = prepare(ConvReused()).train(), tensor(*IMAGE)
    unchanged = snapshot(model)
    fast = graphopt.optimize(model, (x,), mode=mode)
    unchanged()
    assert norms_left(fast) == 2
    assert "model.eval()" in reasons(fast, "bn1")
    assert "model.eval()" in reasons(fast, "bn2")
    assert_equal(fast(x), output_of(model, (x,)))


@pytest.mark.parametrize("mode", ["deploy", "tune"])
def test_power_iteration_of_a_training_spectral_norm(mode: str) -> None:
    """A parametrization that writes its buffers on every call keeps doing so."""
    model = prepare(parametrized(spectral_norm, nn.Conv2d(4, 5, 3)))
    model[0].train()
    x = tensor(*IMAGE)
    fast = graphopt.optimize(model, (x,), mode=mode)
    for _ in range(3):
        assert_equal(fast(x), model(x))


@pytest.mark.parametrize("mode", ["deploy", "tune"])
def test_training_norm_with_a_cumulative_average(mode: str) -> None:
    """momentum=None makes the factor a function of a counter, which no exporter captures."""
    model = nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, momentum=None))
    prepare(model)[1].train()
    fast = graphopt.optimize(model, (tensor(*IMAGE),), mode=mode)
    for step in range(3):
        x = tensor(*IMAGE, seed=step)
        assert_equal(fast(x), model(x))


class Branch(nn.Module):
    """A branch on data: no exporter captures it as one graph."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x - 1


@pytest.mark.parametrize("mode", ["deploy", "tune"])
def test_training_norm_beside_a_branch_on_data(mode: str) -> None:
    """Captured by region, a norm in training mode is still one."""
    model = nn.Sequential(pair(), Branch(), nn.Sequential(nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4)))
    prepare(model)[0][1].train()
    unchanged = snapshot(model)
    fast = graphopt.optimize(model, (tensor(*IMAGE),), mode=mode)
    unchanged()
    assert fast.report.capture.method == "regional"
    assert "training" in reasons(fast, "0.1")
    for step in range(3):
        x = tensor(*IMAGE, seed=step)
        assert_equal(fast(x), model(x))


def test_hooks_and_parametrizations_are_reported() -> None:
    model, x = hooked(twice), tensor(*IMAGE)
    fast = graphopt.optimize(prepare(model), (x,))
    assert any("hook" in note for note in fast.report.capture.notes)
    model = parametrized(weight_norm, nn.Conv2d(4, 5, 3))
    fast = graphopt.optimize(prepare(model), (x,))
    assert any("parametrized weight" in note for note in fast.report.capture.notes)
