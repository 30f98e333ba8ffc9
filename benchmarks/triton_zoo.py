"""Twelve models of kinds that the backend is for, small enough for an interpreter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.torchvision_ops import declare_missing_ops
from tests.helpers import randomize_norms

declare_missing_ops()
Case = tuple[nn.Module, tuple[Tensor, ...]]


def _image(size: int = 32, rows: int = 2) -> Tensor:
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(1))


def _words(length: int = 8, rows: int = 2) -> Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(1))


def resnet() -> Case:
    import torchvision

    return torchvision.models.resnet18(num_classes=10), (_image(),)


def mobilenet() -> Case:
    import torchvision

    return torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.5), (_image(),)


def convnext() -> Case:
    import timm

    return timm.create_model("convnext_atto", num_classes=10, depths=(1, 1, 2, 1)), (_image(),)


def densenet() -> Case:
    import torchvision

    model = torchvision.models.DenseNet(8, (2, 3, 2, 2), 16, num_classes=10)
    return model, (_image(64),)


def vit() -> Case:
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=3, num_classes=10
    ), (_image(),)


class _Logits(nn.Module):
    """A language model as tensors in, a tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, words: Tensor) -> Tensor:
        out = self.model(input_ids=words)
        return out.logits if hasattr(out, "logits") else out.last_hidden_state


def bert() -> Case:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=48, max_position_embeddings=32)  # fmt: skip
    return _Logits(BertModel(config)), (_words(),)


def gpt2() -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, use_cache=False
    )
    return _Logits(GPT2LMHeadModel(config)), (_words(),)


def llama() -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=48, use_cache=False)  # fmt: skip
    return _Logits(LlamaForCausalLM(config)), (_words(),)


class Spiking(nn.Module):
    """Leaky integrate-and-fire neurons over T steps, the input presented at every step."""

    def __init__(self, layers: nn.ModuleList, steps: int = 4, decay: float = 0.5) -> None:
        super().__init__()
        self.layers = layers
        self.steps = steps
        self.decay = decay

    def forward(self, x: Tensor) -> Tensor:
        voltages: list[Any] = [0.0] * len(self.layers)
        total: Any = 0.0
        for _ in range(self.steps):
            spikes = x
            for number, layer in enumerate(self.layers):
                voltages[number] = self.decay * voltages[number] + layer(spikes)
                spikes = (voltages[number] >= 1.0).to(x.dtype)
                voltages[number] = voltages[number] * (1.0 - spikes)  # hard reset
            total = total + spikes
        return total / self.steps


def spiking_dense() -> Case:
    return Spiking(nn.ModuleList([nn.Linear(12, 24), nn.Linear(24, 10)])), (torch.randn(3, 12) * 3,)


def spiking_convolutional() -> Case:
    layers = [
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.AvgPool2d(2)),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)),
    ]
    return Spiking(nn.ModuleList(layers), 3, 0.75), (_image(8) * 3,)


class LinearAttention(nn.Module):
    """phi(q) (phi(k)^T v) / (phi(q) sum phi(k)), phi = elu + 1, with a gated projection around it."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.gate = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        y = self.norm(x)
        q, k, v = self.qkv(y).reshape(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = k.transpose(-1, -2) @ v
        total = (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True)
        mixed = (q @ state) / (total + 1e-6)
        mixed = mixed.transpose(1, 2).reshape(rows, length, width)
        return x + self.out(mixed * torch.sigmoid(self.gate(y)))


def linear_attention() -> Case:
    blocks = nn.Sequential(LinearAttention(), LinearAttention())
    return blocks, (torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1)),)


class LowRank(nn.Module):
    """A linear layer with an update of low rank."""

    def __init__(self, linear: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) * 0.3)
        self.up = nn.Parameter(torch.randn(linear.out_features, rank) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + F.linear(F.linear(x, self.down), self.up)


def adapted(base: nn.Sequential) -> nn.Sequential:
    """A copy with an adapter of its own on every linear layer, on the same base weights."""
    layers = [LowRank(one) if isinstance(one, nn.Linear) else one for one in base]
    return nn.Sequential(*copy.copy(layers))


def adapters() -> tuple[nn.Sequential, list[nn.Module], tuple[Tensor, ...]]:
    """(base, models with adapters, inputs) for `graphopt.multi`."""
    base = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 8)).eval()
    return base, [adapted(base), adapted(base)], (torch.randn(5, 12),)


MODELS: dict[str, Callable[[], Case]] = {
    one.__name__: one
    for one in (resnet, mobilenet, convnext, densenet, vit, bert, gpt2, llama, spiking_dense,
                spiking_convolutional, linear_attention)
}  # fmt: skip


def made(name: str) -> Case:
    """One of MODELS in eval mode, its norms randomized."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    return randomize_norms(model.eval()), inputs
