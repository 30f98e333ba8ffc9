"""The specification of reconstructions: exact where channels depend on each other, optimal where not.

Every weight is compared with a solution found in another way (numpy's least squares, a linear program), or
the output of the smaller graph with that of the source.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from sklearn.datasets import load_digits
from torch import Tensor, nn

import graphopt
from graphopt.ir.channels import Groups
from graphopt.ir.channels.remove import remove
from graphopt.ir.graph import Graph
from graphopt.ir.interpret import Interpreter
from graphopt.passes.pruning import from_data
from graphopt.passes.pruning.evidence import Evidence, EvidenceError
from graphopt.passes.pruning.from_data import bias_correction, least_squares
from graphopt.passes.pruning.from_parameters import data_free, optimal_transport
from graphopt.passes.pruning.maps import untouched
from graphopt.passes.pruning.reconstruction import RECONSTRUCTION
from tests.helpers import Net, assert_equal, prepare, relative_error, tensor

CLOSE = 1e-8
IMAGE, TOKENS = (4, 3, 6, 6), (4, 5, 8)
AWAY = [1, 4, 6, 7]  # of 8 channels of `first`; those that stay are 0, 2, 3, 5
STAY = [0, 2, 3, 5]


def labels(groups: Groups, channels: Iterable[int], state: str = "first.weight") -> set[int]:
    (layer,) = groups.states[state].axes[0]
    return {int(layer[one]) for one in channels}


def found(model: nn.Module, *inputs: Tensor) -> Groups:
    return graphopt.channel_groups(model, inputs)


def smaller(groups: Groups, gone: set[int], values: dict[str, Tensor]) -> Graph:
    """The graph without the channels, with new values; those of `groups` stay."""
    source = groups.graph.states
    for name, value in values.items():
        assert value.shape == source[name].tensor.shape
        assert value.dtype == source[name].tensor.dtype
    new = {name: dataclasses.replace(source[name], tensor=one) for name, one in values.items()}
    groups.graph.states = {**source, **new}
    try:
        return remove(groups, gone)
    finally:
        groups.graph.states = source


@torch.no_grad()
def output(graph: Graph, x: Tensor) -> Tensor:
    (y,) = Interpreter(graph, writes=False).run([x])
    return y


def error(graph: Graph, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        truth = model(x)
    return float((output(graph, x) - truth).norm() / truth.norm())


# -- exact where channels are combinations of those that stay ---------------------------------------


def dependent(model: nn.Module, *names: str, mix: Tensor | None = None) -> nn.Module:
    """Channels that go away become combinations of those that stay, in these states."""
    mix = tensor(4, 4, seed=5) if mix is None else mix
    states = model.state_dict()
    for name in names:
        states[name][AWAY] = torch.tensordot(mix, states[name][STAY], 1)
    return model


def image(body: Callable[[Any, Tensor], Tensor], last: nn.Module, **modules: Any) -> nn.Module:
    made = {"first": nn.Conv2d(3, 8, 3, padding=1), "last": last, **modules}
    return prepare(Net(lambda m, x: body(m, m.first(x)), **made))


def tokens(body: Callable[[Any, Tensor], Tensor], **modules: Any) -> nn.Module:
    return prepare(Net(lambda m, x: body(m, m.first(x)), first=nn.Linear(8, 8), **modules))


def attend(m: Any, x: Tensor) -> Tensor:
    q, k = m.q(x), m.k(x)
    return m.last((q @ k.transpose(1, 2)).softmax(-1) @ x)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(tensor(*shape, seed=8))


FIRST = ("first.weight", "first.bias")
DEPENDENT: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: tokens(lambda m, x: m.last(x), last=nn.Linear(8, 6)),
    "no bias": lambda: tokens(lambda m, x: m.last(x), last=nn.Linear(8, 6, bias=False)),
    "product of a parameter": lambda: tokens(lambda m, x: x @ m.w, w=parameter(8, 6)),
    "product and sum": lambda: tokens(lambda m, x: torch.addmm(m.b, x.flatten(0, 1), m.w),
                                      w=parameter(8, 6), b=parameter(6)),
    "product from the left": lambda: tokens(lambda m, x: m.w @ x.transpose(1, 2), w=parameter(6, 8)),
    "einsum": lambda: tokens(lambda m, x: torch.einsum("btc,cd->bdt", x, m.w), w=parameter(8, 6)),
    "values of attention": lambda: tokens(attend, q=nn.Linear(8, 6), k=nn.Linear(8, 6),
                                          last=nn.Linear(8, 5)),
    "padded": lambda: image(lambda m, x: m.last(x), nn.Conv2d(8, 6, 3, padding=1)),
    "strided, dilated": lambda: image(lambda m, x: m.last(x),
                                      nn.Conv2d(8, 6, 3, stride=2, padding=2, dilation=2)),
    "of one axis": lambda: image(lambda m, x: m.last(x.flatten(2)), nn.Conv1d(8, 6, 4, padding=2)),
    "transposed": lambda: image(lambda m, x: m.last(x),
                                nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1)),
    "grouped": lambda: image(lambda m, x: m.last(torch.cat([x, -x], 1)), nn.Conv2d(16, 6, 3, groups=2)),
    "flattened": lambda: image(lambda m, x: m.last(F.avg_pool2d(x, 3).flatten(1)), nn.Linear(32, 6)),
    "pooled": lambda: image(lambda m, x: m.last(F.avg_pool2d(x, 2).permute(0, 2, 3, 1)), nn.Linear(8, 6)),
    "residual": lambda: image(lambda m, x: m.last(m.second(x) + x), nn.Conv2d(8, 6, 1),
                              second=nn.Conv2d(8, 8, 3, padding=1)),
}  # fmt: skip


@pytest.mark.parametrize("name", DEPENDENT)
def test_least_squares_is_exact_where_channels_depend_on_those_that_stay(name: str) -> None:
    model = DEPENDENT[name]()
    shape = IMAGE if isinstance(model.first, nn.Conv2d) else TOKENS
    dependent(model, *FIRST, *(["second.weight", "second.bias"] if name == "residual" else []))
    groups = found(model, tensor(*shape))
    data = [(tensor(*shape, seed=seed), None) for seed in range(12)]
    gone = labels(groups, AWAY)
    plain = smaller(groups, gone, {})
    values = least_squares(Evidence(groups, data), gone, ridge=1e-13)
    fresh = tensor(*shape, seed=77)
    assert error(plain, model, fresh) > 0.05
    assert error(smaller(groups, gone, values), model, fresh) < CLOSE


def normed(last: nn.Module, act: Callable[[Tensor], Tensor] = F.relu) -> nn.Module:
    """Filters scaled by a batch norm; in no other way is one a combination of others."""
    model = image(lambda m, x: m.last(act(m.norm(x))), last, norm=nn.BatchNorm2d(8))
    with torch.no_grad():
        model.norm.weight.copy_(tensor(8, seed=3).abs() + 0.5)
        model.norm.running_mean.copy_(tensor(8, seed=4))
    return model


def after_norm(model: nn.Module, mix: Tensor) -> nn.Module:
    """Channels behind the batch norm become combinations of those that stay."""
    states = model.state_dict()
    scale = states["norm.weight"] * (states["norm.running_var"] + model.norm.eps).rsqrt()
    rows = states["first.weight"] * scale[:, None, None, None]
    shift = (states["first.bias"] - states["norm.running_mean"]) * scale + states["norm.bias"]
    states["first.weight"][AWAY] = (
        torch.tensordot(mix, rows[STAY], 1) / scale[AWAY, None, None, None]
    )
    states["norm.bias"][AWAY] += mix @ shift[STAY] - shift[AWAY]
    return model


def test_data_free_sees_filters_through_the_batch_norm() -> None:
    mix = tensor(4, 4, seed=5)
    model = after_norm(normed(nn.Conv2d(8, 6, 3, padding=1), act=lambda x: x), mix)
    groups = found(model, tensor(*IMAGE))
    gone = labels(groups, AWAY)
    values = data_free(Evidence(groups), gone, ridge=1e-14)
    assert list(values) == ["last.weight"]
    weight = model.last.weight.detach()
    expected = weight[:, STAY] + torch.einsum("orhw,rk->okhw", weight[:, AWAY], mix)
    assert_equal(values["last.weight"][:, STAY], expected, CLOSE)
    assert error(smaller(groups, gone, values), model, tensor(*IMAGE, seed=9)) < CLOSE


def test_data_free_weighs_rows_shifts_and_ridge() -> None:
    model = tokens(lambda m, x: m.last(x.relu()), last=nn.Linear(8, 6))
    groups = found(model, tensor(*TOKENS))
    values = data_free(Evidence(groups), labels(groups, AWAY), ridge=0.3, shifts=2.0)
    states = {name: one.numpy() for name, one in model.state_dict().items()}
    rows = np.concatenate([states["first.weight"], 2**0.5 * states["first.bias"][:, None]], 1)
    kept = rows[STAY].T
    damping = np.sqrt(0.3 * (kept**2).sum(0).mean()) * np.eye(4)
    wanted = np.concatenate([rows[AWAY].T, np.zeros((4, 4))])
    mix = np.linalg.lstsq(np.concatenate([kept, damping]), wanted, rcond=None)[0]
    weight = states["last.weight"]
    expected = torch.from_numpy(weight[:, STAY] + weight[:, AWAY] @ mix.T)
    assert_equal(values["last.weight"][:, STAY], expected, CLOSE)


def test_data_free_looks_at_what_writes_a_channel_before_it_is_read() -> None:
    """What is added to the stream later does not matter to `second`."""
    mix = tensor(4, 4, seed=5)
    model = image(
        lambda m, x: m.last(m.second(x) + x), nn.Conv2d(8, 6, 1), second=nn.Conv2d(8, 8, 1)
    )
    dependent(model, *FIRST, mix=mix)
    groups = found(model, tensor(*IMAGE))
    values = data_free(Evidence(groups), labels(groups, AWAY), ridge=1e-14)
    weight = model.second.weight.detach()
    expected = weight[:, STAY] + torch.einsum("orhw,rk->okhw", weight[:, AWAY], mix)
    assert_equal(values["second.weight"][:, STAY], expected, CLOSE)


SAME = torch.eye(4).double()[[2, 0, 3, 1]]  # each that goes is the twin of one that stays


def twins(model: nn.Module, *more: str) -> nn.Module:
    names = [name for name, one in model.state_dict().items()
             if one.ndim and name.rpartition(".")[0] in ("first", *more)]  # fmt: skip
    return dependent(model, *names, mix=SAME)


def twin_slopes() -> nn.Module:
    model = tokens(lambda m, x: m.last(m.act((x + m.places).transpose(1, 2)).transpose(1, 2)),
                   act=nn.PReLU(8), places=parameter(1, 5, 8), last=nn.Linear(8, 6))  # fmt: skip
    with torch.no_grad():
        model.act.weight.copy_(tensor(8, seed=2))
        model.places[..., AWAY] = model.places[..., STAY] @ SAME.T
    return dependent(model, *FIRST, "act.weight", mix=SAME)


TWINS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: twins(tokens(lambda m, x: m.last(F.gelu(x)), last=nn.Linear(8, 6))),
    "norm": lambda: after_norm(normed(nn.Conv2d(8, 6, 3, padding=1)), SAME),
    "flattened": lambda: after_norm(normed(nn.Sequential(nn.Flatten(), nn.Linear(288, 6))), SAME),
    "depthwise": lambda: twins(image(lambda m, x: m.last(m.d(x.relu()).relu()), nn.Conv2d(8, 6, 1),
                                     d=nn.Conv2d(8, 8, 3, groups=8)), "d"),
    "grouped": lambda: twins(image(lambda m, x: m.last(torch.cat([x.relu(), x.sigmoid()], 1)),
                                   nn.Conv2d(16, 6, 3, groups=2))),
    "residual": lambda: twins(image(lambda m, x: m.last((m.second(x.relu()) + x).relu()),
                                    nn.Conv2d(8, 6, 1), second=nn.Conv2d(8, 8, 3, padding=1)), "second"),
    "joined": lambda: twins(image(lambda m, x: m.last(torch.cat([x.relu(), x.tanh(), m.one(x)], 1)),
                                  nn.Conv2d(18, 6, 1), one=nn.Conv2d(8, 2, 1))),
    "norm beside": lambda: twins(image(lambda m, x: m.last((m.norm(x) + x).relu()), nn.Conv2d(8, 6, 1),
                                       norm=nn.BatchNorm2d(8)), "norm"),
    "norm of both": lambda: twins(image(
        lambda m, x: m.last(m.norm(x).relu() + m.norm(m.second(x.tanh())).relu()), nn.Conv2d(8, 6, 1),
        norm=nn.BatchNorm2d(8), second=nn.Conv2d(8, 8, 1)), "norm", "second"),
    "slopes, positions": twin_slopes,
}  # fmt: skip


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize(
    "method",
    [partial(data_free, ridge=1e-14), optimal_transport, partial(optimal_transport, fuse=False)],
    ids=["data-free", "optimal-transport", "not fused"],
)
def test_twins_merge_exactly(name: str, method: Any) -> None:
    """`v_1 f(x) + v_2 f(x) = (v_1 + v_2) f(x)`, whatever f is."""
    model = TWINS[name]()
    shape = IMAGE if isinstance(model.first, nn.Conv2d) else TOKENS
    groups = found(model, tensor(*shape))
    gone = labels(groups, AWAY)
    x = tensor(*shape, seed=9)
    assert error(smaller(groups, gone, {}), model, x) > 0.05
    assert error(smaller(groups, gone, method(Evidence(groups), gone)), model, x) < CLOSE


# -- optimal where they are not ---------------------------------------------------------------------


def fitted(x: Tensor, y: Tensor, bias: bool = True) -> Tensor:
    """The nearest affine (or linear) function of rows of x to rows of y."""
    x = torch.cat([x, torch.full((len(x), 1), float(bias))], 1).double()
    return x @ torch.from_numpy(np.linalg.lstsq(x.numpy(), y.numpy(), rcond=None)[0])


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_least_squares_finds_the_best_weight_and_bias(bias: bool) -> None:
    model = tokens(lambda m, x: m.last(x.relu()), last=nn.Linear(8, 6, bias=bias))
    groups = found(model, tensor(*TOKENS))
    gone, x = labels(groups, AWAY), tensor(40, 5, 8, seed=2)
    values = least_squares(Evidence(groups, [(x[:7], None), (x[7:], None)]), gone, ridge=1e-13)
    hidden = model.first(x).relu().flatten(0, 1)
    best = fitted(hidden[:, STAY], model(x).flatten(0, 1), bias)
    assert_equal(output(smaller(groups, gone, values), x).flatten(0, 1), best, CLOSE)


@torch.no_grad()
def test_least_squares_finds_the_best_kernel() -> None:
    model = normed(nn.Conv2d(8, 6, 3, padding=1, stride=2))
    groups = found(model, tensor(*IMAGE))
    gone, x = labels(groups, AWAY), tensor(30, 3, 6, 6, seed=2)
    values = least_squares(Evidence(groups, [(x, None)]), gone, ridge=1e-13)
    hidden = model.norm(model.first(x)).relu()[:, STAY]
    patches = F.unfold(hidden, 3, padding=1, stride=2).mT.flatten(0, 1)
    best = fitted(patches, model(x).flatten(2).mT.flatten(0, 1))
    found_there = output(smaller(groups, gone, values), x).flatten(2).mT.flatten(0, 1)
    assert_equal(found_there, best, CLOSE)


@torch.no_grad()
def test_least_squares_makes_up_for_errors_of_maps_before() -> None:
    """The second map is fitted to what the first one, as it is now, makes of the data."""
    model = tokens(lambda m, x: m.last(m.second(x.relu()).relu()), second=nn.Linear(8, 8),
                   last=nn.Linear(8, 6))  # fmt: skip
    groups = found(model, tensor(*TOKENS))
    gone = labels(groups, AWAY) | labels(groups, AWAY, "second.weight")
    x = tensor(40, 5, 8, seed=2)
    values = least_squares(Evidence(groups, [(x, None)]), gone, ridge=1e-13)
    first = model.first(x).relu().flatten(0, 1)
    second = model.second(first)[:, STAY]
    best = fitted(fitted(first[:, STAY], second).relu(), model(x).flatten(0, 1))
    assert_equal(output(smaller(groups, gone, values), x).flatten(0, 1), best, CLOSE)


@pytest.mark.parametrize("batched", [True, False])
def test_data_is_summed_part_by_part(monkeypatch: pytest.MonkeyPatch, batched: bool) -> None:
    model = image(lambda m, x: m.last(x if batched else x[0]), nn.Conv2d(8, 6, 3, padding=1))
    groups = found(model, tensor(*IMAGE))
    gone, evidence = labels(groups, AWAY), Evidence(groups, [(tensor(*IMAGE), None)])
    expected = least_squares(evidence, gone)
    monkeypatch.setattr(from_data, "PART", 1)
    for name, value in least_squares(evidence, gone).items():
        assert_equal(value, expected[name], CLOSE)


def test_a_large_ridge_is_plain_removal() -> None:
    model = normed(nn.Conv2d(8, 6, 3, bias=False))
    groups = found(model, tensor(*IMAGE))
    gone, data = labels(groups, AWAY), [(tensor(*IMAGE), None)]
    for method in (partial(least_squares, evidence=Evidence(groups, data)),
                   partial(data_free, evidence=Evidence(groups))):  # fmt: skip
        weight = method(gone=gone, ridge=1e12)["last.weight"]
        assert_equal(weight[:, STAY], model.last.weight[:, STAY].detach(), 1e-9)


@torch.no_grad()
def test_the_transport_plan_is_optimal() -> None:
    """Against the linear program, for rows and biases that are fused and columns that are added."""
    model = tokens(lambda m, x: m.last(x.relu()), last=nn.Linear(8, 6))
    groups = found(model, tensor(*TOKENS))
    gone = labels(groups, AWAY[:3])
    stay = [one for one in range(8) if one not in AWAY[:3]]
    values = optimal_transport(Evidence(groups), gone)
    rows = torch.cat([model.first.weight, model.first.bias[:, None]], 1)
    unit = rows / rows.norm(dim=1, keepdim=True)
    cost = (unit[:, None] - unit[stay]).abs().sum(2)
    sums = [np.kron(np.eye(8), np.ones(5)), np.kron(np.ones(8), np.eye(5))]
    plan = linprog(
        cost.flatten().numpy(), A_eq=np.concatenate(sums), b_eq=[1 / 8] * 8 + [1 / 5] * 5
    )
    mass = torch.from_numpy(plan.x.reshape(8, 5))
    fused = (mass / mass.sum(0)).T @ rows
    assert_equal(values["first.weight"][stay], fused[:, :-1], CLOSE)
    assert_equal(values["first.bias"][stay], fused[:, -1], CLOSE)
    added = model.last.weight @ (mass / mass.sum(1, keepdim=True))
    assert_equal(values["last.weight"][:, stay], added, CLOSE)


# -- means -------------------------------------------------------------------------------------------


def means(graph: Graph, data: list[Tensor]) -> list[Tensor]:
    """The mean of every channel of the outputs of convolutions and linear maps."""
    sums: list[list[Tensor]] = []

    class Seen(Interpreter):
        def call(self, node: Any, env: Any) -> Any:
            value = super().call(node, env)
            name = str(node.target)
            if "conv" in name or "linear" in name:
                rows = value.movedim(1, -1) if "conv" in name else value
                sums[-1].append(rows.flatten(0, -2))
            return value

    for x in data:
        sums.append([])
        Seen(graph, writes=False).run([x])
    return [torch.cat(rows).mean(0) for rows in zip(*sums, strict=True)]


@torch.no_grad()
def test_bias_correction_restores_every_mean() -> None:
    """Of maps that lose inputs: with padding, several batches, and a bias in a norm's running mean."""
    model = image(lambda m, x: m.last(F.relu(m.norm(m.second(F.gelu(x)))).flatten(1)), nn.Linear(288, 6),
                  second=nn.Conv2d(8, 8, 3, padding=1, bias=False), norm=nn.BatchNorm2d(8))  # fmt: skip
    groups = found(model, tensor(*IMAGE))
    gone = labels(groups, AWAY) | labels(groups, AWAY[:2], "second.weight")
    data = [tensor(3, 3, 6, 6, seed=1), tensor(5, 3, 6, 6, seed=2) + 1]
    values = bias_correction(Evidence(groups, [(x, None) for x in data]), gone)
    assert sorted(values) == ["last.bias", "norm.running_mean"]
    pruned = smaller(groups, gone, values)
    (_, second, last), (_, new_second, new_last) = means(groups.graph, data), means(pruned, data)
    kept = [one for one in range(8) if one not in AWAY[:2]]
    shift = (model.norm.running_mean - values["norm.running_mean"])[kept]
    assert_equal(new_second + shift, second[kept], CLOSE)
    assert_equal(new_last, last, CLOSE)
    assert relative_error(means(smaller(groups, gone, {}), data)[2], last) > 0.01


