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
    "IA3": ("IA3Config", {"feedforward_modules": ["second"]}),
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


def adapted(name: str) -> nn.Module:
    """A net with an adapter on each linear map, its parameters away from where they start."""
    kind, options = CONFIGS[name]
    torch.manual_seed(0)
    config = getattr(peft, kind)(target_modules=TARGETS, **options)
    model: nn.Module = peft.get_peft_model(Net(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval().double()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
def test_adapter_on_linear_maps_leaves_nothing_behind(name: str) -> None:
    model = adapted(name)
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    fast = graphopt.optimize(model, (x,))
    assert fast.report.rolled_back == []
    calls = [node.target.__name__.partition(".")[0] for node in fast.graph_module.graph.nodes
             if node.op == "call_function"]  # fmt: skip
    assert calls == ["linear", "relu", "linear", "tanh", "linear"]
    for rows in (x, 2 * x.flip(0)):
        with torch.no_grad():
            assert relative_error(fast(rows), model(rows)) < FLOAT32_INSIDE.get(name, 1e-12)
