"""The specification of `prune`: what is removed leaves the model that has it masked.

The reference runs the source at full size with a mask on every value (graphopt.verify.masked); every
network here is compared with it in float64 by the pass itself, at batches of other sizes by the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.ir import ops
from graphopt.ir.channels import remove
from graphopt.passes.prune import Prune
from tests.helpers import Net, prepare

IMAGE, TOKENS = (2, 3, 8, 8), (2, 6, 8)


def image(body: Callable[[Any, Tensor], Tensor], **modules: Any) -> nn.Module:
    """`body` between a convolution and a linear map of pooled channels."""
    made = {"first": nn.Conv2d(3, 8, 3, padding=1), "second": nn.Conv2d(8, 8, 3, padding=1),
            "norm": nn.BatchNorm2d(8), "last": nn.LazyConv2d(5, 3), **modules}  # fmt: skip
    model = Net(lambda m, x: m.last(body(m, m.first(x))).mean((2, 3)), **made)
    model(torch.randn(IMAGE))
    return prepare(model)


def tokens(body: Callable[[Any, Tensor], Tensor], **modules: Any) -> nn.Module:
    made = {
        "first": nn.Linear(8, 12),
        "second": nn.Linear(12, 12),
        "last": nn.LazyLinear(5),
        **modules,
    }
    model = Net(lambda m, x: m.last(body(m, m.first(x))), **made)
    model(torch.randn(TOKENS))
    return prepare(model)


def attend(m: Any, x: Tensor, heads: int = 3, fused: bool = False) -> Tensor:
    qkv = m.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    if fused:
        y = F.scaled_dot_product_attention(*qkv.unbind(0))
    else:
        q, k, v = qkv[0], qkv[1], qkv[2]
        y = (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v
    return m.second(y.transpose(1, 2).flatten(-2))


def locally(m: Any, qkv: Tensor, heads: int) -> Tensor:
    """Attention with a convolution of the values beside."""
    q, k, v = qkv.unflatten(1, (3, heads, -1)).flatten(4).unbind(1)
    attended = v @ (q.transpose(2, 3) @ k).softmax(-1).transpose(2, 3)
    return attended.reshape(m.local(v.reshape(-1, 8, 8, 8)).shape) + m.local(v.reshape(-1, 8, 8, 8))


def grouped(m: Any, x: Tensor) -> Tensor:
    """Four heads of queries over two of keys and values."""
    q = m.second(x).unflatten(-1, (4, 3)).transpose(1, 2)
    k, v = m.kv(x).split([6, 4], -1)
    k, v = k.unflatten(-1, (2, 3)).transpose(1, 2), v.unflatten(-1, (2, 2)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(-2)


def standardized(weight: Tensor, gain: Tensor) -> Tensor:
    """Mean 0 and variance 1 over what each output channel reads, as norm-free networks have it."""
    rows = weight.reshape(1, len(weight), -1)
    return F.batch_norm(rows, None, None, weight=gain, training=True).reshape_as(weight)


IMAGES: dict[str, Callable[[], nn.Module]] = {
    "norm, activation": lambda: image(lambda m, x: m.norm(x).relu()),
    "residual": lambda: image(lambda m, x: m.second(x.relu()) + x),
    "depthwise": lambda: image(lambda m, x: m.d(x), d=nn.Conv2d(8, 8, 3, groups=8)),
    "depthwise, two each": lambda: image(lambda m, x: m.d(x), d=nn.Conv2d(8, 16, 3, groups=8)),
    "groups": lambda: image(lambda m, x: m.d(m.second(x)), d=nn.Conv2d(8, 12, 3, groups=4)),
    "wide groups": lambda: image(lambda m, x: m.d(m.second(x)), d=nn.Conv2d(8, 12, 3, groups=2)),
    "transposed": lambda: image(lambda m, x: m.d(x), d=nn.ConvTranspose2d(8, 6, 2, 2)),
    "transposed, groups": lambda: image(lambda m, x: m.d(x), d=nn.ConvTranspose2d(8, 8, 2, 2, groups=2)),
    "transposed, wide groups": lambda: image(lambda m, x: m.d(m.second(x)),
                                             d=nn.ConvTranspose2d(8, 12, 2, groups=2)),
    "joined": lambda: image(lambda m, x: torch.cat([x, m.second(x)], 1)),
    "joined with itself": lambda: image(lambda m, x: torch.cat([x, x], 1)),
    "joined, cut again": lambda: image(lambda m, x: torch.cat([x, m.second(x)], 1)[:, 4:12]),
    "halves multiplied": lambda: image(lambda m, x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1].sigmoid()),
    "uneven pieces": lambda: image(lambda m, x: torch.cat(x.split([5, 3], 1)[::-1], 1)),
    "every other": lambda: image(lambda m, x: x[:, ::2]),
    "shuffled": lambda: image(lambda m, x: m.second(x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2))),
    "shuffled by torch": lambda: image(lambda m, x: m.second(F.channel_shuffle(x, 2))),
    "rolled": lambda: image(lambda m, x: x.roll(3, 1)),
    "flipped beside": lambda: image(lambda m, x: m.second(x) + x.flip(1)),
    "pixels shuffled": lambda: image(lambda m, x: F.pixel_shuffle(x, 2)),
    "pixels unshuffled": lambda: image(lambda m, x: F.pixel_unshuffle(x, 2)),
    "zeros appended": lambda: image(lambda m, x: F.pad(x, (0, 0, 0, 0, 2, 2)) + m.wide(x),
                                    wide=nn.Conv2d(8, 12, 1)),
    "squeezed, excited": lambda: image(lambda m, x: x * m.up(m.down(x.mean((2, 3), True)).relu()).sigmoid(),
                                       down=nn.Conv2d(8, 4, 1), up=nn.Conv2d(4, 8, 1)),
    "mean over channels": lambda: image(lambda m, x: x * x.mean(1, keepdim=True).sigmoid()),
    "group norm": lambda: image(lambda m, x: m.g(m.second(x)), g=nn.GroupNorm(4, 8)),
    "softmax over channels": lambda: image(lambda m, x: x.softmax(1)),
    "parameter": lambda: image(lambda m, x: x * m.scale + m.shift, scale=nn.Parameter(torch.randn(8, 1, 1)),
                               shift=nn.Parameter(torch.randn(1, 8, 8, 8))),
    "slopes": lambda: image(lambda m, x: m.act(x), act=nn.PReLU(8)),
    "standardized weights": lambda: image(lambda m, x: F.conv2d(x, standardized(m.second.weight, m.gain)),
                                          gain=nn.Parameter(torch.randn(8))),
    "windows beside the batch": lambda: image(
        lambda m, x: x.reshape(x.shape[0] * 32, 2, 4, 2).transpose(1, 2).reshape(x.shape)),
    "shared": lambda: image(lambda m, x: m.second(m.second(x).relu())),
    "cut off": lambda: image(lambda m, x: m.second(x) + x.detach()),
    "one channel beside": lambda: image(lambda m, x: x + m.one(x), one=nn.Conv2d(8, 1, 1)),
    "repeated": lambda: image(lambda m, x: torch.cat([x.repeat(1, 2, 1, 1), x.repeat_interleave(2, 1)], 1)),
    "stacked": lambda: image(lambda m, x: torch.stack([x, m.second(x)], 1).flatten(1, 2)),
    "picked": lambda: image(lambda m, x: x + m.second(x)[:, [3, 1, 0, 2, 7, 5, 6, 4]]),
    "picked twice": lambda: image(lambda m, x: x.index_select(1, m.index),
                                  index=torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])),
    "neighbouring channels": lambda: image(
        lambda m, x: x * m.along(x.mean((2, 3)).unsqueeze(1)).sigmoid().transpose(1, 2).unsqueeze(3),
        along=nn.Conv1d(1, 1, 3, padding=1)),
    "largest channel": lambda: image(lambda m, x: x - x.amax(1, True) * x.std(1, keepdim=True)),
    "attention, convolution": lambda: image(
        lambda m, x: m.second(locally(m, m.qkv(x), 2)), qkv=nn.Conv2d(8, 24, 1),
        local=nn.Conv2d(8, 8, 3, padding=1, groups=8)),
    "summed of stacked": lambda: image(lambda m, x: torch.stack([x, m.second(x)], 0).sum(0)),
}  # fmt: skip
SEQUENCES: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: tokens(lambda m, x: m.n(x), n=nn.LayerNorm(12)),
    "rms norm": lambda: tokens(lambda m, x: m.n(x) + x, n=nn.RMSNorm(12)),
    "attention": lambda: tokens(attend, qkv=nn.Linear(12, 36)),
    "fused attention": lambda: tokens(lambda m, x: attend(m, x, 2, True) + x, qkv=nn.Linear(12, 36)),
    "grouped queries": lambda: tokens(grouped, kv=nn.Linear(12, 10)),
    "recurrent": lambda: tokens(lambda m, x: m.unit(x)[0], unit=nn.LSTM(12, 6, batch_first=True)),
    "gated": lambda: tokens(lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)), gate=nn.Linear(12, 20),
                            up=nn.Linear(12, 20), down=nn.Linear(20, 12)),
    "product of a parameter": lambda: tokens(lambda m, x: x @ m.w, w=nn.Parameter(torch.randn(12, 10))),
    "einsum": lambda: tokens(lambda m, x: torch.einsum("btc,cd->btd", x, m.w),
                             w=nn.Parameter(torch.randn(12, 10))),
    "positions": lambda: tokens(lambda m, x: torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1) + m.places,
                                token=nn.Parameter(torch.randn(1, 1, 12)),
                                places=nn.Parameter(torch.randn(1, 7, 12))),
    "patches merged": lambda: tokens(lambda m, x: torch.cat([x[:, 0::2], x[:, 1::2]], -1)),
    "bilinear pooling": lambda: tokens(lambda m, x: (x.transpose(1, 2) @ m.second(x)).flatten(1)),
    "tied": lambda: tokens(lambda m, x: F.linear(m.second(x).relu(), m.second.weight.t())),
}  # fmt: skip


def pruned(
    model: nn.Module, x: Tensor, options: str = "importance=random"
) -> graphopt.OptimizedModule:
    fast = graphopt.optimize(model, (x,), passes=f"prune{{{options}}}")
    assert fast.report.rolled_back == []
    assert fast.report.check is not None and fast.report.check.ok
    for one in fast.report.applied:
        assert one.contract == ("Algebraic" if "zeros" in options else "Masked")
        assert one.error < 1e-12
    return fast


@pytest.mark.parametrize("name", [*IMAGES, *SEQUENCES])
def test_what_is_left_equals_the_masked_model(name: str) -> None:
    model, shape = (IMAGES[name](), IMAGE) if name in IMAGES else (SEQUENCES[name](), TOKENS)
    fast = pruned(model, torch.randn(shape).double())
    assert fast.report.applied, "nothing was removed"
    before, after = fast.report.before, fast.report.after
    assert after.parameters < 0.85 * before.parameters
    for batch in (1, 3):
        assert torch.isfinite(fast(torch.randn(batch, *shape[1:]).double())).all()


def test_least_important_channels_go() -> None:
    model = image(lambda m, x: m.norm(x).relu())
    with torch.no_grad():
        norm = model.norm.weight, model.norm.bias
        for one in (model.first.weight, model.first.bias, *norm, model.last.weight.transpose(0, 1)):
            one[[1, 4, 6]] *= 1e-3
    fast = pruned(model, torch.randn(IMAGE).double(), "ratio=0.375,importance=l2")
    stay = [0, 2, 3, 5, 7]
    assert torch.equal(fast.state_dict()["first.weight"], model.first.weight[stay])
    assert torch.equal(fast.state_dict()["last.weight"], model.last.weight[:, stay])


def test_inputs_and_outputs_keep_their_sizes() -> None:
    fast = pruned(image(lambda m, x: x), torch.randn(IMAGE).double())
    assert fast.state_dict()["first.weight"].shape == (4, 3, 3, 3)
    assert fast.state_dict()["last.weight"].shape == (5, 4, 3, 3)


def test_what_stays_is_a_multiple() -> None:
    fast = pruned(tokens(lambda m, x: x), torch.randn(TOKENS).double(), "ratio=0.5,round_to=4")
    assert fast.state_dict()["first.weight"].shape == (8, 8)


def test_everything_may_be_coupled() -> None:
    """Channel i meets channel i // 2, which meets i // 4, and so on to the first one."""
    model = image(lambda m, x: x.repeat(1, 2, 1, 1) + x.repeat_interleave(2, 1))
    groups = graphopt.channel_groups(model, torch.randn(IMAGE).double())
    (family,) = (one for one in groups.families() if one[0].members[0].name == "first.weight")
    assert len(family) == 1


