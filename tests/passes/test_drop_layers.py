"""The specification of `drop-layers`: what is left equals the model built without those layers.

The pass compares its result in float64 with the source in which the layers are bypassed
(graphopt.verify.bypassed); the tests compare it with modules that never had them, at other batch sizes.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.ir.blocks import find_streams
from graphopt.ir.capture import capture
from graphopt.passes import drop_layers
from graphopt.passes.base import PassError
from graphopt.passes.drop_layers import DropLayers
from graphopt.passes.pruning.depth import angular_distance
from graphopt.pipeline import Pipeline
from graphopt.torchvision_ops import declare_missing_ops
from tests.helpers import Net, assert_equal, output_of, prepare, reasons, snapshot, tensor

declare_missing_ops()

TOKENS, IMAGE, WIDTH = (2, 5, 8), (2, 6, 8, 8), 8


# -- models that are built of layers ------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (6, 4)).transpose(1, 2).chunk(3, 1)
        if seen is not None:
            _, k, v = self.qkv(seen).unflatten(-1, (6, 4)).transpose(1, 2).chunk(3, 1)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class PreNorm(nn.Module):
    """x + attention(norm(x)), then the same with an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.drop = Attention(), nn.Dropout(0.1)
        self.up, self.out = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        return self.drop(self.out(F.gelu(self.up(self.norm2(x)), approximate="tanh"))) + x


class PostNorm(PreNorm):
    """norm(x + attention(x)), then the same with an MLP."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.drop(self.attention(x)) + x)
        return self.norm2(x + self.out(self.up(x).relu()))


class Parallel(PreNorm):
    """x + attention(norm(x)) + MLP(norm(x))."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm1(x)) + self.out(self.up(self.norm2(x)).relu())


class Basic(nn.Module):
    """relu(x + f(x)) as in ResNets, or with a projection of x."""

    def __init__(self, width: int = 6, new: int | None = None) -> None:
        super().__init__()
        made = new or width
        self.first = nn.Conv2d(width, made, 3, 2 if new else 1, 1, bias=False)
        self.out = nn.Conv2d(made, made, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(made), nn.BatchNorm2d(made)
        self.short = nn.Conv2d(width, made, 1, 2) if new else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.out(self.bn1(self.first(x)).relu_()))
        y += self.short(x)
        return y.relu_()


class Mixed(nn.Module):
    """A convolution and attention with steps of their own, of which one is scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.attention = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), Attention()
        self.out = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv(x.mT).mT * self.scale
        return x + self.out(self.attention(x))


class Adapted(PreNorm):
    """With a small residual map behind attention."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(self.norm1(x))
        x = x + (y + self.small(y).relu())
        return x + self.out(self.up(self.norm2(x)).relu())


