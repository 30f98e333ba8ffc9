"""The specification of `swap_norm`: found by what they compute, replaced by the schedule, gone after it."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.training.swaps import SwapError, swap, swap_norm
from graphopt.training.swaps.norms import NORMS
from tests.helpers import Net, assert_equal, calls, output_of, snapshot, tensor

TOKENS, IMAGE = (3, 5, 8), (3, 8, 4, 4)
TO = sorted(NORMS)


def vector(seed: int) -> nn.Parameter:
    return nn.Parameter(tensor(8, seed=seed))


class Spelled(nn.Module):
    """A norm as a formula of x, a gain g and a shift b."""

    def __init__(self, formula: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.formula, self.g, self.b = formula, vector(5), vector(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, self.g, self.b)


def affine(norm: nn.Module) -> nn.Module:
    norm = norm.double()
    with torch.no_grad():
        for index, one in enumerate(norm.parameters()):
            one.copy_(tensor(*one.shape, seed=5 + index))
    return norm


def around(norm: nn.Module, image: bool = False) -> nn.Module:
    """The norm of a residual stream, read by a map without bias."""
    after = nn.Conv2d(8, 6, 1, bias=False) if image else nn.Linear(8, 6, bias=False)
    torch.manual_seed(0)
    before = nn.Conv2d(8, 8, 1) if image else nn.Linear(8, 8)
    return Net(
        lambda m, x: m.after(m.norm(x + m.before(x))), before=before, norm=norm, after=after
    ).double()


def trained(swapped: nn.Module, seed: int = 0) -> nn.Module:
    """As after training, its schedule over: random states of both signs, zeros too, eval mode."""
    generator = torch.Generator().manual_seed(seed)
    swaps: Any = swapped.swaps
    with torch.no_grad():
        for name, one in (*swaps.named_parameters(), *swaps.named_buffers()):
            if one.is_floating_point():
                drawn = torch.randn(one.shape, generator=generator, dtype=one.dtype)
                if name.endswith(("running_var", "phi")):
                    drawn = drawn.abs() + 0.1
                one.copy_(drawn)
                if one.ndim:
                    one[0] = 0
        swaps.calls.fill_(swaps.warm + swaps.steps + 2)
    return swapped.eval()


# -- what is found --------------------------------------------------------------------------------


def mean(x: Tensor, axis: int = -1) -> Tensor:
    return x.mean(axis, keepdim=True)


def channel_first(x: Tensor, g: Tensor, b: Tensor) -> Tensor:
    c = x - mean(x, 1)
    x = c / torch.sqrt(mean(c.pow(2), 1) + 1e-6)
    return g[:, None, None] * x + b[:, None, None]


SPELLINGS: dict[str, Callable[[], nn.Module]] = {
    "module": lambda: affine(nn.LayerNorm(8)),
    "without parameters, then a gain": lambda: Spelled(lambda x, g, b: F.layer_norm(x, (8,)) * g + b),
    "variance": lambda: Spelled(
        lambda x, g, b: (x - mean(x)) * (x.var(-1, keepdim=True, unbiased=False) + 1e-5) ** -0.5 * g + b
    ),
    "deviation": lambda: Spelled(
        lambda x, g, b: g * (x - mean(x)) / (x.std(-1, keepdim=True) + 1e-5) + b
    ),
    "square": lambda: Spelled(
        lambda x, g, b: (x - mean(x)) / torch.sqrt(((x - mean(x)) * (x - mean(x))).mean(-1)[..., None] + 1e-5)
        * g + b
    ),
    "RMS module": lambda: affine(nn.RMSNorm(8, 1e-5)),
    "RMS": lambda: Spelled(lambda x, g, b: g * (x * torch.rsqrt(mean(x.pow(2)) + 1e-6))),
    "RMS, gain beside one": lambda: Spelled(
        lambda x, g, b: x * torch.rsqrt(mean(x * x) + 1e-6) * (1 + g)
    ),
    "RMS, root": lambda: Spelled(lambda x, g, b: x / mean(x**2).add(1e-6).sqrt() * g),
    "RMS in another dtype": lambda: Spelled(
        lambda x, g, b: g * (x.to(torch.float32) * torch.rsqrt(mean(x.float().pow(2)) + 1e-6)).to(x.dtype)
    ),
}  # fmt: skip
# What scales the stream is no gain.
SPELLINGS["RMS of a scaled stream"] = lambda: Spelled(
    lambda x, g, b: (y := x * b) * torch.rsqrt(mean(y.pow(2)) + 1e-6) * g
)
IMAGES: dict[str, Callable[[], nn.Module]] = {
    "channels first": lambda: Spelled(channel_first),
    "permuted": lambda: Net(
        lambda m, x: m.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm=affine(nn.LayerNorm(8))
    ),
}

OPTIMIZED = ("module", "RMS in another dtype", *IMAGES)


@pytest.mark.parametrize("name", [*SPELLINGS, *IMAGES])
def test_every_spelling_is_found_with_its_gain_and_shift(name: str):
    image = name in IMAGES
    model = around({**SPELLINGS, **IMAGES}[name](), image)
    shape = IMAGE if image else TOKENS
    x = tensor(*shape)
    swapped: Any = swap_norm(model, (x,), to="prepbn", steps=3)
    (record,) = swapped.swaps.report.swapped
    assert record.where.startswith("norm") or not record.where
    (site,) = swapped.swaps.children()
    gain = tensor(8, seed=5) + (name == "RMS, gain beside one")
    torch.testing.assert_close(site.new.weight, gain, rtol=0, atol=0, check_dtype=False)
    shift = torch.zeros(8) if name.startswith("RMS") else tensor(8, seed=6)
    torch.testing.assert_close(site.new.bias, shift.double(), rtol=0, atol=0)
    assert set(dict(model.named_parameters())) <= set(dict(swapped.named_parameters()))
    swapped.eval()
    assert_equal(output_of(swapped, [x]), output_of(model, [x]))  # before training
    if name not in OPTIMIZED:
        return
    trained(swapped)
    fast = graphopt.optimize(swapped, (x,))
    for rows in (x, x[:2] * 3):
        assert_equal(output_of(fast, [rows]), output_of(swapped, [rows]), 1e-10)
    # Nothing is left between the maps.
    assert set(calls(fast)) == {"conv2d" if image else "linear"}


def moment(x: Tensor, axes: Any) -> Tensor:
    return (x.pow(2).mean(axes, keepdim=True) + 1e-5).sqrt()


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "all axes": (nn.LayerNorm((8, 4, 4)), "it normalizes over 3 axes, expected that of the channels"),
    "positions": (
        Spelled(lambda x, g, b: (x - x.mean((2, 3), True)) / moment(x - x.mean((2, 3), True), (2, 3))),
        "it normalizes over 2 axes",
    ),
    "batch": (Spelled(lambda x, g, b: x / moment(x, 0)), "along the axis of the batch"),
    "gain elsewhere": (
        Spelled(lambda x, g, b: (x * g[:4]) / moment(x, 1)),
        "its gain is not a vector over the channels",
    ),
    "two axes": (Spelled(lambda x, g, b: (x - mean(x, 1)) / moment(x - mean(x, 1), 2)), "no such op"),
    "other values": (Spelled(lambda x, g, b: x / moment(x + 1, 1)), "no such op in the graph"),
    "fourth power": (Spelled(lambda x, g, b: x / moment(x.pow(2), 1)), "no such op in the graph"),
    "group norm": (nn.GroupNorm(2, 8), "no such op in the graph"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_norm_of_channels_is_left_alone_or_refused(name: str):
    norm, reason = REFUSED[name]
    with pytest.raises(SwapError, match=reason):
        swap_norm(around(norm, image=True), (tensor(*IMAGE),), steps=1)


def test_only_some_are_swapped():
    model = nn.Sequential(*(one for i in range(3) for one in (nn.Linear(8, 8), nn.LayerNorm(8))))
    swapped: Any = swap_norm(model, (torch.randn(2, 8),), steps=1, only=["1", "5"])
    assert [one.where for one in swapped.swaps.report.swapped] == ["1", "5"]
    assert "swap-norm{to=prepbn} at 5" in str(swapped.swaps.report)


# -- the schedule -----------------------------------------------------------------------------------


def small(to: str = "prepbn", **options: Any) -> tuple[nn.Module, Any]:
    model = around(affine(nn.LayerNorm(8)))
    return model, swap_norm(model, (tensor(*TOKENS),), to=to, **options)


def test_the_share_of_the_old_norm_falls_with_the_calls_of_training():
    """SLAB: warm calls with the old norm alone, then (T - k) / T for k = 0 .. T, then 0."""
    _, swapped = small(warm=2, steps=4)
    shares = []
    for seed in range(8):
        swapped(tensor(*TOKENS, seed=seed))
        shares.append(swapped.swaps.share)
    assert shares == [1, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert swapped.swaps.finished
    swapped.eval()(tensor(*TOKENS))
    assert int(swapped.swaps.calls) == 8


def test_without_steps_the_old_norm_goes_at_once():
    _, swapped = small(warm=1, steps=0)
    shares = [swapped(tensor(*TOKENS)) is not None and swapped.swaps.share for _ in range(3)]
    assert shares == [1, 0, 0]


@pytest.mark.parametrize("to", TO)
def test_halfway_the_output_is_the_mean_of_both(to: str):
    model, swapped = small(to, steps=2)
    x = tensor(*TOKENS, seed=3)
    with torch.no_grad():
        swapped(tensor(*TOKENS))
        halfway = swapped(x)
        assert swapped.swaps.share == 0.5
        hidden = x + model.before(x)
        (site,) = swapped.swaps.children()
        new = site.new(0.5, hidden)
        assert_equal(halfway, model.after(0.5 * model.norm(hidden) + 0.5 * new))


def test_evaluation_is_of_the_model_that_is_trained_unless_asked_otherwise():
    for eval_new in (False, True):
        model, swapped = small(steps=2, eval_new=eval_new)
        x = tensor(*TOKENS)
        for seed in (1, 2):
            swapped(tensor(*TOKENS, seed=seed))
        found = swapped.eval()(x)
        hidden = x + model.before(x)
        new = next(swapped.swaps.children()).new(0.0, hidden)
        share = 0.0 if eval_new else 0.5
        assert_equal(found, model.after(share * model.norm(hidden) + (1 - share) * new))


def test_the_schedule_goes_on_from_a_state_dict_and_in_copies():
    _, first = small(steps=5)
    for seed in range(4):
        first(tensor(*TOKENS, seed=seed))
    _, second = small(steps=5)
    second.load_state_dict(first.state_dict())
    file = io.BytesIO()
    torch.save(first, file)
    file.seek(0)
    third = torch.load(file, weights_only=False)
    for other in (second, copy.deepcopy(first), third):
        assert other.swaps.share == first.swaps.share == pytest.approx(0.4)
        assert len(first.swaps.report.swapped) == len(other.swaps.report.swapped) == 1
        assert_equal(output_of(other, [tensor(*TOKENS)]), output_of(first, [tensor(*TOKENS)]))


def test_the_source_stays_and_shared_parameters_stay_shared():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.LayerNorm(8), nn.Dropout(0.5), shared).train()
    unchanged = snapshot(model)
    swapped: Any = swap_norm(model, (torch.randn(4, 8),), steps=2)
    for _ in range(4):
        swapped(torch.randn(4, 8)).square().sum().backward()
    unchanged()
    names = dict(swapped.named_parameters(remove_duplicate=False))
    assert names["0.weight"] is names["3.weight"]
    assert swapped.training
    assert all(one.training for one in swapped.modules())


def test_dropout_and_batch_norms_of_the_source_follow_the_mode():
    model = nn.Sequential(
        nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.LayerNorm(8), nn.Linear(8, 8)
    )
    x = torch.randn(16, 8)
    swapped: Any = swap_norm(model, (x,), steps=2, warm=9)
    assert (swapped(x) - swapped(x)).abs().max() > 1e-3  # dropout: the batch norm sees one batch
    mean = swapped.get_buffer("1.running_mean").clone()
    assert mean.abs().max() > 0
    swapped.eval()
    assert torch.equal(swapped(x), swapped(x))
    assert torch.equal(mean, swapped.get_buffer("1.running_mean"))


def test_training_learns_the_new_norm():
    """All that is left has a gradient, and steps make the loss smaller."""
    torch.manual_seed(0)
    for to in TO:
        _, swapped = small(to, steps=4)
        optimizer = torch.optim.Adam(swapped.parameters(), 1e-2)
        losses = []
        for _ in range(16):
            x = torch.randn(16, 5, 8, dtype=torch.float64)
            loss = (swapped(x) - x[..., :6]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert sum(losses[-4:]) < 0.9 * sum(losses[4:8]), to
        old = {"norm.weight", "norm.bias"}
        for name, one in swapped.named_parameters():
            assert (one.grad is None) == (name in old), (to, name)


# -- what the new norms compute -----------------------------------------------------------------------


def new_norm(to: str, axis: int, ndim: int, **options: Any) -> Any:
    from graphopt.training.swaps.norms import Old

    gain, shift = tensor(8, seed=5), tensor(8, seed=6)
    chosen = {**NORMS[to].OPTIONS, **options}
    return NORMS[to](Old(axis, ndim, 8, 1e-5, gain, shift, torch.empty(0).double()), **chosen)


@pytest.mark.parametrize(("axis", "shape"), [(2, TOKENS), (1, IMAGE)])
def test_formulas(axis: int, shape: tuple[int, ...]):
    """The formulas of the papers, in training and in eval mode."""
    x = tensor(*shape)
    first = x.movedim(axis, 1)  # channels second
    rest = (1,) * (x.ndim - 2)
    g, b = (tensor(8, seed=seed).reshape(8, *rest) for seed in (5, 6))
    others = (0, *range(2, x.ndim))

    def check(norm: Any, expected: Tensor, share: float = 0.5) -> None:
        assert_equal(norm(share, x), expected.movedim(1, axis))

    norm = new_norm("prepbn", axis, x.ndim, alpha=-0.7)
    m, v = first.mean(others, True), first.var(others, unbiased=False, keepdim=True)
    check(norm, (first - m) / (v + 1e-5).sqrt() * g + b - 0.7 * first)
    count = first.numel() // 8
    norm.eval()
    assert_equal(norm.running_mean, 0.1 * m.flatten())
    assert_equal(norm.running_var, 0.9 + 0.1 * v.flatten() * count / (count - 1))
    rm, rv = (one.reshape(8, *rest) for one in (norm.running_mean, norm.running_var))
    check(norm, (first - rm) / (rv + 1e-5).sqrt() * g + b - 0.7 * first)

    check(new_norm("dyt", axis, x.ndim), torch.tanh(0.5 * first) * g + b)
    rms = first / (first.square().mean(1, True) + 1e-5).sqrt()
    check(new_norm("rmsnorm", axis, x.ndim), rms * g + b)

    norm = new_norm("powernorm", axis, x.ndim)
    phi = rms.square().mean(others, True)
    check(norm, rms / (phi + 1e-5).sqrt() * g + b, share=0.5)
    assert_equal(norm.phi, 0.9 + 0.1 * phi.flatten())
    used = norm.phi.clone().reshape(8, *rest)
    check(norm, rms / (used + 1e-5).sqrt() * g + b, share=0.0)
    norm.eval()
    check(norm, rms / (norm.phi.reshape(8, *rest) + 1e-5).sqrt() * g + b)

    norm = new_norm("powernorm", axis, x.ndim, groups=2).eval()
    parts = first.unflatten(1, (2, 4))
    grouped = (parts / (parts.square().mean(2, True) + 1e-5).sqrt()).flatten(1, 2)
    check(norm, grouped / math.sqrt(1 + 1e-5) * g + b)

    norm = new_norm("groupnorm", axis, x.ndim, groups=2)
    parts = first.reshape(3, 2, -1)
    m, v = parts.mean(2, True), parts.var(2, unbiased=False, keepdim=True)
    check(norm, ((parts - m) / (v + 1e-5).sqrt()).reshape(first.shape) * g + b)

    norm = new_norm("evonorm", axis, x.ndim, groups=2)
    spread = (v + 1e-5).sqrt().expand_as(parts).reshape(first.shape)
    check(norm, first * first.sigmoid() / spread * g + b)


def test_the_gradient_of_power_norm_projects_on_its_statistic():
    """PowerNorm's backward: (g - (1 - momentum) p z) / sqrt(phi), p the running mean of what is left."""
    norm = new_norm("powernorm", 2, 3)
    x = tensor(*TOKENS).requires_grad_()
    projection = torch.zeros(8).double()
    for seed in range(3):
        phi = norm.phi.clone()
        y = F.rms_norm(x, (8,), None, 1e-5)
        z = y / (phi + 1e-5).sqrt()
        up = tensor(*TOKENS, seed=10 + seed)
        gradient = torch.autograd.grad(norm(0.0, x), x, up)[0]
        left = up * norm.weight - 0.1 * projection * z
        projection += (left * z).mean((0, 1)).detach()
        assert_equal(gradient, torch.autograd.grad(y, x, left / (phi + 1e-5).sqrt())[0])
        assert_equal(norm.projection, projection)