def test_heads_and_features_are_families_of_their_own() -> None:
    model = tokens(grouped, kv=nn.Linear(12, 10))
    groups = graphopt.channel_groups(model, torch.randn(TOKENS).double())
    found = []
    for family in groups.families():
        members = {
            one.name: len(one.entries) for one in family[0].members if one.name.endswith("weight")
        }
        if "kv.weight" in members and len(family) < 12:
            found.append((len(family), family[0].label in groups.blocks, members))
    assert found == [
        # A head of keys and values with the two of queries that read it.
        (2, True, {"second.weight": 6, "kv.weight": 5, "last.weight": 4}),
        # A feature of all queries and keys, and one of all values.
        (3, False, {"second.weight": 4, "kv.weight": 2}),
        (2, False, {"kv.weight": 2, "last.weight": 4}),
    ]


def test_inputs_and_outputs_may_be_free() -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).double(), torch.randn(2, 6).double()
    for free, sizes in (((), [8]), (["inputs"], [6, 8]), (["inputs", "outputs"], [4, 6, 8])):
        groups = graphopt.channel_groups(model, x, free=free)
        assert sorted(map(len, groups.families())) == sizes
    with pytest.raises(ValueError, match="expected of inputs, outputs; found heads"):
        graphopt.channel_groups(model, x, free=["heads"])


