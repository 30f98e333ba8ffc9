"""The specification of `adapt_norm`: the formulas of the papers, source untouched, frozen ones folded,
online ones with their states."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.adaptation.online import UnMixTNS
from graphopt.adaptation.statistics import pooled
from tests.helpers import (
    Net,
    assert_equal,
    norms_left,
    prepare,
    relative_error,
    snapshot,
    tensor,
)

EPS = 1e-5
FROZEN = ("adabn", "alpha-bn", "adamixbn")
ONLINE = (*FROZEN, "unmix-tns")


def norm() -> nn.BatchNorm2d:
    """One batch norm of 4 channels, its statistics and parameters random."""
    return prepare(nn.BatchNorm2d(4))  # type: ignore[return-value]


def network() -> nn.Module:
    torch.manual_seed(0)
    return prepare(nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6),
        nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5),
    ))  # fmt: skip


def data(*sizes: int) -> list[Tensor]:
    """Batches of different means and sizes."""
    return [
        (1 + i) * tensor(size, 4, 3, 2, seed=i) + 2 * i - 1 for i, size in enumerate(sizes)
    ]  # fmt: skip


def normalized(bn: Any, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """With statistics per channel, or per instance and channel."""

    def image(one: Tensor) -> Tensor:
        return one[..., None, None]

    return (x - image(mean)) / (image(var) + bn.eps).sqrt() * image(bn.weight) + image(bn.bias)


def together(x: Tensor, unbiased: bool) -> tuple[Tensor, Tensor]:
    flat = x.transpose(0, 1).flatten(1)
    return flat.mean(1), flat.var(1, unbiased=unbiased)


def adamix(bn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """AdaMixBN's mixture and its lambda, instance by instance (DomainAdaptor, arXiv 2308.10297)."""
    (mt, vt), ms, vs = together(x, True), bn.running_mean, bn.running_var

    def d(ma: Tensor, sa: Tensor, mb: Tensor, sb: Tensor) -> Tensor:
        return ((ma - mb) ** 2).mean() + ((sa - sb) ** 2).mean()

    shares = []
    for one in x:
        mi, si = one.flatten(1).mean(1), one.flatten(1).std(1)
        ts = d(mt, vt.sqrt(), ms, vs.sqrt())
        others = d(mi, si, ms, vs.sqrt()) + d(mi, si, mt, vt.sqrt())
        shares.append((1 - ts / (ts + others)).clip(0, 1))
    share = torch.stack(shares).mean()
    return share * ms + (1 - share) * mt, share * vs + (1 - share) * vt, share


def unmix(bn: Any, x: Tensor, M: Tensor, V: Tensor, m_bn: float) -> tuple[Tensor, Tensor, Tensor]:
    """UnMix-TNS instance by instance: the output and the next components."""
    K, m = len(M), 1 - (1 - m_bn) ** (len(x) / 64)
    out, dm, dv = [], torch.zeros_like(M), torch.zeros_like(V)
    for one in x:
        mb, vb = one.flatten(1).mean(1), one.flatten(1).var(1, unbiased=False)
        cosines = torch.stack([(mb @ M[k]) / (mb.norm() * M[k].norm()) for k in range(K)])
        p = torch.softmax(cosines / 0.07, 0)[:, None]
        mbk, vbk = (1 - p) * M + p * mb, (1 - p) * V + p * vb
        mu = mbk.mean(0)
        out.append(normalized(bn, one, mu, vbk.mean(0) + (mbk**2).mean(0) - mu**2))
        dm, dv = dm + p * (mb - M), dv + p * (vb - V)
    return torch.stack(out), M + m * dm / len(x), V + m * dv / len(x)


# -- the formulas, frozen ---------------------------------------------------------------------------


def test_adabn_takes_the_statistics_of_all_batches_together():
    bn, batches = norm(), data(5, 2, 3)
    adapted = graphopt.adapt_norm(bn, batches, "adabn")
    x = torch.cat(batches)
    assert_equal(adapted(x), normalized(bn, x, *together(x, False)))
    assert_equal((adapted.running_mean, adapted.running_var), together(x, False))