# -- what is left alone, and what is said -----------------------------------------------------------


def test_weights_that_are_shared_or_derived_stay() -> None:
    model = tokens(lambda m, x: m.last(m.second(m.second(x).relu())) + F.linear(x, m.t.t()),
                   second=nn.Linear(8, 8), last=nn.Linear(8, 6, bias=False),
                   t=parameter(8, 6))  # fmt: skip
    groups = found(model, tensor(*TOKENS))
    gone = labels(groups, AWAY) | labels(groups, AWAY, "second.weight")
    data = [(tensor(*TOKENS, seed=seed), None) for seed in range(3)]
    assert untouched(groups, gone) == {
        "second.weight": "its weight is read more than once",
        "last.weight": "it has no bias of its own to hold a mean",
    }
    assert list(least_squares(Evidence(groups, data), gone)) == ["last.weight"]
    assert bias_correction(Evidence(groups, data), gone) == {}
    assert sorted(data_free(Evidence(groups), gone)) == ["last.weight", "second.weight"]
    assert "t" not in optimal_transport(Evidence(groups), gone)


def beside(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.last(x)
    return m.norm(y) + y


NO_BIAS: dict[str, Callable[[], nn.Module]] = {
    "read beside the norm": lambda: image(beside, nn.Conv2d(8, 6, 1, bias=False), norm=nn.BatchNorm2d(6)),
    "one norm for two": lambda: image(lambda m, x: m.norm(m.last(x)) + m.norm(m.other(x)),
                                      nn.Conv2d(8, 6, 1, bias=False), other=nn.Conv2d(8, 6, 1),
                                      norm=nn.BatchNorm2d(6)),
    "norm of another axis": lambda: tokens(lambda m, x: m.norm(m.last(x)), last=nn.Linear(8, 6, bias=False),
                                           norm=nn.BatchNorm1d(5)),
    "norm of the batch": lambda: image(lambda m, x: F.batch_norm(m.last(x), None, None, training=True),
                                       nn.Conv2d(8, 6, 1, bias=False)),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_BIAS)
def test_a_mean_has_to_have_a_place(name: str) -> None:
    model = NO_BIAS[name]()
    shape = IMAGE if isinstance(model.first, nn.Conv2d) else TOKENS
    groups = found(model, tensor(*shape))
    gone, data = labels(groups, AWAY), [(tensor(*shape), None)]
    reason = "it has no bias of its own to hold a mean"
    assert untouched(groups, gone)["last.weight"] == reason
    corrected = bias_correction(Evidence(groups, data), gone)
    assert list(corrected) == (["other.bias"] if name == "one norm for two" else [])


def test_transposed_convolutions_with_groups_stay() -> None:
    model = image(
        lambda m, x: m.last(torch.cat([x, -x], 1)), nn.ConvTranspose2d(16, 6, 2, groups=2)
    )
    groups = found(model, tensor(*IMAGE))
    gone, evidence = labels(groups, AWAY), Evidence(groups, [(tensor(*IMAGE), None)])
    for name, method in RECONSTRUCTION.items():
        assert "last.weight" not in method(evidence, gone), name


@pytest.mark.parametrize("name", ["least-squares", "bias-correction"])
def test_data_is_needed(name: str) -> None:
    groups = found(tokens(lambda m, x: m.last(x), last=nn.Linear(8, 6)), tensor(*TOKENS))
    with pytest.raises(EvidenceError, match=f"{name} needs data"):
        RECONSTRUCTION[name](Evidence(groups), labels(groups, AWAY))


# -- a trained network ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A network that reads digits, inputs it was trained on and others."""
    found = load_digits()
    x = torch.tensor(found.images / 16, dtype=torch.float32)[:, None]
    y = torch.tensor(found.target)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(3):
        for rows in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval(), x[:256], x[1200:]


@pytest.mark.parametrize(("name", "limit"), [("least-squares", 0.4), ("bias-correction", 0.95),
                                             ("data-free", 1.0), ("optimal-transport", 1.0)])  # fmt: skip
def test_output_is_nearer_than_after_plain_removal(
    digits: tuple[nn.Module, Tensor, Tensor], name: str, limit: float
) -> None:
    """Half of the channels of every width go, the first ones; on data that was not seen."""
    model, data, fresh = digits
    groups = found(model, data[:2])
    gone = {one.label for family in groups.families() for one in family[: len(family) // 2]}
    evidence = Evidence(groups, [(part, None) for part in data.split(64)])
    values = RECONSTRUCTION[name](evidence, gone)
    plain = error(smaller(groups, gone, {}), model, fresh)
    assert error(smaller(groups, gone, values), model, fresh) < limit * plain