def test_what_a_buffer_holds_is_fixed() -> None:
    model = image(lambda m, x: x + m.up(m.table).mean(0)[:, None, None],
                  table=nn.Buffer(torch.randn(15, 2)), up=nn.Linear(2, 8))  # fmt: skip
    fixed = graphopt.channel_groups(model, torch.randn(IMAGE).double()).fixed()
    assert fixed["table", 1] == "it is an axis of a buffer"


def test_an_op_that_is_not_understood_fixes_what_it_reads() -> None:
    model = image(lambda m, x: x.renorm(2, 1, 1.0))
    groups = graphopt.channel_groups(model, torch.randn(IMAGE).double())
    fixed = groups.fixed()
    assert fixed["first.weight", 0] == "renorm.default is not understood"
    assert fixed["first.weight", 1] == "it is read by a map whose inputs are fixed"
    assert fixed["first.weight", 2] == "a kernel runs along the axis"
    assert fixed["last.weight", 0] == "it is an output of the model"
    assert "fixed: last.bias[0]: it is an output of the model" in str(groups)


@pytest.mark.parametrize(
    "passes", ["prune,deploy", "deploy,prune", "prune{ratio=0.3},prune{ratio=0.3},tune"]
)
def test_with_other_passes(passes: str) -> None:
    model = image(lambda m, x: m.second(m.norm(x).relu()) + x).float()
    fast = graphopt.optimize(model, (torch.randn(IMAGE),), passes=passes)
    assert fast.report.rolled_back == []
    assert fast.report.check is not None and fast.report.check.ok
    assert fast.report.after.parameters < 0.6 * fast.report.before.parameters