def test_pooled_variances_are_weighted_by_batch_sizes_and_have_the_variance_of_means():
    batches = data(5, 2, 3)
    assert_equal(pooled(batches, unbiased=False), together(torch.cat(batches), False))
    assert_equal(pooled(batches, unbiased=True), together(torch.cat(batches), True))
    average = torch.stack([together(one, False)[1] for one in batches]).mean(0)
    assert relative_error(average, together(torch.cat(batches), False)[1]) > 0.1


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_alpha_weights_the_target_whose_variance_is_unbiased(alpha: float):
    bn, batches = norm(), data(4, 3)
    x = torch.cat(batches)
    adapted = graphopt.adapt_norm(bn, batches, "alpha-bn", alpha=alpha)
    mean, var = together(x, True)
    mixed = (
        (1 - alpha) * bn.running_mean + alpha * mean,
        (1 - alpha) * bn.running_var + alpha * var,
    )
    assert_equal(adapted(x), normalized(bn, x, *mixed))
    if alpha == 0:
        assert_equal(adapted(x), bn(x))


def test_adamixbn_averages_lambda_over_the_calibration_set():
    bn, batches = norm(), data(3, 4)
    x = torch.cat(batches)
    mean, var, share = adamix(bn, x)
    assert 0.01 < share < 0.99
    assert_equal(graphopt.adapt_norm(bn, batches, "adamixbn")(x), normalized(bn, x, mean, var))


def test_adamixbn_of_the_source_distribution_is_the_source():
    bn, x = norm(), data(6)[0]
    bn.running_mean, bn.running_var = together(x, True)  # type: ignore[assignment]
    adapted = graphopt.adapt_norm(bn, [x], "adamixbn")
    assert_equal(adapted(x), bn(x))


@pytest.mark.parametrize("method", FROZEN)
def test_how_the_data_is_cut_into_batches_makes_no_difference(method: str):
    model, x = network(), tensor(7, 1, 8, 8)
    whole = graphopt.adapt_norm(model, [x], method)
    parts = graphopt.adapt_norm(model, [x[:2], x[2:2], x[2:]], method)
    assert_equal(parts(x), whole(x))


def test_later_norms_see_what_earlier_adapted_ones_make():
    model, x = network(), 3 * tensor(6, 1, 8, 8) + 1
    adapted = graphopt.adapt_norm(model, [x[:4], x[4:]], "adabn")
    training = copy.deepcopy(model)
    for one in training.modules():
        one.train(isinstance(one, nn.BatchNorm2d))
    assert_equal(adapted(x), training(x))  # one batch of all: both use the same statistics


# -- the formulas, online ---------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [1.0, 0.2])
@pytest.mark.parametrize(("method", "alpha"), [("adabn", 1.0), ("alpha-bn", 0.3)])
def test_online_statistics_follow_the_batches(method: str, alpha: float, momentum: float):
    bn, batches = norm(), data(4, 3, 5)
    options: dict[str, Any] = {"alpha": alpha} if method == "alpha-bn" else {}
    adapted = graphopt.adapt_norm(
        bn, method=method, online=True, inputs=batches[0], momentum=momentum, **options
    )
    source = mean, var = bn.running_mean, bn.running_var
    for x in batches:
        found = together(x, method == "alpha-bn")
        mean, var = (
            (1 - momentum) * a + momentum * b for a, b in zip((mean, var), found, strict=True)
        )
        mixed = [(1 - alpha) * s + alpha * t for s, t in zip(source, (mean, var), strict=True)]
        assert_equal(adapted(x), normalized(bn, x, *mixed))


def test_adamixbn_online_mixes_anew_for_every_batch():
    bn, batches = norm(), data(4, 3, 5)
    adapted = graphopt.adapt_norm(bn, method="adamixbn", online=True, inputs=batches[0])
    for x in (*batches, batches[0]):
        mean, var, share = adamix(bn, x)
        assert_equal(adapted(x), normalized(bn, x, mean, var))
        # the published form with gain and shift made for this very batch
        current, spread = together(x, True)
        gain = bn.weight * (spread + EPS).sqrt() / (var + EPS).sqrt()
        shift = share * (current - bn.running_mean) / (spread + EPS).sqrt() * gain + bn.bias
        written = F.batch_norm(x, current, spread, gain, shift, False, 0.0, EPS)
        assert_equal(adapted(x), written)