# -- after training -----------------------------------------------------------------------------------

LEFT = {  # ops of the norm that stay, between the maps
    "prepbn": [], "batchnorm": [], "dyt": ["mul", "tanh"], "rmsnorm": ["rms_norm"],
    "powernorm": ["rms_norm"], "groupnorm": ["permute", "group_norm", "permute"],
}  # fmt: skip


def transformer() -> nn.Module:
    """A pre-norm block whose norms are read by q, k, v without bias, and behind a mean."""

    def body(m: Any, x: Tensor) -> Tensor:
        y = m.norm1(x)
        x = x + m.o(F.scaled_dot_product_attention(m.q(y), m.k(y), m.v(y)))
        return m.head(m.norm2(x).mean(1))

    torch.manual_seed(0)
    linears = {name: nn.Linear(8, 8, bias=name in "o") for name in ("q", "k", "v", "o", "head")}
    return Net(body, norm1=nn.RMSNorm(8), norm2=nn.LayerNorm(8), **linears).double()


@pytest.mark.parametrize("to", TO)
def test_nothing_that_is_fixed_is_computed_after_optimize(to: str):
    x = tensor(*TOKENS)
    swapped: Any = trained(swap_norm(transformer(), (x,), to=to, steps=3, warm=1))
    assert len(swapped.swaps.report.swapped) == 2
    fast = graphopt.optimize(swapped, (x,))
    for rows in (x, x[:2] * 3):
        assert_equal(output_of(fast, [rows]), output_of(swapped, [rows]), 1e-10)
    states = [*dict(fast.named_parameters()), *dict(fast.named_buffers())]
    kept = {"alpha", "v"} if to in ("dyt", "evonorm") else set()
    for name in states:
        last = name.rpartition(".")[2]
        assert "swaps.calls" not in name
        assert last not in {"running_mean", "running_var", "phi", "projection", "alpha", "v"} - kept
        assert not (name.startswith("norm") or "new.weight" in name or "new.bias" in name), name
    assert not any("norm" in name and "swaps" not in name for name in states)
    if to in LEFT:
        found = [one.replace("movedim", "permute") for one in calls(fast) if one not in
                 ("linear", "scaled_dot_product_attention", "add", "mean", "slice")]  # fmt: skip
        assert sorted(found) == sorted(LEFT[to] * 2)


