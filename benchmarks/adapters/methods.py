"""The adapters of PEFT 0.21 that can be merged, and small models for each kind of layer."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.torchvision_ops import declare_missing_ops

declare_missing_ops()

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {"r": 4, "lora_alpha": 8}),
    "LoRA with a bias": ("LoraConfig", {"r": 4, "lora_bias": True}),
    "rsLoRA": ("LoraConfig", {"r": 4, "use_rslora": True}),
    "DoRA": ("LoraConfig", {"r": 4, "use_dora": True}),
    "PiSSA": ("LoraConfig", {"r": 4, "init_lora_weights": "pissa"}),
    "OLoRA": ("LoraConfig", {"r": 4, "init_lora_weights": "olora"}),
    "MiCA": ("LoraConfig", {"r": 4, "init_lora_weights": "mica"}),
    "orthogonal LoRA": ("LoraConfig", {"r": 4, "init_lora_weights": "orthogonal"}),
    "KaSA": ("LoraConfig", {"r": 4, "kasa_config": {}}),
    "BD-LoRA, A in blocks": (
        "LoraConfig",
        {"r": 4, "use_bdlora": {"target_modules_bd_a": [""], "nblocks": 2}},
    ),
    "BD-LoRA, B in blocks": (
        "LoraConfig",
        {"r": 4, "use_bdlora": {"target_modules_bd_b": [""], "nblocks": 2}},
    ),
    "VeLoRA": ("LoraConfig", {"r": 4, "velora_config": {"num_groups": 4}}),
    "MonteCLoRA": ("LoraConfig", {"r": 4, "monteclora_config": {}}),
    "AdaLoRA": ("AdaLoraConfig", {"total_step": 10, "init_r": 4, "target_r": 2}),
    "LoHa": ("LoHaConfig", {"r": 4}),
    "LoKr": ("LoKrConfig", {"r": 4}),
    "OFT": ("OFTConfig", {"r": 0, "oft_block_size": 4}),
    "OFT by Cayley": ("OFTConfig", {"r": 0, "oft_block_size": 4, "use_cayley_neumann": False}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4}),
    "HRA": ("HRAConfig", {"r": 4}),
    "IA3": ("IA3Config", {"feedforward_modules": []}),
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
    "FRoD": ("FrodConfig", {"sparse_rate": 0.1, "progressbar": False}),
    "AdaMSS": ("AdamssConfig", {"r": 8, "num_subspaces": 3, "subspace_rank": 2}),
    "DEFT": ("DeftConfig", {"r": 4}),
    "PaRa": ("DeftConfig", {"r": 4, "para": True}),
    "BEFT": ("BeftConfig", {}),
    "PEANuT": ("PeanutConfig", {"r": 4}),
    "SuperTuning": ("SupertuningConfig", {}),
    "TrainableTokens": ("TrainableTokensConfig", {"token_indices": [1, 5, 11]}),
    "LN tuning": ("LNTuningConfig", {}),
}
FLOAT32_INSIDE = {"C3A": 1e-5, "DEFT": 1e-5, "PaRa": 1e-5}
"""They compute in float32 whatever the model: merged in float32 models, within these errors."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A kind of layer, the shape of its input (of integers below `rows`), and the op it ends as."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    op: str
    rows: int = 0

    def input(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        if self.rows:
            return torch.randint(0, self.rows, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator)


def _transposed_linear() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(16, 16)


_IMAGE = (2, 8, 9, 9)
LAYERS = {
    "Linear": Layer(lambda: nn.Linear(16, 16), (3, 5, 16), "linear"),
    "HF Conv1D": Layer(_transposed_linear, (3, 5, 16), "linear"),
    "Embedding": Layer(lambda: nn.Embedding(20, 16), (3, 7), "embedding", rows=20),
    "1x1": Layer(lambda: nn.Conv2d(8, 12, 1), _IMAGE, "conv2d"),
    "3x3": Layer(lambda: nn.Conv2d(8, 12, 3, padding=1), _IMAGE, "conv2d"),
    "stride 2": Layer(lambda: nn.Conv2d(8, 12, 3, 2, padding=1), _IMAGE, "conv2d"),
    "dilated": Layer(lambda: nn.Conv2d(8, 12, 3, padding="same", dilation=2), _IMAGE, "conv2d"),
    "3x5": Layer(lambda: nn.Conv2d(8, 12, (3, 5), padding=(1, 2)), _IMAGE, "conv2d"),
    "grouped": Layer(lambda: nn.Conv2d(8, 12, 3, padding=1, groups=4), _IMAGE, "conv2d"),
    "depthwise": Layer(lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), _IMAGE, "conv2d"),
    "reflecting": Layer(
        lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"), _IMAGE, "conv2d"
    ),
    "Conv1d": Layer(lambda: nn.Conv1d(8, 12, 3, padding=1), (2, 8, 9), "conv1d"),
    "Conv3d": Layer(lambda: nn.Conv3d(8, 12, 3, padding=1), (2, 8, 5, 5, 5), "conv3d"),
    "LayerNorm": Layer(lambda: nn.LayerNorm(16), (3, 5, 16), "layer_norm"),
}


def adapted(net: nn.Module, targets: list[str], *names: str) -> Any:
    """A net with active adapters on some of its modules, their parameters away from where they
    start; whatever PEFT raises if it does not support that."""
    import peft

    def config(name: str) -> Any:
        kind, options = METHODS[name]
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
    return model.eval()


def as_double(model: nn.Module) -> Any:
    """A copy in float64, also where a module casts to a dtype that it keeps (AdaMSS)."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if isinstance(vars(module).get("dtype"), torch.dtype):
            setattr(module, "dtype", torch.float64)  # noqa: B010
    return model


def ops_of(model: Any) -> list[str]:
    """The names of what an optimized model calls; none if it was captured by region."""
    if model.graph_module is None:
        return []
    return [node.target.__name__.partition(".")[0] for node in model.graph_module.graph.nodes
            if node.op == "call_function"]  # fmt: skip