@pytest.mark.parametrize("components", [1, 2, 5])
def test_unmix_tns_normalizes_each_instance_and_moves_its_components(components: int):
    bn, batches = norm(), data(4, 1, 5)
    adapted: Any = graphopt.adapt_norm(
        bn, method="unmix-tns", online=True, inputs=batches[0], components=components, momentum=0.3
    )
    (tns,) = [one for one in adapted.modules() if isinstance(one, UnMixTNS)]
    M, V = tns.means.clone(), tns.variances.clone()
    for x in batches:
        out, M, V = unmix(bn, x, M, V, 0.3)
        assert_equal(adapted(x), out)
        assert_equal((tns.means, tns.variances), (M, V))


def test_gradients_flow_through_the_statistics_of_the_batch():
    bn, x = norm(), data(4)[0].requires_grad_()
    adapted = graphopt.adapt_norm(bn, None, "alpha-bn", online=True, inputs=x.detach(), alpha=0.3)
    mixed = [0.7 * s + 0.3 * t for s, t in zip((bn.running_mean, bn.running_var),
             together(x, True), strict=True)]  # fmt: skip
    found, truth = (
        torch.autograd.grad(y.square().sum(), x)[0] for y in (adapted(x), normalized(bn, x, *mixed))
    )
    assert_equal(found, truth, 1e-10)
    tns = graphopt.adapt_norm(bn, None, "unmix-tns", online=True, inputs=x.detach())
    tns(x).square().sum().backward()
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)


def test_unmix_tns_with_one_component_is_an_instance_norm_that_starts_from_the_source():
    bn, x = norm(), data(4)[0]
    tns = UnMixTNS(bn.eps, (bn.running_mean, bn.running_var), components=1, momentum=0.1, seed=0)  # type: ignore[arg-type]
    assert_equal((tns.means[0], tns.variances[0]), (bn.running_mean, bn.running_var))
    out = tns(x, bn.weight, bn.bias, bn.running_mean, bn.running_var)
    assert_equal(out, F.instance_norm(x, None, None, bn.weight, bn.bias, eps=bn.eps))


@pytest.mark.parametrize("components", [1, 2, 16])
def test_the_first_mixture_has_the_source_variance_in_expectation(components: int):
    mean, var = tensor(20_000), tensor(20_000, seed=2).square() + 0.5
    tns = UnMixTNS(EPS, (mean, var), components=components, momentum=0.1, seed=3)
    mixture = tns.variances.mean(0) + tns.means.var(0, unbiased=False)
    assert float((mixture / var).mean()) == pytest.approx(1, abs=0.02)
    off = (tns.means.mean(0) - mean) / var.sqrt()
    assert abs(float(off.mean())) < 4 * math.sqrt(1 / (20_000 * components))


def test_norms_of_one_network_start_from_different_draws():
    adapted: Any = graphopt.adapt_norm(
        prepare(nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))), method="unmix-tns",
        online=True, inputs=data(2)[0],
    )  # fmt: skip
    first, second = (one for one in adapted.modules() if isinstance(one, UnMixTNS))
    draws = [(one.means - one.means.mean(0)) / one.variances.sqrt() for one in (first, second)]
    assert relative_error(*draws) > 0.1


# -- what it does to the model ----------------------------------------------------------------------


@pytest.mark.parametrize("method", FROZEN)
def test_a_frozen_one_folds_into_the_convolutions(method: str):
    model, x = network(), 2 * tensor(6, 1, 8, 8) + 1
    unchanged = snapshot(model)
    adapted = graphopt.adapt_norm(model, [x[:4], x[4:]], method)
    unchanged()
    assert relative_error(adapted(x), model(x)) > 0.1
    assert adapted.state_dict().keys() == model.state_dict().keys()
    fast = graphopt.optimize(adapted, (x,))
    assert norms_left(fast) == 0
    assert_equal(fast(x), adapted(x), 1e-10)


