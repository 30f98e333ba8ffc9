"""Adapters of PEFT, traced as plain PyTorch: what is merged is the model without them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("benchmarks.adapters.methods", reason="benchmarks are not installed")
pytest.importorskip("peft")  # after the former, which makes torchvision importable

import graphopt
from benchmarks.adapters.methods import FLOAT32_INSIDE, LAYERS, METHODS, adapted, as_double, ops_of
from graphopt.ir.distance import relative_error

pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = ["first", "second", "third"]
KEPT = ["FRoD"]
PLAIN = ["linear", "relu", "linear", "tanh", "linear"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 16)
        self.third = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.third(torch.tanh(self.second(torch.relu(self.first(x)))))
        return y


def merged(model: nn.Module, x: Tensor, limit: float = 1e-12) -> list[str]:
    """The ops of the optimized model, which is right, with nothing rolled back."""
    fast = graphopt.optimize(model, (x,))
    assert fast.report.rolled_back == []
    for rows in (x, x.flip(0)):
        with torch.no_grad():
            assert relative_error(fast(rows), model(rows)) < limit
    return ops_of(fast)


@pytest.mark.parametrize("name", [one for one in METHODS if one not in KEPT])
def test_adapter_on_linear_maps_leaves_nothing_behind(name: str) -> None:
    dtype = torch.float32 if name in FLOAT32_INSIDE else torch.float64
    limit = FLOAT32_INSIDE.get(name, 1e-12)
    model = adapted(Net(), TARGETS, name)
    model = as_double(model) if dtype == torch.float64 else model.to(dtype)
    assert merged(model, draw(3, 5, 16).to(dtype), limit) == PLAIN


@pytest.mark.parametrize("name", KEPT)
def test_adapter_that_is_not_merged_stays_right(name: str) -> None:
    # FRoD multiplies by a sparse tensor, which cannot be captured.
    model = as_double(adapted(Net(), TARGETS, name))
    assert merged(model, draw(3, 5, 16)) != PLAIN


@pytest.mark.parametrize(
    "names", [("LoRA", "rsLoRA"), ("DoRA", "LoRA"), ("OFT", "OFT"), ("LoHa", "LoHa")], ids="+".join
)
def test_several_active_adapters_merge_in_their_order(names: tuple[str, ...]) -> None:
    # Two active OFT adapters rotate the input one after the other, and do not commute.
    model = adapted(Net(), TARGETS, *names).double()
    assert merged(model, draw(3, 5, 16)) == PLAIN


@pytest.mark.parametrize(
    ("name", "layer"),
    [(name, layer) for name in ("LoRA", "DoRA") for layer in ("3x3", "stride 2", "dilated", "3x5",
     "grouped", "Conv1d", "Conv3d", "Embedding", "HF Conv1D")]
    + [(name, "stride 2") for name in ("LoHa", "LoKr", "IA3", "HiRA", "AdaLoRA", "BOFT", "HRA")]
    + [("LoHa", "depthwise"), ("OFT", "Embedding"), ("HiRA", "Embedding"), ("VeRA", "HF Conv1D")]
    + [("OFT", "1x1"), ("OFT by Cayley", "1x1"), ("LoRA", "1x1")]
    + [("MiCA", "Embedding"), ("TrainableTokens", "Embedding"), ("VeLoRA", "HF Conv1D"),
       ("LN tuning", "LayerNorm"), ("LN tuning", "grouped")],
)  # fmt: skip
def test_adapter_on_another_layer(name: str, layer: str) -> None:
    # PEFT's own merge is wrong, or none, where a convolution is dilated or grouped.
    what = LAYERS[layer]
    model = adapted(nn.Sequential(what.make(), nn.Tanh()), ["0"], name).double()
    x = what.input()
    assert merged(model, x if what.rows else x.double()) == [what.op, "tanh"]


def test_adapter_that_pads_otherwise_stays_right() -> None:
    # The convolution reflects the image at its border, LoRA's own pads it with zeros.
    what = LAYERS["reflecting"]
    model = adapted(nn.Sequential(what.make(), nn.Tanh()), ["0"], "LoRA").double()
    x = what.input().double()
    assert merged(model, x).count("conv2d") == 2
    refused = graphopt.optimize(model, (x,)).report.refused
    assert ["continues the border that the other branch pads with zeros" in one.reason
            for one in refused] == [True]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["LoRA", "DoRA", "OFT", "RoAd", "DeLoRA"])
def test_narrow_weights_are_rounded_once(name: str, dtype: torch.dtype) -> None:
    # PEFT rounds the rotations of RoAd and the update of DeLoRA before it adds them: 1.3 to 1.5
    # times this error.
    model = adapted(Net().to(dtype), TARGETS, name)
    exact = graphopt.optimize(copy.deepcopy(model).double(), (draw(3, 5, 16),))
    fast = graphopt.optimize(model, (draw(3, 5, 16).to(dtype),))
    assert ops_of(fast) == PLAIN
    weights = [[one for one in model.parameters() if one.ndim == 2] for model in (exact, fast)]
    for truth, found in zip(*weights, strict=True):
        assert found.dtype == dtype
        assert torch.equal(found, truth.to(dtype))


def test_adapter_on_multi_head_attention() -> None:
    # PEFT 0.21 adds the adapter of the output projection twice; what its model computes is kept.
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.attention(x, x, x, need_weights=False)[0]
            return y

    x = draw(2, 5, 16)
    plain = merged(Attention().eval().double(), x)
    assert merged(adapted(Attention(), ["attention"], "LoRA").double(), x) == plain


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