class Stack(nn.Module):
    """Layers between a map in front and a norm and a head behind."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        image = isinstance(layers[0], Basic)
        self.first = nn.Conv2d(6, 6, 1) if image else nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.BatchNorm2d(6) if image else nn.LayerNorm(WIDTH)
        self.head = nn.Linear(6 if image else WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for one in self.layers:
            x = one(x)
        x = self.norm(x)
        return self.head(x.mean((2, 3)) if x.ndim == 4 else x)


def stack(kind: type[nn.Module], count: int) -> nn.Module:
    model = prepare(Stack(*(kind() for _ in range(count))))
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "norm" in name:
                one.add_(0.3 * torch.randn_like(one))
    return model


def shortened(model: nn.Module, gone: Iterable[int], layers: str = "layers") -> nn.Module:
    """A copy of a model that is built without some of its layers."""
    twin, gone = copy.deepcopy(model), set(gone)
    path, _, name = layers.rpartition(".")
    kept = [one for number, one in enumerate(model.get_submodule(layers)) if number not in gone]
    same = type(model.get_submodule(layers))
    made = same(kept) if same is nn.ModuleList else same(*kept)
    setattr(twin.get_submodule(path), name, made)
    return twin


def quiet(model: nn.Module, *names: str, by: float = 1e-3) -> nn.Module:
    """`model` with some parameters scaled down."""
    with torch.no_grad():
        for name, one in model.named_parameters():
            if any(name.startswith(start) for start in names):
                one.mul_(by)
    return model


def dropped(
    model: nn.Module, inputs: Sequence[Tensor], /, kwargs: Any = None, **options: Any
) -> graphopt.OptimizedModule:
    """`model` without some layers, decided on its example inputs; the source untouched."""
    unchanged = snapshot(model)
    options.setdefault("data", [(kwargs or inputs, None)])
    fast = graphopt.optimize(model, inputs, kwargs, passes=[DropLayers(**options)])
    unchanged()
    assert fast.report.rolled_back == []
    for one in fast.report.applied:
        assert one.rewrite == "drop-layers"
        assert one.contract == "Masked" or options.get("max_error") is not None
    return fast


def left(fast: graphopt.OptimizedModule, count: int, layers: str = "layers") -> list[int]:
    """The layers whose parameters are still there."""
    names = list(fast.state_dict())
    return [i for i in range(count) if any(name.startswith(f"{layers}.{i}.") for name in names)]


# -- what is left ---------------------------------------------------------------------------------------

KINDS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "pre-norm": (PreNorm, TOKENS), "post-norm": (PostNorm, TOKENS), "parallel": (Parallel, TOKENS),
    "basic": (Basic, IMAGE), "mixed": (Mixed, TOKENS),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("importance", ["similarity", "ablation"])
def test_what_is_nearly_the_identity_goes(name: str, importance: str) -> None:
    kind, shape = KINDS[name]
    model = stack(kind, 4)
    # The last maps of both branches. After a norm, and a ReLU, what is normalized stays as it is.
    quiet(model, "layers.2.out", "layers.2.attention.out", "layers.2.bn2", "layers.2.conv")
    if name == "post-norm":
        with torch.no_grad():
            for one in model.modules():
                if isinstance(one, nn.LayerNorm):
                    one.weight.fill_(1)
                    one.bias.fill_(0)
    x = tensor(*shape)
    fast = dropped(model, (x,), importance=importance, count=1)
    assert left(fast, 4) == [0, 1, 3]
    reference = shortened(model, [2])
    for rows in (x, tensor(3, *shape[1:], seed=4)):
        assert_equal(output_of(fast, [rows]), output_of(reference, [rows]))
    counted = sum(one.numel() for one in reference.parameters())
    assert fast.report.after.parameters - fast.report.before.parameters == counted - sum(
        one.numel() for one in model.parameters()
    )


@given(data=st.data())
@settings(max_examples=12)
def test_a_stack_without_layers_is_a_shorter_stack(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(KINDS)), label="kind")
    kind, shape = KINDS[name]
    size = data.draw(st.integers(2, 5), label="layers")
    count = data.draw(st.integers(1, size), label="gone")
    seed = data.draw(st.integers(0, 99), label="seed")
    whole = data.draw(st.booleans(), label="contiguous")
    model, x = stack(kind, size), tensor(*shape)
    fast = dropped(
        model, (x,), importance="random", count=count, seed=seed, contiguous=whole, data=()
    )
    stay = left(fast, size)
    gone = sorted(set(range(size)) - set(stay))
    assert len(gone) == count
    if whole:
        assert gone == list(range(gone[0], gone[-1] + 1))
    rows = tensor(3, *shape[1:], seed=seed)
    assert_equal(output_of(fast, [rows]), output_of(shortened(model, gone), [rows]))


def test_projections_stay() -> None:
    model = prepare(Stack(Basic(), Basic(6, 6), Basic(), Basic()))
    x = tensor(*IMAGE)
    fast = dropped(model, (x,), contiguous=False, ratio=1.0)
    assert left(fast, 4) == [1]
    assert reasons(fast, "layers.1") == "its shortcut is not the identity"
    assert_equal(output_of(fast, [x]), output_of(shortened(model, [0, 2, 3]), [x]))


def test_vision_transformer() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, num_classes=5
    )
    model, x = prepare(model), tensor(2, 3, 32, 32)
    quiet(model, "blocks.1.attn.proj", "blocks.1.mlp.fc2")
    fast = dropped(model, (x,), count=1)
    assert left(fast, 3, "blocks") == [0, 2]
    assert_equal(output_of(fast, [x]), output_of(shortened(model, [1], "blocks"), [x]))


def test_language_models() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
    gpt = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=4, n_head=2, n_positions=16, **sizes)
    )
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, **sizes,
        )
    )  # fmt: skip
    bert = transformers.BertModel(
        transformers.BertConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4,
            vocab_size=50,
        )
    )  # fmt: skip
    batch = {"input_ids": torch.randint(0, 50, (2, 7))}
    for model, layers in ((gpt, "transformer.h"), (llama, "model.layers"), (bert, "encoder.layer")):
        model = prepare(model)
        fast = dropped(model, None, batch, count=2)
        stay = left(fast, 4, layers)
        assert len(stay) == 2
        gone = sorted({0, 1, 2, 3} - set(stay))
        found, truth = fast(**batch), shortened(model, gone, layers)(**batch)
        assert_equal(found[0], truth[0])


def test_cross_attention() -> None:
    """What a branch reads beside the stream does not matter; three steps make a layer."""
    layer = nn.TransformerDecoderLayer(WIDTH, 2, 12, batch_first=True, norm_first=True)
    model = prepare(nn.TransformerDecoder(layer, 3, nn.LayerNorm(WIDTH)))
    with torch.no_grad():
        for one in model.parameters():
            one.add_(0.1 * torch.randn_like(one))
    inputs = tensor(*TOKENS), tensor(2, 4, WIDTH, seed=3)
    fast = dropped(model, inputs, importance="random", count=2, data=())
    stay = left(fast, 3)
    assert len(stay) == 1
    gone = sorted({0, 1, 2} - set(stay))
    assert_equal(output_of(fast, inputs), output_of(shortened(model, gone), inputs))


def test_time_and_text_are_read_in_every_block() -> None:
    """As in diffusion models: an embedding of time that is computed once and shifts every block."""

    def body(m: Any, x: Tensor, time: Tensor) -> Tensor:
        shift = m.embed(time)
        for one in m.layers:
            x = x + one[1](F.silu(one[0](x)) + shift[:, :, None, None])
        return m.head(x)

    layers = nn.ModuleList(
        nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)) for _ in range(3)
    )
    model = prepare(Net(body, embed=nn.Linear(4, 6), layers=layers, head=nn.Conv2d(6, 3, 1)))
    inputs = tensor(*IMAGE), tensor(2, 4, seed=2)
    quiet(model, "layers.1.1")
    fast = dropped(model, inputs, count=1)
    assert left(fast, 3) == [0, 2]
    assert_equal(output_of(fast, inputs), output_of(shortened(model, [1]), inputs))


def test_shared_layers_go_use_by_use() -> None:
    """The parameters stay while anything reads them."""
    shared = PreNorm()
    model, x = prepare(Stack(*[shared] * 4)), tensor(*TOKENS)
    fast = dropped(model, (x,), count=2)
    assert fast.report.after.parameters == fast.report.before.parameters
    assert_equal(output_of(fast, [x]), output_of(prepare(shortened(model, [0, 1])), [x]))
    fast = dropped(model, (x,), count=4)
    assert left(fast, 1) == []


def test_what_was_unread_before_stays_in_the_state_dict() -> None:
    model, x = stack(PreNorm, 2), tensor(*TOKENS)
    model.unused = nn.Linear(2, 2).double()
    plain = graphopt.optimize(model, (x,), passes="canonicalize")
    fast = dropped(model, (x,), count=1)
    assert ("unused.weight" in fast.state_dict()) == ("unused.weight" in plain.state_dict())


def test_operators_go_one_by_one() -> None:
    model, x = stack(PreNorm, 3), tensor(*TOKENS)
    quiet(model, "layers.0.attention.out", "layers.2.out")
    fast = dropped(model, (x,), unit="step", importance="ablation", count=2)
    names = set(fast.state_dict())
    assert not any(name.startswith(("layers.0.attention", "layers.2.out")) for name in names)
    assert left(fast, 3) == [0, 1, 2]
    reference = copy.deepcopy(model)
    quiet(reference, "layers.0.attention.out", "layers.2.out", by=0.0)
    assert_equal(output_of(fast, [x]), output_of(reference, [x]))


def test_adapters_go_with_their_layers_or_alone() -> None:
    model, x = stack(Adapted, 3), tensor(*TOKENS)
    fast = dropped(model, (x,), importance="random", contiguous=False, ratio=1.0, data=())
    assert left(fast, 3) == []
    assert_equal(output_of(fast, [x]), output_of(shortened(model, [0, 1, 2]), [x]))
    quiet(model, "layers.1.small")
    fast = dropped(model, (x,), importance="ablation", count=1)
    assert set(model.state_dict()) - set(fast.state_dict()) == {
        "layers.1.small.weight", "layers.1.small.bias",
    }  # fmt: skip


def test_what_is_gone_with_others_does_not_count() -> None:
    """Attention and the adapter behind it cancel; without both, the adapter is not there to go."""
    model, x = stack(Adapted, 1), tensor(*TOKENS)
    quiet(model, "layers.0.attention.out", "layers.0.small", by=0.0)
    with torch.no_grad():
        model.layers[0].small.bias.fill_(1)
        model.layers[0].attention.out.bias.fill_(-1)
    fast = dropped(model, (x,), unit="step", importance="ablation", count=2)
    assert left(fast, 1) == []
    assert_equal(output_of(fast, [x]), output_of(shortened(model, [0]), [x]))


def test_outputs_share_no_memory_with_inputs_and_with_each_other() -> None:
    layers = nn.ModuleList(PreNorm() for _ in range(2))

    def body(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.layers[0](x)
        return y, m.layers[1](y)

    model, x = prepare(Net(body, layers=layers)), tensor(*TOKENS)
    fast = dropped(model, (x,), count=2)
    before = x.clone()
    first, second = fast(x)
    assert torch.equal(first, x) and torch.equal(second, x)
    first.zero_()
    assert torch.equal(second, x) and torch.equal(x, before)


# -- what stays, and why ------------------------------------------------------------------------------


def refused(model: nn.Module, *inputs: Tensor, **options: Any) -> str:
    fast = dropped(model, inputs, **{"contiguous": False, "ratio": 1.0, **options})
    assert fast.report.applied == []
    return reasons(fast)


def test_long_skips_stay() -> None:
    """What is read inside of a block by another one, and what holds several blocks."""

    def joined(m: Any, x: Tensor) -> Tensor:
        inner = m.a(x).relu()
        x = x + m.b(inner)
        return m.c(torch.cat([x.relu(), inner], 1))

    conv = lambda n=6: nn.Conv2d(n, 6, 3, padding=1)  # noqa: E731
    model = prepare(Net(joined, a=conv(), b=conv(), c=conv(12)))
    said = refused(model, tensor(*IMAGE))
    assert "relu inside of it is read by cat" in said
    assert "there is no block that may go" in said

    def added(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        y = F.avg_pool2d(x, 2)
        y = y + m.a(y).relu()
        y = y + m.b(y).relu()
        return m.last(x + F.interpolate(y, scale_factor=2))

    model = prepare(Net(added, first=conv(), a=conv(), b=conv(), last=conv()))
    fast = dropped(model, [tensor(*IMAGE)], contiguous=False, ratio=1.0)
    assert "it holds 2 other steps, which go one by one" in reasons(fast)
    assert {"first.weight", "last.weight"} <= set(fast.state_dict())
    assert not {"a.weight", "b.weight"} & set(fast.state_dict())


def test_values_that_are_outputs_stay() -> None:
    def body(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        key = m.key(x)
        return x + m.out(key.relu()), key

    model = prepare(Net(body, key=nn.Linear(8, 8), out=nn.Linear(8, 8)))
    assert "linear (key) inside of it is an output" in refused(model, tensor(*TOKENS))


def test_training_layers_stay() -> None:
    model = Stack(Basic(), Basic()).double().train()
    said = refused(model, tensor(*IMAGE))
    assert said.count("writes a state") == 2
    model = Stack(PreNorm(), PreNorm()).double().train()
    said = refused(model, tensor(*TOKENS), importance="random", data=())
    assert said.count("is random") == 4


def test_sums_without_layers_and_over_other_shapes_stay() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        return m.last(x + x.sigmoid() * 0.5)

    maps = {name: nn.Linear(8, 8) for name in ("first", "last")}
    assert refused(prepare(Net(body, **maps)), tensor(*TOKENS)) == "there is no block that may go"
    model = prepare(Net(lambda m, x: m.last(x + m.first(x).unsqueeze(1)), **maps))
    assert "it changes the shape or the dtype" in refused(model, tensor(2, 8))


def test_layouts_may_differ() -> None:
    """What reads the end of a step reads its start as well, if that is laid out in another way."""

    def body(m: Any, x: Tensor) -> Tensor:
        x = m.first(x).mT
        return m.last((m.a(x) + x).view(x.shape[0], 40))

    maps = {"first": nn.Linear(5, 5), "a": nn.Linear(8, 8), "last": nn.Linear(40, 3)}
    model, x = prepare(Net(body, **maps)), tensor(2, 8, 5)
    fast = dropped(model, (x,), count=1)
    assert "a.weight" not in fast.state_dict()
    assert_equal(output_of(fast, [x]), model.last(model.first(x).mT.flatten(1)))


def test_protected_layers_stay() -> None:
    model, x = stack(PreNorm, 3), tensor(*TOKENS)
    fast = dropped(model, (x,), ratio=1.0, contiguous=False, protect="layers.0.*;*.2.up.weight")
    assert left(fast, 3) == [0, 2]
    tied = stack(PreNorm, 3)
    tied.layers[2].up.weight = tied.layers[1].up.weight
    fast = dropped(tied, (x,), ratio=1.0, contiguous=False, protect=["layers.2.up.weight"])
    assert {1, 2} <= set(left(fast, 3))


# -- which go -----------------------------------------------------------------------------------------


def turning(*angles: float, head: Tensor | None = None) -> nn.Module:
    """Layers x + W x that turn the planes (0, 1), (2, 3), ... of the stream, one each."""
    layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in angles)
    with torch.no_grad():
        for number, (one, angle) in enumerate(zip(layers, angles, strict=True)):
            at = slice(2 * (number % 4), 2 * (number % 4) + 2)
            turn = torch.tensor(angle)
            one.weight.zero_()
            one.weight[at, at] = torch.stack(
                [
                    torch.stack([turn.cos() - 1, -turn.sin()]),
                    torch.stack([turn.sin(), turn.cos() - 1]),
                ]
            )

    def body(m: Any, x: Tensor) -> Tensor:
        for one in m.layers:
            x = x + one(x)
        return m.head(x)

    model = Net(body, layers=layers, head=nn.Linear(WIDTH, WIDTH, bias=False))
    with torch.no_grad():
        model.head.weight.copy_(torch.eye(WIDTH) if head is None else head)
    return model.double().eval()


def test_similarity_and_ablation_differ() -> None:
    """Layer 0 turns a lot of what the head does not read, layer 1 a little of what it reads."""
    head = torch.diag(torch.tensor([0.0, 0, 1, 1, 1, 1, 1, 1]))
    model, x = turning(1.0, 0.2, head=head), tensor(*TOKENS)
    assert left(dropped(model, (x,), count=1), 2) == [0]
    assert left(dropped(model, (x,), count=1, importance="ablation"), 2) == [1]


def test_similarity_is_the_mean_angle() -> None:
    one, other = tensor(2, 3, 4), tensor(2, 3, 4, seed=5)
    truth = torch.stack([
        torch.arccos(F.cosine_similarity(a, b, 0)) / torch.pi
        for a, b in zip(one.flatten(0, 1), other.flatten(0, 1), strict=True)
    ])  # fmt: skip
    assert_equal(angular_distance(one, other, -1).flatten(), truth)
    assert angular_distance(one, -one, 1).min() > 1 - 1e-7
    assert angular_distance(one * 0, one * 0, None).tolist() == [0.0, 0.0]


def test_a_run_is_measured_as_a_whole() -> None:
    """Layers 1 and 2 turn the same plane there and back: alone they are the largest, together nothing."""
    model = turning(0.5, 0.9, 0.5, 0.4)
    with torch.no_grad():
        back = torch.linalg.inv(torch.eye(WIDTH).double() + model.layers[1].weight)
        model.layers[2].weight.copy_(back - torch.eye(WIDTH))
    x = tensor(*TOKENS)
    assert left(dropped(model, (x,), count=2), 4) == [0, 3]
    assert left(dropped(model, (x,), count=2, contiguous=False), 4) == [1, 2]


def test_angles_are_measured_anew() -> None:
    """Layer 1 turns more than layer 2, but only by what layer 0 makes, and that goes first."""
    model, x = turning(0.0, 0.0, 0.4), tensor(*TOKENS)
    with torch.no_grad():
        model.layers[0].weight[:2, 2:] = 0.1 * torch.randn(2, 6)
        model.layers[1].weight[4:, :2] = 10 * torch.randn(4, 2)
    x[..., :2] = 0
    assert left(dropped(model, (x,), count=2, contiguous=False), 3) == [2]


def test_outputs_are_measured_anew() -> None:
    """Layer 1 turns back more than layer 0 turned: without that, it is worth less than layer 2."""
    model, x = turning(0.3, 0.0, 0.35), torch.ones(TOKENS).double()
    with torch.no_grad():
        model.layers[1].weight.copy_(turning(-0.6).get_submodule("layers.0").weight)
    assert left(dropped(model, (x,), count=2, importance="ablation"), 3) == [2]


def test_late_ones_go_first_among_equals() -> None:
    model, x = turning(0.3, 0.3, 0.3, 0.3), torch.ones(TOKENS).double()
    for importance in ("similarity", "ablation"):
        options = {"importance": importance, "contiguous": False, "count": 2}
        assert left(dropped(model, (x,), position=0.5, **options), 4) == [0, 1]
        zeros = turning(0.0, 0.0, 0.0, 0.0)
        assert left(dropped(zeros, (x,), position=0.5, **options), 4) == [0, 1]
    model = turning(0.3, 0.33, 0.36, 0.39)  # scores 1 + p times depth: 0.6 against 0.39
    assert left(dropped(model, (x,), count=1), 4) == [1, 2, 3]
    assert left(dropped(model, (x,), count=1, position=1.0), 4) == [0, 1, 2]


@pytest.mark.parametrize("contiguous", [True, False])
def test_an_error_is_kept_to(contiguous: bool) -> None:
    """Angles 0.01, 0.02, 0.03, 1.0: three go, and with the fourth the error would be beyond."""
    model, x = turning(0.01, 0.02, 0.03, 1.0), tensor(*TOKENS)
    for limit, stay in ((0.05, [3]), (0.008, [1, 2, 3]), (0.0, [0, 1, 2, 3])):
        fast = dropped(model, (x,), max_error=limit, contiguous=contiguous)
        assert left(fast, 4) == stay
        if fast.report.applied:
            (one,) = fast.report.applied
            assert one.contract == f"Calibrated(relative error on the data, {limit:g})"
            found, truth = output_of(fast, [x]), output_of(model, [x])
            error = float((found - truth).norm() / truth.norm())
            assert one.error == pytest.approx(error, rel=1e-6) and one.error <= limit
        else:
            assert f"the first block exceeds max_error={limit}" in reasons(fast)
    fast = dropped(model, (x,), max_error=0.05, count=2, contiguous=contiguous)
    assert left(fast, 4) == [2, 3]


def test_the_loss_decides_where_there_is_one() -> None:
    """Layer 1 makes the loss worse: it goes even if it changes the outputs most."""
    model, x = turning(0.1, 1.0, 0.2), tensor(*TOKENS)
    with torch.no_grad():
        target = shortened(model, [1])(x)
    options = {"loss": F.mse_loss, "data": [(x, target)], "importance": "ablation"}
    assert left(dropped(model, (x,), count=1, **options), 3) == [0, 2]
    fast = dropped(model, (x,), max_error=0.0, contiguous=False, **options)
    assert left(fast, 3) == []  # still below the loss of the source
    assert fast.report.applied[0].contract == "Calibrated(increase of the loss on the data, 0)"
    assert fast.report.applied[0].error < 0


def test_features_of_images_are_channels() -> None:
    model = prepare(Stack(Basic(), Basic()))
    graph = capture(model, (tensor(*IMAGE),)).graph
    (stream,) = find_streams(graph)
    assert [drop_layers.feature_axis(graph, one) for one in stream.blocks()] == [1, 1]
    graph = capture(stack(PreNorm, 2), (tensor(*TOKENS),)).graph
    (stream,) = find_streams(graph)
    assert [drop_layers.feature_axis(graph, one) for one in stream.blocks()] == [-1, -1]


# -- options, and what is wrong -----------------------------------------------------------------------


def test_pipelines_are_text() -> None:
    text = (
        "drop-layers{ratio=0.5,unit=step,importance=random,contiguous=false,position=0.25,"
        "protect=head.*;layers.0.*,seed=3},canonicalize"
    )
    pipeline = Pipeline(text)
    assert str(pipeline) == text
    one = DropLayers(0.5, None, "step", "random", False, 0.25, None, "head.*;layers.0.*", 3)
    assert pipeline.stages[0].run == one
    assert str(Pipeline([one, "canonicalize"])) == text
    assert str(Pipeline([DropLayers(count=2, max_error=0.1, contiguous=True)])) == (
        "drop-layers{count=2,contiguous=true,max_error=0.1}"
    )
    model, x = stack(PreNorm, 3), tensor(*TOKENS)
    passes = "drop-layers{importance=random,count=1},deploy"
    fast = graphopt.optimize(model, (x,), passes=passes)
    assert len(left(fast, 3)) == 2
    assert_equal(fast(x), shortened(model, {0, 1, 2} - set(left(fast, 3)))(x))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ratio": 1.5}, "ratio is 1.5, expected 0 <= ratio <= 1"),
        ({"count": 0}, "count is 0, expected at least 1"),
        ({"ratio": 0.5, "count": 1}, "ratio and count are given, expected one of them"),
        ({"unit": "layer"}, "unit is 'layer', expected one of block, step"),
        ({"importance": "l2"}, "expected one of similarity, ablation, random"),
        ({"position": -1.0}, "position is -1.0, expected at least 0"),
        ({"max_error": -1.0}, "max_error is -1.0, expected at least 0"),
        ({}, "similarity needs data: a sequence of (inputs, target)"),
        ({"importance": "random", "max_error": 0.1}, "max_error needs data"),
        ({"data": [((1, 2), None)]}, "data[0]: expected inputs of the form"),
        ({"importance": "random", "protect": "layer.*"}, "matches no parameter; the nearest is layers"),
        ({"importance": "random", "count": 9}, "count is 9, expected at most 3: no more may go"),
    ],
)  # fmt: skip
def test_wrong_options(options: dict[str, Any], said: str) -> None:
    model, x = stack(PreNorm, 3), tensor(*TOKENS)
    with pytest.raises(PassError) as caught:
        graphopt.optimize(model, (x,), passes=[DropLayers(**options)])
    assert said in str(caught.value)


def test_runs_that_are_too_long() -> None:
    model, x = prepare(Stack(Basic(), Basic(6, 6), Basic())), tensor(*IMAGE)
    with pytest.raises(PassError, match="contiguous=false takes them one by one"):
        dropped(model, (x,), count=2)
    with pytest.raises(PassError, match="no stream has 2 consecutive blocks that may go"):
        dropped(stack(PreNorm, 3), (tensor(*TOKENS),), count=2, protect="layers.1.*")


def test_too_few_to_drop() -> None:
    fast = dropped(stack(PreNorm, 3), (tensor(*TOKENS),), ratio=0.3)
    assert fast.report.applied == []
    assert "ratio=0.3 of 3 blocks is less than one" in reasons(fast)


# -- wrong removals are seen --------------------------------------------------------------------------


def test_a_wrong_removal_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    true = drop_layers.without

    def wrong(change: Callable[[Any], Any]) -> Callable[..., Any]:
        return lambda graph, steps: true(graph, [change(step) for step in steps])

    model, x = stack(PreNorm, 3), tensor(*TOKENS)
    graph = capture(copy.deepcopy(model), (x,)).graph
    first = find_streams(graph)[0].steps[0].start.name
    for change in (
        lambda step: dataclasses.replace(step, end=step.inside[0]),  # the norm of a branch goes
        lambda step: dataclasses.replace(
            step, start=next(one for one in step.start.graph.nodes if one.name == first)
        ),  # all before goes too
    ):
        monkeypatch.setattr(drop_layers, "without", wrong(change))
        fast = graphopt.optimize(
            model, (x,), passes=[DropLayers(importance="random", count=1, seed=1)]
        )
        (record,) = fast.report.rolled_back
        assert "differs from the model with layers bypassed" in record.reason
        assert_equal(fast(x), model(x))