def test_an_unfinished_swap_is_optimized_as_it_stands():
    x = tensor(*TOKENS)
    swapped = swap_norm(transformer(), (x,), steps=4)
    for seed in range(3):
        swapped(tensor(*TOKENS, seed=seed))
    swapped.eval()
    assert_equal(output_of(graphopt.optimize(swapped, (x,)), [x]), output_of(swapped, [x]), 1e-10)


def test_a_norm_that_is_called_twice_becomes_one_for_each_call():
    """Keyword inputs, two outputs and another batch are those of the source."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.map = nn.LayerNorm(8), nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
            y = self.map(self.norm(x))
            return {"first": y, "second": self.map(self.norm(y * scale))}

    x, scale = tensor(*TOKENS), tensor(8, seed=2)
    swapped: Any = swap_norm(Twice().double(), (x,), {"scale": scale}, steps=1)
    first, second = swapped.swaps.children()
    trained(swapped)
    assert not torch.equal(first.new.weight, second.new.weight)
    fast = graphopt.optimize(swapped, (x,), {"scale": scale})
    for rows in (x, x[:2]):
        found, truth = fast(rows, scale=scale), swapped(rows, scale=scale)
        assert sorted(found) == ["first", "second"]
        assert_equal([*found.values()], [*truth.values()], 1e-10)
    assert set(calls(fast)) <= {"linear", "mul", "permute"}
    # The two maps have their own weights now.
    assert len(list(fast.parameters())) == 4


# -- errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "prepbm", "steps": 1}, "norm is 'prepbm', expected one of .*did you mean prepbn"),
        ({"steps": -1}, "steps is -1"),
        ({"steps": 1, "warm": -2}, "warm -2"),
        ({"steps": 1, "groups": 2}, "prepbn has no option 'groups' .options: momentum, alpha"),
        ({"steps": 1, "to": "groupnorm", "groups": 3}, "its 8 channels do not make 3 groups"),
        ({"steps": 1, "only": "head"}, "nothing can be swapped: no such op in the graph"),
    ],
)
def test_what_cannot_be_asked_for(options: dict[str, Any], message: str):
    with pytest.raises(SwapError, match=message):
        swap_norm(around(nn.LayerNorm(8)), (tensor(*TOKENS),), **options)


def test_a_swap_that_is_not_over_is_not_swapped_again():
    _, swapped = small(steps=4)
    with pytest.raises(SwapError, match="a swap of this model is not over"):
        swap_norm(swapped, (tensor(*TOKENS),), to="dyt", steps=1)
    with pytest.raises(SwapError, match="found neither"):
        swap(swapped, (tensor(*TOKENS),), steps=1)


def test_bfloat16_keeps_statistics_in_float32():
    model = around(nn.LayerNorm(8)).bfloat16()
    x = tensor(*TOKENS).bfloat16()
    for to in ("prepbn", "powernorm", "evonorm"):
        swapped: Any = swap_norm(model, (x,), to=to, steps=1)
        for _ in range(3):
            out = swapped(x)
        assert out.dtype == torch.bfloat16
        (site,) = swapped.swaps.children()
        assert {one.dtype for one in site.state_dict().values()} == {torch.float32}
        assert swapped.eval()(x).dtype == torch.bfloat16
