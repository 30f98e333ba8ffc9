"""The specification of `lower-precision`: bfloat16 where the time goes, within a budget of the error.

The truth is the source model in float64. Models are float32, for others are refused. `force` makes the tests
independent of the processor: every one computes in bfloat16, if slowly.
"""

from __future__ import annotations

import copy
import re
import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings, strategies as st
from torch import Tensor, fx, nn

import graphopt
from graphopt.backends.inductor import plain
from graphopt.ir.capture import capture
from graphopt.ir.driver import Session
from graphopt.passes import lower_precision
from graphopt.passes.base import PassError
from graphopt.passes.lower_precision import LowerPrecision
from graphopt.passes.precision.narrowing import rounded
from graphopt.pipeline import Pipeline
from tests.helpers import Net, calls, output_of, randomize_norms, reasons, snapshot, tensor

BF16, EPS = torch.bfloat16, 2.0**-8  # the largest relative error of one rounding is EPS / 2
FORCED = "lower-precision{force=true}"
DEPLOY = f"deploy,{FORCED}"
ALONE = f"canonicalize,{FORCED}"


def single(*shape: int, seed: int = 1) -> Tensor:
    return tensor(*shape, seed=seed, dtype=torch.float32)


def ready(model: nn.Module) -> nn.Module:
    """In float32 and eval mode, weights and norms randomized."""
    return randomize_norms(model.float().eval())