def test_the_result_can_be_put_into_the_model():
    model, x = network(), tensor(6, 1, 8, 8)
    adapted = graphopt.adapt_norm(model, [x])
    model.load_state_dict(adapted.state_dict())
    assert_equal(model(x), adapted(x))


@pytest.mark.parametrize("method", ONLINE)
def test_an_online_one_optimized_keeps_adapting_with_its_state(method: str):
    model, x = network(), tensor(6, 1, 8, 8)
    unchanged = snapshot(model)
    adapted: Any = graphopt.adapt_norm(model, method=method, online=True, inputs=x)
    start = copy.deepcopy(adapted.state_dict())
    fast = graphopt.optimize(adapted, (x,))
    assert_equal(list(adapted.state_dict().values()), list(start.values()))  # not by optimizing
    for i, size in enumerate((4, 7, 1)):
        y = (1 + i) * tensor(size, 1, 8, 8, seed=i)
        assert_equal(fast(y), adapted(y))
    states = {name: one for name, one in adapted.state_dict().items() if "adaptation" in name}
    assert bool(states) == (method != "adamixbn")
    for name, one in states.items():
        assert relative_error(one, start[name]) > 1e-3
        assert_equal(fast.state_dict()[name], one)
    unchanged()


@pytest.mark.parametrize("method", ["alpha-bn", "unmix-tns"])
def test_a_state_dict_resumes_and_reset_forgets(method: str):
    model, x, y = network(), tensor(6, 1, 8, 8), 3 * tensor(4, 1, 8, 8, seed=4)
    options: dict[str, Any] = {"momentum": 0.3}
    adapted: Any = graphopt.adapt_norm(model, [x], method, online=True, **options)
    fresh: Any = graphopt.adapt_norm(model, None, method, online=True, inputs=x, **options)
    before = copy.deepcopy(fresh)(y)
    fresh.load_state_dict(copy.deepcopy(adapted.state_dict()))
    after = fresh(y)
    assert_equal(after, adapted(y))
    assert relative_error(after, before) > 1e-6
    adapted.adaptation.reset()
    assert_equal(adapted(y), before)


def test_a_norm_that_is_called_twice_has_statistics_for_each_call():
    model = prepare(Net(lambda m, x: m.bn(m.conv(m.bn(x))), bn=nn.BatchNorm2d(4),
                        conv=nn.Conv2d(4, 4, 1)))  # fmt: skip
    x: Tensor = data(6)[0]
    bn: Any = model.bn
    adapted: Any = graphopt.adapt_norm(model, [x[:2], x[2:]], "adabn")
    first = normalized(bn, x, *together(x, False))
    middle = model.conv(first)  # type: ignore[operator]
    assert_equal(adapted(x), normalized(bn, middle, *together(middle, False)))
    assert [one.where for one in adapted.adaptation.report.adapted] == ["bn", "bn"]
    assert sum(name.startswith("bn.weight") for name, _ in adapted.named_parameters()) == 1
    online: Any = graphopt.adapt_norm(model, None, "alpha-bn", online=True, inputs=x, alpha=1.0)
    online(x)
    assert len(list(online.adaptation.children())) == 2