def test_a_wrong_removal_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice that is adapted wrongly, for one, takes other channels."""
    adapt = remove.adapt

    def wrong(op: ops.Op, r: Any) -> ops.Op | None:
        return op.replace(start=0, end=4) if isinstance(op, ops.Slice) else adapt(op, r)

    monkeypatch.setattr(remove, "adapt", wrong)
    model = image(lambda m, x: torch.cat([x, m.second(x)], 1)[:, 4:12])
    fast = graphopt.optimize(
        model, (torch.randn(IMAGE).double(),), passes="prune{ratio=0.5,seed=1}"
    )
    assert fast.report.applied == [] and len(fast.report.rolled_back) == 1
    assert "differs from the masked model" in fast.report.rolled_back[0].reason
    assert fast.report.after.parameters == fast.report.before.parameters


def test_sizes_that_cannot_be_adapted_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remove, "adapt", lambda op, r: None)  # sizes stay as they are written
    model, x = IMAGES["shuffled"](), torch.randn(IMAGE).double()
    fast = graphopt.optimize(model, (x,), passes="prune")
    assert fast.report.applied == []
    (refused,) = fast.report.refused
    assert refused.rewrite == "prune" and "sizes [2, 2, 4, 8, 8] do not hold" in refused.reason


def test_places_where_a_statistic_counts_what_stays_are_named() -> None:
    fast = pruned(SEQUENCES["layer norm"](), torch.randn(TOKENS).double())
    (record,) = fast.report.applied
    assert record.reason == "counts only what stays: layer_norm (n): statistics over the axis"
    assert pruned(IMAGES["residual"](), torch.randn(IMAGE).double()).report.applied[0].reason == ""


def test_heads_stay_unless_asked_for() -> None:
    def width(options: str) -> tuple[int, ...]:
        fast = pruned(SEQUENCES["attention"](), torch.randn(TOKENS).double(), options)
        return tuple(dict(fast.named_parameters())["qkv.weight"].shape)

    assert width("importance=random") == (18, 6)  # two features of each of three heads
    assert width("importance=random,heads=true") == (12, 6)  # two of the heads


def test_channels_that_are_zero_go_and_nothing_changes() -> None:
    model, x = IMAGES["residual"](), torch.randn(IMAGE).double()
    with torch.no_grad():
        for channel in (1, 4):
            for layer in (model.first, model.second):
                layer.weight[channel], layer.bias[channel] = 0.0, 0.0
    fast = pruned(model, x, "importance=zeros,threshold=0.0")
    assert dict(fast.named_parameters())["last.weight"].shape == (5, 6, 3, 3)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(graphopt.PassError, match="ratio and threshold are given"):
        graphopt.Pipeline("prune{ratio=0.5,threshold=0.0}")


def test_what_stays_is_reconstructed_if_that_is_nearer() -> None:
    torch.manual_seed(0)
    model, x = image(lambda m, x: m.norm(m.second(x.relu())).relu()), torch.randn(IMAGE).double()
    data = [(torch.randn(16, *IMAGE[1:]).double(), None)]
    fast = graphopt.optimize(model, x, passes=[Prune(reconstruct="least-squares", data=data)])
    plain = graphopt.optimize(model, x, passes=[Prune()])
    assert [one.rewrite for one in fast.report.applied] == ["prune", "reconstruct"]
    record = fast.report.applied[1]
    assert record.error < record.bound and record.contract.startswith("Calibrated(relative error")
    new = torch.randn(IMAGE).double()
    assert (fast(new) - model(new)).norm() < (plain(new) - model(new)).norm()

    worse = graphopt.optimize(model, x, passes=[Prune(reconstruct=lambda evidence, gone: {
        "last.weight": torch.zeros_like(evidence.parameters["last.weight"])}, data=data)])  # fmt: skip
    assert [one.rewrite for one in worse.report.applied] == ["prune"]
    assert "not nearer" in worse.report.rolled_back[0].reason
    torch.testing.assert_close(worse(new), plain(new))


@pytest.mark.parametrize("options", ["ratio=1.0", "ratio=-1.0", "importance=best", "scope=here"])
def test_options_are_checked(options: str) -> None:
    with pytest.raises(graphopt.PassError, match=r"prune: .* expected"):
        graphopt.Pipeline(f"prune{{{options}}}")


@given(st.lists(st.sampled_from([name for name in IMAGES if name not in ("parameter",)]),
                min_size=2, max_size=3), st.integers(0, 9))  # fmt: skip
@settings(max_examples=6, deadline=None)
def test_networks_one_after_the_other(names: list[str], seed: int) -> None:
    stages = [IMAGES[name]() for name in names]

    class Stages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList(stages)
            self.between = nn.ModuleList(nn.Linear(5, 3 * 64) for _ in names[1:])

        def forward(self, x: Tensor) -> Tensor:
            for stage, between in zip(self.stages, self.between, strict=False):
                x = between(stage(x)).unflatten(1, (3, 8, 8))
            y: Tensor = self.stages[-1](x)
            return y

    pruned(Stages().double().eval(), torch.randn(IMAGE).double(), f"importance=random,seed={seed}")
