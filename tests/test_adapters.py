"""Adapters of PEFT, traced as plain PyTorch: what is merged is the model without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.torchvision_ops import declare_missing_ops
from graphopt.verify.model import relative_error

declare_missing_ops()
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = ["first", "second", "third"]
CONFIGS: dict[str, Any] = {
    "LoRA": ("LoraConfig", {"r": 4, "lora_alpha": 8}),
    "LoRA with a bias": ("LoraConfig", {"r": 4, "lora_bias": True}),
    "rsLoRA": ("LoraConfig", {"r": 4, "use_rslora": True}),
    "DoRA": ("LoraConfig", {"r": 4, "use_dora": True}),
    "AdaLoRA": ("AdaLoraConfig", {"total_step": 10, "init_r": 4, "target_r": 2}),
    "LoHa": ("LoHaConfig", {"r": 4}),
    "LoKr": ("LoKrConfig", {"r": 4}),
    "OFT": ("OFTConfig", {"r": 0, "oft_block_size": 4}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4}),
    "HRA": ("HRAConfig", {"r": 4}),
    "IA3": ("IA3Config", {}),
    "VeRA": ("VeraConfig", {"r": 4}),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 20}),
    "C3A": ("C3AConfig", {"block_size": 8}),
    "MiSS": ("MissConfig", {"r": 4}),
    "Bone": ("MissConfig", {"r": 4, "init_weights": "bat"}),
    "RandLoRA": ("RandLoraConfig", {"r": 4}),
    "RoAd": ("RoadConfig", {"group_size": 8}),
    "SHiRA": ("ShiraConfig", {"r": 2}),
    "VB-LoRA": ("VBLoRAConfig", {"r": 4, "num_vectors": 8, "vector_length": 4}),
    "WaveFT": ("WaveFTConfig", {"n_frequency": 20}),
    "GraLoRA": ("GraloraConfig", {"r": 4}),
    "DeLoRA": ("DeloraConfig", {"r": 4}),
    "HiRA": ("HiraConfig", {"r": 4}),
    "GLoRA": ("GloraConfig", {}),
    "OSF": ("OSFConfig", {}),
    "PSOFT": ("PsoftConfig", {"r": 4}),
    "PVeRA": ("PveraConfig", {"r": 4}),
    "TinyLoRA": ("TinyLoraConfig", {"r": 2}),
    "UniLoRA": ("UniLoraConfig", {"r": 4}),
    "DEFT": ("DeftConfig", {"r": 4}),
    "BEFT": ("BeftConfig", {}),
    "PEANuT": ("PeanutConfig", {"r": 4}),
    "SuperTuning": ("SupertuningConfig", {}),
}
FLOAT32_INSIDE = {"C3A": 1e-6, "DEFT": 1e-6}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 16)
        self.third = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.third(torch.tanh(self.second(torch.relu(self.first(x)))))
        return y


def adapted(net: nn.Module, targets: list[str], *names: str) -> Any:
    """A net with active adapters on some of its modules, their parameters away from where they
    start."""

    def config(name: str) -> Any:
        kind, options = CONFIGS[name]
        if name == "IA3":
            options = {"feedforward_modules": [one for one in targets if one == "second"]}
        return getattr(peft, kind)(target_modules=targets, **options)

    torch.manual_seed(0)
    model = peft.get_peft_model(net, config(names[0]))
    for name in names[1:]:
        model.add_adapter(name, config(name))
    if len(names) > 1:
        model.base_model.set_adapter(["default", *names[1:]])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval().double()


def merged(model: nn.Module, x: Tensor, limit: float = 1e-12) -> list[str]:
    """The ops of the optimized model, which is right, with nothing rolled back."""
    fast = graphopt.optimize(model, (x,))
    assert fast.report.rolled_back == []
    for rows in (x, x.flip(0)):
        with torch.no_grad():
            assert relative_error(fast(rows), model(rows)) < limit
    return [node.target.__name__.partition(".")[0] for node in fast.graph_module.graph.nodes
            if node.op == "call_function"]  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_adapter_on_linear_maps_leaves_nothing_behind(name: str) -> None:
    model = adapted(Net(), TARGETS, name)
    found = merged(model, draw(3, 5, 16), FLOAT32_INSIDE.get(name, 1e-12))
    assert found == ["linear", "relu", "linear", "tanh", "linear"]


@pytest.mark.parametrize(
    "names", [("LoRA", "rsLoRA"), ("DoRA", "LoRA"), ("OFT", "OFT"), ("LoHa", "LoHa")], ids="+".join
)
def test_several_active_adapters_merge_in_their_order(names: tuple[str, ...]) -> None:
    # Two active OFT adapters rotate the input one after the other, and do not commute.
    model = adapted(Net(), TARGETS, *names)
    assert merged(model, draw(3, 5, 16)) == ["linear", "relu", "linear", "tanh", "linear"]


CONVOLUTIONS: dict[str, Any] = {
    "3x3": (nn.Conv2d, {"kernel_size": 3, "padding": 1}),
    "stride 2": (nn.Conv2d, {"kernel_size": 3, "stride": 2, "padding": 1}),
    "dilated": (nn.Conv2d, {"kernel_size": 3, "padding": "same", "dilation": 2}),
    "3x5": (nn.Conv2d, {"kernel_size": (3, 5), "padding": (1, 2)}),
    "grouped": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "groups": 4}),
    "1d": (nn.Conv1d, {"kernel_size": 3, "padding": 1}),
    "3d": (nn.Conv3d, {"kernel_size": 3, "padding": 1}),
}


@pytest.mark.parametrize("layer", CONVOLUTIONS)
@pytest.mark.parametrize("name", ["LoRA", "DoRA"])
def test_adapter_on_a_convolution_leaves_nothing_behind(name: str, layer: str) -> None:
    # PEFT itself merges wrongly, or not at all, where a convolution is dilated or grouped.
    kind, options = CONVOLUTIONS[layer]
    conv = kind(8, 12, **options)
    model = adapted(nn.Sequential(conv, nn.ReLU()), ["0"], name)
    size = conv.weight.ndim - 2
    assert merged(model, draw(2, 8, *(7,) * size)) == [f"conv{size}d", "relu"]


@pytest.mark.parametrize("name", ["LoHa", "LoKr", "IA3", "HiRA", "AdaLoRA", "BOFT", "HRA"])
def test_other_adapters_on_a_convolution(name: str) -> None:
    conv = nn.Conv2d(8, 12, 3, stride=2, padding=1)
    model = adapted(nn.Sequential(conv, nn.ReLU()), ["0"], name)
    assert merged(model, draw(2, 8, 7, 7)) == ["conv2d", "relu"]


def test_adapter_that_pads_otherwise_stays_right() -> None:
    # The convolution reflects the image at its border, LoRA's own pads it with zeros.
    conv = nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect")
    model = adapted(nn.Sequential(conv, nn.ReLU()), ["0"], "LoRA")
    assert merged(model, draw(2, 8, 7, 7)).count("conv2d") == 2


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "HiRA", "OFT"])
def test_adapter_on_an_embedding_is_a_table(name: str) -> None:
    model = adapted(nn.Sequential(nn.Embedding(20, 16), nn.Tanh()), ["0"], name)
    assert merged(model, torch.randint(0, 20, (3, 7))) == ["embedding", "tanh"]


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "HiRA", "VeRA", "FourierFT", "IA3"])
def test_adapter_on_a_transposed_linear_map(name: str) -> None:
    from transformers.pytorch_utils import Conv1D

    model = adapted(nn.Sequential(Conv1D(16, 16), nn.Tanh()), ["0"], name)
    assert merged(model, draw(3, 5, 16)) == ["linear", "tanh"]


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
    assert merged(adapted(Attention(), ["attention"], "LoRA"), x) == plain


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