def test_norms_are_found_by_what_they_compute():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
            self.register_buffer("mean", tensor(4, seed=3))
            self.var = nn.Parameter(tensor(4, seed=4).square() + 0.5, requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            y = F.batch_norm(x, running_var=self.var, running_mean=self.mean)  # type: ignore[arg-type]
            return self.norm(y)  # type: ignore[no-any-return]

    model, x = prepare(Functional()), data(6)[0]
    adapted: Any = graphopt.adapt_norm(model, [{"x": x[:2]}, {"x": x[2:]}], "adabn")
    assert len(adapted.adaptation.report.adapted) == 2
    assert_equal(together(adapted(x=x), False)[0], model.norm.bias)  # type: ignore[union-attr]


def test_float32_models_keep_their_dtypes():
    model, x = network().float(), tensor(6, 1, 8, 8).float()
    for method in ONLINE:
        adapted = graphopt.adapt_norm(model, [x], method, online=method == "unmix-tns")
        assert {one.dtype for one in adapted.state_dict().values() if one.is_floating_point()} == {
            torch.float32
        }
        assert adapted(x).dtype == torch.float32


# -- refused ----------------------------------------------------------------------------------------


def refused(model: nn.Module, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(graphopt.AdaptError) as error:
        graphopt.adapt_norm(model, *args, **kwargs)
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"method": "ada-bn"}, "did you mean adabn?"),
        ({"method": "alpha-bn", "alhpa": 0.1}, "no option 'alhpa': alpha; did you mean alpha?"),
        ({"method": "alpha-bn", "momentum": 0.1}, r"alpha-bn (frozen) has no option 'momentum'"),
        ({"method": "adabn", "alpha": 0.1}, "adabn (frozen) has no option 'alpha': there are none"),
        ({"method": "alpha-bn", "alpha": 1.5}, "alpha is 1.5, expected a number from 0 to 1"),
        ({"method": "adabn", "online": True, "momentum": 0}, "momentum is 0, expected a number above"),
        ({"method": "unmix-tns", "online": True, "components": 0}, "at least 1"),
        ({"method": "unmix-tns"}, "normalizes every instance with statistics of its own"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_named(options: dict[str, Any], reason: str):
    assert reason in refused(norm(), data(4), **options)


def test_models_without_statistics_of_the_source_are_refused():
    x = data(3)
    assert "no batch norm" in refused(nn.Conv2d(4, 2, 1).double(), x)
    batch = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False)).double()
    assert refused(batch, x).startswith("1 normalizes with the statistics of the batch")


def test_missing_and_small_batches_are_refused():
    bn: Any = prepare(nn.BatchNorm1d(4))
    assert "expected batches" in refused(bn, [])
    assert "expected batches" in refused(bn, None)
    assert "at least 2 values per channel for a variance, found 1" in refused(bn, [tensor(1, 4)])
    two = graphopt.adapt_norm(bn, [tensor(1, 4), tensor(1, 4, seed=2)])
    assert_equal(two.running_mean, (tensor(4, seed=1) + tensor(4, seed=2)) / 2)
    labelled = [(data(3)[0], torch.zeros(3))]
    assert "labels are no inputs" in refused(norm(), labelled, inputs=data(3)[0])
    assert "labels are no inputs" in refused(norm(), labelled, online=True, inputs=data(3)[0])
    assert "batches[0]" in refused(norm(), [3])
    assert "for one batch, [x]" in refused(norm(), data(3)[0])
    online = graphopt.adapt_norm(bn, None, "adabn", online=True, inputs=tensor(3, 4))
    with pytest.raises(ValueError, match="at least 2 values per channel"):
        online(tensor(1, 4))


def test_norms_of_vectors_keep_the_source_where_instances_have_no_statistics():
    model = prepare(Net(lambda m, x: m.flat(m.bn(x).mean((2, 3))), bn=nn.BatchNorm2d(4),
                        flat=nn.BatchNorm1d(4)))  # fmt: skip
    x = data(5)[0]
    for method in ("adamixbn", "unmix-tns"):
        adapted: Any = graphopt.adapt_norm(model, [x], method, online=True)
        assert [one.where for one in adapted.adaptation.report.adapted] == ["bn"]
        assert "one value per channel" in adapted.adaptation.report.kept[0].reason
        assert "one value per channel" in refused(prepare(nn.BatchNorm1d(4)), [tensor(3, 4)], method,
                                                  online=True)  # fmt: skip


def test_models_that_write_their_own_states_are_not_frozen():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(4)
            self.register_buffer("seen", torch.zeros(4, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(x)
            self.seen.add_(y.mean((0, 2, 3)))  # type: ignore[operator]
            return y + self.seen.reshape(-1, 1, 1)  # type: ignore[operator, no-any-return]

    model = prepare(Counting())
    assert "writes its states (seen)" in refused(model, data(4))
    adapted = graphopt.adapt_norm(model, None, "adabn", online=True, inputs=data(4)[0])
    twin = copy.deepcopy(adapted)
    assert relative_error(adapted(data(4)[0]), adapted(data(4)[0])) > 1e-6
    fast = graphopt.optimize(twin, (data(4)[0],))
    fast(data(4)[0])
    assert_equal(fast.state_dict()["seen"], adapted.state_dict()["seen"] / 2)