def error_of(found: Any, model: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """Relative in the 2-norm, against the model in float64."""
    exact = copy.deepcopy(model).double()
    truth = output_of(exact, [x.double() if x.is_floating_point() else x for x in inputs])
    return float((found.double() - truth).norm() / truth.norm())


def lowered(model: nn.Module, *inputs: Tensor, passes: str = DEPLOY, **options: Any) -> Any:
    """`model` in bfloat16: applied, the source untouched, the reported error that which is measured."""
    unchanged = snapshot(model)
    fast = graphopt.optimize(model, inputs, passes=passes, **options)
    unchanged()
    fast.__dict__["seen"] = Seen(fast, inputs).found
    assert not [one for one in fast.report.rolled_back if one.rewrite == "lower-precision"]
    done = record(fast)
    found, source = output_of(fast, inputs), output_of(model, inputs)
    assert (found.dtype, found.shape) == (source.dtype, source.shape)
    assert 0 < error_of(found, model, inputs) <= done.bound == 0.05
    return fast


def record(fast: Any) -> Any:
    found = [one for one in fast.report.applied if one.rewrite == "lower-precision"]
    assert len(found) == 1, reasons(fast)
    return found[0]


def refusal(fast: Any) -> str:
    """The only reason, where nothing was done."""
    assert not [one for one in fast.report.applied if one.rewrite == "lower-precision"]
    found = [one.reason for one in fast.report.refused if one.rewrite == "lower-precision"]
    return "\n".join(found)


class Seen(fx.Interpreter):
    """(op, dtype) of every call of one run."""

    def __init__(self, fast: Any, inputs: tuple[Tensor, ...]) -> None:
        super().__init__(plain(fast.graph_module))
        self.found: list[tuple[str, torch.dtype]] = []
        with torch.no_grad():
            self.run(*(one.clone() for one in inputs))

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and str(n.target).startswith("aten."):
            self.found.append((str(n.target).split(".")[1], value.dtype))
        return value


def dtypes(fast: Any, name: str) -> list[torch.dtype]:
    """What the calls of an op compute, in order."""
    return [dtype for op, dtype in fast.seen if op == name]


# -- one rounding -------------------------------------------------------------------------------------


@given(st.floats(-1e38, 1e38, allow_nan=False))
@settings(max_examples=300, deadline=None)
def test_numbers_go_to_the_nearest(number: float) -> None:
    value = torch.tensor(number, dtype=torch.float64)
    found = rounded(value)
    assert found.dtype == BF16
    away = (found.double() - value).abs()
    for side in (-float("inf"), float("inf")):
        neighbour = torch.nextafter(found, torch.tensor(side, dtype=BF16)).double()
        assert away <= (neighbour - value).abs()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_number_beside_the_middle_is_rounded_once(sign: float) -> None:
    """By way of float32 it would be the middle, and go to the even side."""
    middle, little = 1 + 2.0**-8, 2.0**-40
    values = sign * torch.tensor([middle - little, middle, middle + little], dtype=torch.float64)
    assert rounded(values).tolist() == [sign, sign, sign * (1 + 2.0**-7)]
    assert values[2].to(BF16).item() == sign  # what the framework's own cast makes of it


def test_infinities_and_nan_stay() -> None:
    values = torch.tensor(
        [float("inf"), -float("inf"), float("nan"), 0.0, -0.0], dtype=torch.float64
    )
    assert torch.equal(rounded(values).isnan(), values.isnan())
    assert rounded(values)[[0, 1, 3, 4]].double().equal(values[[0, 1, 3, 4]])
    assert rounded(values)[4].signbit()


def test_weights_are_the_folded_ones_rounded_once() -> None:
    """W diag(gamma / sqrt(var + eps)) in float64, to the nearest: no candidate is nearer anywhere."""
    model = ready(Net(lambda net, x: net.bn(net.conv(x)), conv=nn.Conv2d(16, 32, 3, bias=False),
                      bn=nn.BatchNorm2d(32)))  # fmt: skip
    fast = lowered(model, single(2, 16, 8, 8))
    norm = model.bn
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    exact = {
        "conv.weight": model.conv.weight.double() * scale.view(-1, 1, 1, 1),
        "conv.bias": norm.bias.double() - norm.running_mean.double() * scale,
    }
    state = fast.state_dict()
    assert sorted(state) == sorted(exact)
    for name, value in exact.items():
        found = state[name]
        assert found.dtype == BF16
        away = (found.double() - value).abs()
        for side in (-float("inf"), float("inf")):
            neighbour = torch.nextafter(found, torch.full_like(found, side)).double()
            assert bool((away <= (neighbour - value).abs()).all())


# -- which ops ----------------------------------------------------------------------------------------


class Residual(nn.Module):
    """conv, norm, relu, conv, relu, sum, relu, pool, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(F.relu(self.conv(x)) + x)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def printed(model: nn.Module, x: Tensor, *passes: graphopt.Pass) -> str:
    graph = capture(model, (x,)).graph
    session = Session(graph)
    for one in passes:
        one.run(session)
    return re.sub(r"\bs\d+\b", "N", str(session.graph))


def test_golden() -> None:
    """A cast where bfloat16 begins and one where it ends, none between."""
    found = printed(
        ready(Residual()), single(2, 3, 6, 6), *(one.run for one in Pipeline(DEPLOY).stages)
    )
    expected = """
        graph(x: f32[N, 3, 6, 6])
          to_dtype: bf16[N, 3, 6, 6] = Cast(x, dtype=torch.bfloat16)
          conv2d_2: bf16[N, 8, 6, 6] = Conv(to_dtype, @stem.weight, @stem.bias, stride=(1, 1), padding=(1, 1), dilation=(1, 1))  # stem
          relu: bf16[N, 8, 6, 6] = Relu(conv2d_2)
          conv2d_1: bf16[N, 8, 6, 6] = Conv(relu, @conv.weight, @conv.bias, stride=(1, 1), padding=(1, 1), dilation=(1, 1))  # conv
          relu_1: bf16[N, 8, 6, 6] = Relu(conv2d_1)
          add: bf16[N, 8, 6, 6] = Add(relu_1, relu)
          relu_2: bf16[N, 8, 6, 6] = Relu(add)
          adaptive_avg_pool2d: bf16[N, 8, 1, 1] = AdaptiveAvgPool(relu_2, output_size=(1, 1))
          flatten: bf16[N, 8] = Reshape(adaptive_avg_pool2d, shape=(N, 8))
          linear: bf16[N, 5] = Linear(flatten, @fc.weight, @fc.bias)  # fc
          to_dtype_1: f32[N, 5] = Cast(linear, dtype=torch.float32)  # fc
          return to_dtype_1
    """  # noqa: E501
    assert found == textwrap.dedent(expected).strip()


def test_canonicalize_has_nothing_left_to_do() -> None:
    passes = [one.run for one in Pipeline(DEPLOY).stages]
    model, x = ready(Residual()), single(2, 3, 6, 6)
    again = [*passes, *(one.run for one in Pipeline("canonicalize").stages)]
    assert printed(model, x, *passes) == printed(model, x, *again)


MAPS = {
    "plain": (nn.Conv2d(8, 6, 3), (2, 8, 7, 7)),
    "1d": (nn.Conv1d(8, 6, 3), (2, 8, 9)),
    "3d": (nn.Conv3d(4, 6, 3), (2, 4, 5, 5, 5)),
    "depthwise": (nn.Conv2d(8, 8, 3, groups=8), (2, 8, 7, 7)),
    "grouped": (nn.Conv2d(8, 12, 3, groups=4, stride=2), (2, 8, 7, 7)),
    "dilated": (nn.Conv2d(8, 6, 3, dilation=2, padding="same"), (2, 8, 7, 7)),
    "transposed": (nn.ConvTranspose2d(8, 6, 3, stride=2, bias=False), (2, 8, 4, 4)),
    "linear": (nn.Linear(8, 6), (2, 3, 8)),
    "no bias": (nn.Linear(8, 6, bias=False), (2, 8)),
}


@pytest.mark.parametrize("kind", MAPS)
def test_maps(kind: str) -> None:
    """One rounding of each operand and of the result: sqrt(3) (EPS / 2) at most, in all likelihood less."""
    model, shape = MAPS[kind]
    model = copy.deepcopy(model)
    model.reset_parameters()  # with the seed of the test
    fast = lowered(ready(model), single(*shape))
    assert record(fast).error < EPS
    assert {one.dtype for one in fast.state_dict().values()} == {BF16}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("matmul", lambda net, x: net.a(x) @ net.b(x).mT),
        ("einsum", lambda net, x: torch.einsum("bid,bjd->bij", net.a(x), net.b(x))),
        ("scaled_dot_product_attention",
         lambda net, x: F.scaled_dot_product_attention(net.a(x), net.b(x), x)),
    ],
)  # fmt: skip
def test_products_of_activations(kind: str, body: Any) -> None:
    model = ready(Net(body, a=nn.Linear(8, 8), b=nn.Linear(8, 8)))
    fast = lowered(model, single(2, 5, 8), passes=ALONE)
    assert dtypes(fast, kind) == [BF16]
    assert calls(fast).count("to") == 2


@pytest.mark.parametrize("function", [torch.exp, torch.square, lambda x: x.cumsum(-1)])
def test_what_grows_with_its_input_stays_in_float32(function: Any) -> None:
    model = ready(Net(lambda net, x: function(net.a(x)), a=nn.Linear(8, 8)))
    fast = lowered(model, single(2, 8), passes=ALONE)
    *before, last = calls(fast)
    assert last != "to" and before[-1] == "to"
    assert dtypes(fast, "to") == [BF16, torch.float32]


NORMS = {
    "layer": (nn.LayerNorm(8), (2, 5, 8), "layer_norm"),
    "group": (nn.GroupNorm(2, 8), (2, 8, 5, 5), "group_norm"),
    "batch": (nn.BatchNorm2d(8), (2, 8, 5, 5), "batch_norm"),
}


@pytest.mark.parametrize("kind", NORMS)
def test_norms_round_once(kind: str) -> None:
    """They read and write bfloat16, with their own parameters in float32: what they write is the
    rounding of what they compute from what they read."""
    norm, shape, name = NORMS[kind]
    conv = nn.Linear(8, 8) if kind == "layer" else nn.Conv2d(8, 8, 1)
    body = lambda net, x: net.last(F.relu(net.norm(F.relu(net.first(x)))))  # noqa: E731
    model = ready(Net(body, first=conv, norm=copy.deepcopy(norm), last=copy.deepcopy(conv)))
    x = single(*shape)
    fast = lowered(model, x, passes=ALONE)
    assert dtypes(fast, name) == [BF16]
    assert calls(fast).count("to") == 2
    state = fast.state_dict()
    assert state["norm.weight"].dtype == torch.float32
    own = {n.removeprefix("norm."): state[n] for n in state if n.startswith("norm.")}
    y = single(*shape, seed=4).to(BF16)
    exact = copy.deepcopy(norm).double()
    exact.load_state_dict({**exact.state_dict(), **own})
    narrow = copy.deepcopy(norm).float()
    narrow.load_state_dict({**narrow.state_dict(), **own})
    truth = exact.eval()(y.double()).detach()
    best = float((rounded(truth).double() - truth).norm())
    assert float((narrow.eval()(y).detach().double() - truth).norm()) <= 1.001 * best


def test_root_mean_square_norms_are_float32() -> None:
    """With parameters in bfloat16 they round twice, with others they are no faster."""
    body = lambda net, x: net.b(net.norm(net.a(x)))  # noqa: E731
    model = Net(body, a=nn.Linear(8, 8), norm=nn.RMSNorm(8), b=nn.Linear(8, 8))
    fast = lowered(ready(model), single(2, 8), passes=ALONE)
    assert dtypes(fast, "rms_norm") == [torch.float32]


class Block(nn.Module):
    """A transformer block, norm first, on token ids; positions with a padding mask of the largest
    negative number, whose last row hides everything."""

    def __init__(self, rows: int = 11, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(rows, 16)
        self.first, self.second = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, rows, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        mask = (1.0 - keep[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        a = F.scaled_dot_product_attention(q, k, v, mask.expand(-1, -1, ids.shape[1], -1))
        x = x + self.out(a.transpose(1, 2).flatten(2))
        return self.head(x + self.down(F.gelu(self.up(self.second(x)))))


def tokens() -> tuple[Tensor, Tensor]:
    ids = torch.arange(15).reshape(3, 5) * 7 % 11
    keep = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    return ids, keep


def test_a_mask_that_bfloat16_cannot_hold_stays_in_float32() -> None:
    """A row of it that hides everything shows the mean, and neither nan nor nothing."""

    def body(net: Any, x: Tensor, keep: Tensor) -> Tensor:
        mask = (1.0 - keep[:, None]) * torch.finfo(x.dtype).min
        mask = mask.expand(-1, x.shape[1], -1)
        return F.scaled_dot_product_attention(net.q(x), net.k(x), net.v(x), mask)

    model = ready(Net(body, q=nn.Linear(8, 8), k=nn.Linear(8, 8), v=nn.Linear(8, 8)))
    inputs = single(2, 3, 8), torch.tensor([[1.0, 1, 1], [0, 0, 0]])
    found = output_of(lowered(model, *inputs), inputs)
    mean = model.v(inputs[0])[1].mean(0).detach()
    assert float((found[1, 2] - mean).norm() / mean.norm()) < 2 * EPS


def test_a_mask_that_is_given_and_that_bfloat16_cannot_hold() -> None:
    """As a number it would become -inf, and a row of it nan."""

    def body(net: Any, x: Tensor, mask: Tensor) -> Tensor:
        scores = net.q(x) @ net.k(x).mT
        return (scores + mask).softmax(-1) @ net.v(x)

    model = ready(Net(body, q=nn.Linear(8, 8), k=nn.Linear(8, 8), v=nn.Linear(8, 8)))
    mask = torch.zeros(2, 3, 3)
    mask[1] = torch.finfo(torch.float32).min
    inputs = single(2, 3, 8), mask
    for passes in (ALONE, DEPLOY):
        found = output_of(lowered(model, *inputs, passes=passes), inputs)
        mean = model.v(inputs[0])[1].mean(0).detach()
        assert float((found[1, 2] - mean).norm() / mean.norm()) < 2 * EPS


def test_own_attention_with_such_a_mask() -> None:
    """Scores plus the mask: they are in float32, as is what follows up to the next product."""

    def body(net: Any, x: Tensor, keep: Tensor) -> Tensor:
        scores = net.q(x) @ net.k(x).mT + (1.0 - keep[:, None]) * torch.finfo(x.dtype).min
        return F.softmax(scores, -1) @ net.v(x)

    model = ready(Net(body, q=nn.Linear(8, 8), k=nn.Linear(8, 8), v=nn.Linear(8, 8)))
    keep = torch.tensor([[1.0, 1, 1], [0, 0, 0]])
    fast = lowered(model, single(2, 3, 8), keep, passes=ALONE)
    assert dtypes(fast, "softmax") == [torch.float32]
    assert set(dtypes(fast, "matmul")) == {BF16}
    assert bool(output_of(fast, (single(2, 3, 8), keep)).isfinite().all())


@pytest.mark.parametrize("value", [-1e9, -3.4e38])
def test_masked_fill(value: float) -> None:
    def body(net: Any, x: Tensor, keep: Tensor) -> Tensor:
        scores = (net.q(x) @ net.k(x).mT).masked_fill(keep[:, None] == 0, value)
        return F.softmax(scores, -1) @ x

    model = ready(Net(body, q=nn.Linear(8, 8), k=nn.Linear(8, 8)))
    keep = torch.tensor([[1, 1, 0], [0, 0, 0]])
    fast = lowered(model, single(2, 3, 8), keep, passes=ALONE)
    assert dtypes(fast, "masked_fill") == [BF16 if value > -1e38 else torch.float32]
    assert bool(output_of(fast, (single(2, 3, 8), keep)).isfinite().all())


def test_tables_of_embeddings_stay_and_a_tied_head_gets_its_own() -> None:
    model = ready(Block())
    state = lowered(model, *tokens()).state_dict()
    assert state["embed.weight"].equal(model.embed.weight)
    narrow = [one for one in state.values() if one.shape == (11, 16) and one.dtype == BF16]
    assert len(narrow) == 1 and narrow[0].equal(rounded(model.head.weight.detach().double()))


def test_tables_of_embeddings_too_if_asked() -> None:
    """The head is tied to them as before, under both names."""
    model = ready(Block())
    fast = lowered(model, *tokens(), passes="deploy,lower-precision{force=true,embeddings=true}")
    state = fast.state_dict()
    assert state["embed.weight"].dtype == BF16
    assert state["head.weight"].equal(state["embed.weight"])
    assert sum(one.shape == (11, 16) for _, one in fast.named_parameters()) == 1


@pytest.mark.parametrize(("residual", "expected"), [("auto", 1), ("bf16", 0), ("float32", 2)])
def test_sums_of_two_activations(residual: str, expected: int) -> None:
    """auto: in float32 where a norm reads them."""

    def body(net: Any, x: Tensor) -> Tensor:
        x = net.a(x)
        x = x + net.b(x)
        return net.d(x + net.c(net.norm(x)))

    linear = {name: nn.Linear(8, 8) for name in "abcd"}
    model = ready(Net(body, norm=nn.LayerNorm(8), **linear))
    fast = lowered(
        model, single(2, 8),
        passes=f"canonicalize,lower-precision{{force=true,residual={residual}}}",
    )  # fmt: skip
    assert dtypes(fast, "add").count(torch.float32) == expected


def test_several_users_share_a_cast() -> None:
    def body(net: Any, x: Tensor) -> Tensor:
        y = net.a(x)
        return torch.exp(-y) + torch.square(y) + net.b(x) + net.c(y)

    model = ready(Net(body, a=nn.Linear(8, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 8)))
    fast = lowered(model, single(2, 8), passes=ALONE)
    nodes = [node for node in fast.graph_module.graph.nodes if "aten.to." in str(node.target)]
    assert len({(node.args[0], node.args[1]) for node in nodes}) == len(nodes)


def test_other_batches() -> None:
    model = ready(Residual())
    fast = lowered(model, single(2, 3, 6, 6))
    for rows in (1, 5):
        x = single(rows, 3, 6, 6, seed=3)
        assert error_of(output_of(fast, (x,)), model, (x,)) < 0.05


def test_buffers_that_are_written_and_whole_numbers_stay() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.register_buffer("last", torch.zeros(8))
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.fc(x)
            self.last.copy_(y[0])
            self.count.add_(1)
            return y, self.count * 2

    model = Counting().eval()
    fast = graphopt.optimize(model, (single(2, 8),), passes=DEPLOY)
    record(fast)
    y, count = fast(single(2, 8))
    assert (y.dtype, count.dtype, fast.state_dict()["last"].dtype) == (
        torch.float32, torch.int64, torch.float32,
    )  # fmt: skip
    assert fast.state_dict()["last"].equal(y[0]) and int(count) == 2


@pytest.mark.parametrize("backend", ["eager", "prepacked"])
def test_backends(backend: str) -> None:
    """What they are given is in bfloat16; prepacked packs every map of it."""
    model, x = ready(Residual()), single(2, 3, 6, 6)
    fast = lowered(model, x, backend=backend)
    assert fast.report.backend == backend
    if backend == "prepacked":
        assert "3 convolutions and linear maps" in "".join(fast.report.backend_notes)


# -- what depends on a decision -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "decide"),
    [("gt", lambda y: (y > 0).to(y.dtype)), ("sign", torch.sign), ("round", torch.round),
     ("topk", lambda y: y.topk(2).indices), ("argmax", lambda y: y.argmax(-1))],
)  # fmt: skip
def test_what_a_decision_depends_on_stays_in_float32(name: str, decide: Any) -> None:
    """Other maps, and those behind it, are narrowed."""

    def body(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return decide(net.b(F.relu(net.a(x)))), net.c(x)

    model = ready(Net(body, a=nn.Linear(8, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 8)))
    x = single(4, 8)
    fast = graphopt.optimize(model, (x,), passes=ALONE)
    kinds = {key: one.dtype for key, one in fast.state_dict().items()}
    assert kinds["a.weight"] == kinds["b.weight"] == torch.float32
    assert kinds["c.weight"] == BF16
    assert fast(x)[0].equal(model(x)[0])
    assert name in reasons(fast, "b") and "decides" in reasons(fast, "a")


def test_weights_that_are_stored_as_codes_stay() -> None:
    model = Net(lambda net, x: net.b(F.linear(x, net.codes.float() * net.scale).relu()),
                b=nn.Linear(64, 8)).eval()  # fmt: skip
    model.register_buffer("codes", torch.randint(-128, 127, (64, 64), dtype=torch.int8))
    model.register_buffer("scale", torch.rand(64, 1) / 512)
    fast = lowered(model, single(2, 64))
    assert "its weight is stored as integer codes" in reasons(fast)
    kinds = {one.dtype for one in fast.state_dict().values()}
    assert kinds == {torch.int8, torch.float32, BF16}


def test_the_size_of_a_value_is_no_decision() -> None:
    def body(net: Any, x: Tensor) -> Tensor:
        y = net.a(x)
        return net.b(y) * (torch.full_like(y, 0.5) > 0)

    model = ready(Net(body, a=nn.Linear(8, 8), b=nn.Linear(8, 8)))
    state = lowered(model, single(3, 8), passes=ALONE).state_dict()
    assert {one.dtype for one in state.values()} == {BF16}


def test_a_model_that_is_all_decisions_is_refused() -> None:
    model = ready(Net(lambda net, x: (net.a(x) > 1).float(), a=nn.Linear(8, 8)))
    fast = graphopt.optimize(model, (single(2, 8),), passes=DEPLOY)
    assert "decides by what it computes" in refusal(fast)
    assert "nothing to compute in bfloat16" in refusal(fast)


# -- the contract -------------------------------------------------------------------------------------


def test_the_errors_are_reported() -> None:
    model, x = ready(Residual()), single(2, 3, 6, 6)
    fast = lowered(model, x)
    done = record(fast)
    assert done.contract == "Calibrated(relative error, 0.05)"
    assert done.error == pytest.approx(error_of(output_of(fast, (x,)), model, (x,)), rel=1e-3)
    plain = graphopt.optimize(model, (x,))
    source = float(re.search(r"in float32 ([\d.e-]+)", done.reason)[1])
    assert source == pytest.approx(error_of(output_of(plain, (x,)), model, (x,)), rel=0.1)
    assert "3 of 3 maps, 2 casts" in done.reason
    check = fast.report.check  # of the whole model, against the source as it was captured
    assert 0 < check.float64_error < 1e-12
    assert check.source_error < 1e-5 < check.error == pytest.approx(done.error, rel=1e-3)


def test_over_budget_nothing_is_done() -> None:
    model, x = ready(Residual()), single(2, 3, 6, 6)
    plain = graphopt.optimize(model, (x,))
    fast = graphopt.optimize(model, (x,), passes="deploy,lower-precision{force=true,budget=0.0001}")
    assert re.search(r"error \d\.\de-03, .* the budget is 0.0001", refusal(fast))
    assert str(fast.graph_module.graph) == str(plain.graph_module.graph)
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert output_of(fast, (x,)).equal(output_of(plain, (x,)))


def test_data_is_what_counts() -> None:
    """A difference of two nearly equal rows is lost where the data have them, and only there."""
    model = ready(Net(lambda net, x, y: net.a(x) - net.a(y), a=nn.Linear(8, 8)))
    x = single(2, 8)
    near, far = (x, x * 1.0001), (x, single(2, 8, seed=5))
    for given_, applied in ((near, False), (far, True)):
        one = LowerPrecision(force=True, data=[(given_, None)])
        fast = graphopt.optimize(model, far, passes=["deploy", one])
        assert applied == any(found.rewrite == one.name for found in fast.report.applied)
        assert applied or "the budget is 0.05" in refusal(fast)
    wrong = LowerPrecision(force=True, data=[((x,), None)])
    with pytest.raises(PassError, match="expected inputs of the form"):
        graphopt.optimize(model, far, passes=["deploy", wrong])


def test_all_rows_of_the_example_inputs_count() -> None:
    """Checks look at two rows; what rounding does is measured on all."""
    model = ready(Net(lambda net, x: net.a(x).diff(dim=1), a=nn.Linear(8, 8)))
    x = single(6, 2, 8)
    x[3:, 1] = x[3:, 0] * 1.0001
    x[3:] *= 1e4
    assert "the budget is 0.05" in refusal(graphopt.optimize(model, (x,), passes=DEPLOY))


def test_regions_are_measured_on_what_they_are_called_with() -> None:
    """Of a model that cannot be captured as a whole, on its data too; the whole is off by as much as is
    allowed, and not more."""

    def body(net: Any, x: Tensor) -> Tensor:
        y = net.inside(x)
        return net.head(y if y.mean() > 0 else -y)

    inside = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    model = ready(Net(body, inside=inside, head=nn.Sequential(nn.Linear(8, 8), nn.Tanh())))
    x = single(4, 8)
    for data in ((), [((single(4, 8, seed=seed),), None) for seed in range(3)]):
        passes = ["deploy", LowerPrecision(force=True, data=data)]
        fast = graphopt.optimize(model, (x,), passes=passes)
        assert set(fast.report.regions) == {"inside", "head"} and not fast.report.capture.notes
        done = [one for one in fast.report.applied if one.rewrite == "lower-precision"]
        assert [one.where for one in done] == ["inside", "head"]
        for given_ in (x, *(one for (one,), _ in data)):
            assert 0 < error_of(output_of(fast, (given_,)), model, (given_,)) < 0.05


@pytest.mark.parametrize("kind", ["LSTM", "rfft", "AvgPool3d"])
def test_what_cannot_read_bfloat16_reads_float32(kind: str) -> None:
    if kind == "AvgPool3d":
        model: nn.Module = nn.Sequential(nn.Conv3d(2, 4, 3), nn.AvgPool3d(2), nn.Conv3d(4, 2, 1))
        x = single(2, 2, 6, 6, 6)
    elif kind == "LSTM":
        layers = {"a": nn.Linear(8, 8), "lstm": nn.LSTM(8, 8, batch_first=True)}
        model, x = Net(lambda net, x: net.lstm(net.a(x))[0], **layers), single(2, 5, 8)
    else:
        model, x = (
            Net(lambda net, x: torch.fft.rfft(net.a(x)).abs(), a=nn.Linear(8, 8)),
            single(2, 8),
        )
    lowered(ready(model), x)


def test_nan_is_over_budget() -> None:
    """float32 holds what bfloat16 does not: 3.4e38 / 3.4e38."""
    model = Net(lambda net, x: net.a(x), a=nn.Linear(1, 1, bias=False)).eval()
    with torch.no_grad():
        model.a.weight.fill_(3.4e38)
    fast = graphopt.optimize(model, (torch.tensor([[0.5], [-0.25]]),), passes=DEPLOY)
    assert "error inf" in refusal(fast)


# -- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    model = nn.Linear(8, 8).eval().to(dtype)
    fast = graphopt.optimize(model, (single(2, 8).to(dtype),), passes=DEPLOY)
    assert refusal(fast) == (
        f"the model computes in {str(dtype).removeprefix('torch.')} too, expected float32 alone"
    )


def test_a_processor_without_the_instructions_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(lower_precision, "unsupported", lambda device: f"no bfloat16 on {device}")
    model, x = ready(Residual()), single(2, 3, 6, 6)
    assert refusal(graphopt.optimize(model, (x,), precision="bf16")) == "no bfloat16 on cpu"
    lowered(model, x)  # forced


@pytest.mark.parametrize(
    ("flags", "expected"),
    [((False, True, True, True), "oneDNN"), ((True, True, False, False), "avx512_bf16 or amx"),
     ((True, True, True, False), ""), ((True, True, False, True), ""), ((True, False, False, False), "")],
)  # fmt: skip
def test_which_processors(monkeypatch: Any, flags: tuple[bool, ...], expected: str) -> None:
    names = ("_is_avx2_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported")
    one, *rest = flags
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: one)
    for name, found in zip(names, rest, strict=True):
        monkeypatch.setattr(torch.cpu, name, lambda found=found: found)
    reason = lower_precision.unsupported("cpu")
    assert expected in reason and bool(expected) == bool(reason)


def test_a_model_without_maps_is_refused() -> None:
    fast = graphopt.optimize(Net(lambda net, x: x.exp() + 1), (single(2, 8),), passes=DEPLOY)
    assert refusal(fast) == "there is nothing to compute in bfloat16"


@pytest.mark.parametrize(
    ("options", "message"),
    [("dtype=fp8", "dtype is 'fp8', expected bf16"), ("budget=-1", "budget is -1.0"),
     ("residual=half", "residual is 'half', expected auto or bf16 or float32")],
)  # fmt: skip
def test_wrong_options(options: str, message: str) -> None:
    with pytest.raises(PassError, match=re.escape(message)):
        Pipeline(f"lower-precision{{{options}}}")


# -- optimize(precision=) -----------------------------------------------------------------------------


def test_precision_is_the_pass_at_the_end(monkeypatch: Any) -> None:
    monkeypatch.setattr(lower_precision, "unsupported", lambda device: "")
    model, x = ready(Residual()), single(2, 3, 6, 6)
    fast = graphopt.optimize(model, (x,), precision="bf16")
    record(fast)
    assert fast.report.pipeline == "deploy,lower-precision{dtype=bf16}"
    assert str(Pipeline(fast.report.pipeline)) == fast.report.pipeline
    own = graphopt.optimize(model, (x,), passes=["deploy"], precision="bf16")
    assert output_of(own, (x,)).equal(output_of(fast, (x,)))
    assert output_of(graphopt.optimize(model, (x,)), (x,)).equal(
        output_of(graphopt.optimize(model, (x,), precision=None), (x,))
    )


@pytest.mark.parametrize("near", ["bfloat16", "bf-16", "BF16"])
def test_unknown_precision(near: str) -> None:
    with pytest.raises(ValueError, match=f"unknown precision '{near}'; did you mean 'bf16'"):
        graphopt.optimize(Residual(), (single(2, 3, 6, 6),), precision=near)


def test_unknown_precision_far_from_all() -> None:
    with pytest.raises(
        ValueError, match="unknown precision 8 \\(expected None or 'bf16', 'int8'\\)"
    ):
        graphopt.optimize(Residual(), (single(2, 3, 6, 6),), precision=8)  # type: ignore[arg-type]


def test_tune_is_refused() -> None:
    with pytest.raises(ValueError, match="expected mode='deploy', found mode='tune'"):
        graphopt.optimize(Residual(), (single(2, 3, 6, 6),), precision="bf16", mode="tune")


# -- random nets --------------------------------------------------------------------------------------

LAYERS = ("conv", "again", "relu", "norm", "sum", "tanh", "scale", "softmax", "mean", "cat")


def chain(net: Any, layers: tuple[str, ...], x: Tensor) -> Tensor:
    kept = x
    for one in layers:
        if one == "conv":
            x = net.conv(x)
        elif one == "again":  # a shared weight
            x = net.conv(net.conv(x))
        elif one == "relu":
            x = F.relu(x)
        elif one == "norm":
            x = net.norm(x)
        elif one == "sum":
            x, kept = x + kept, x
        elif one == "tanh":
            x = torch.tanh(x)
        elif one == "scale":
            x = net.scale * x
        elif one == "softmax":
            x = x * F.softmax(x, 1)
        elif one == "mean":
            x = x + x.mean((2, 3), keepdim=True)
        elif one == "cat":
            x = torch.cat([x[:, 2:], kept[:, :2]], 1)
    return x


@given(st.lists(st.sampled_from(LAYERS), min_size=1, max_size=6), st.integers(0, 99),
       st.sampled_from(["auto", "bf16", "float32"]))  # fmt: skip
@settings(max_examples=10, deadline=None, phases=[Phase.generate])
def test_random_nets(layers: list[str], seed: int, residual: str) -> None:
    """Every op rounds its operands and its result: an error of a few EPS for each, as none of these
    layers makes relative errors in the 2-norm much larger."""
    torch.manual_seed(seed)
    model = Net(
        lambda net, x: chain(net, ("conv", *layers), x), conv=nn.Conv2d(6, 6, 3, padding=1),
        norm=nn.GroupNorm(2, 6), scale=nn.Parameter(torch.rand(6, 1, 1) + 0.5),
    ).eval()  # fmt: skip
    x = single(2, 6, 5, 5, seed=seed)
    fast = graphopt.optimize(
        model, (x,), passes=f"deploy,lower-precision{{force=true,budget=1,residual={residual}}}"
    )
    record(fast)
    found = output_of(fast, (x,))
    assert found.dtype == torch.float32
    assert error_of(found, model, (x,)) < 4 * (len(layers) + 1) * EPS
