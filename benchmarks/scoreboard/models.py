"""The rows: models as their users have them, and what they are fed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.inputs import MakeInputs, images
from benchmarks.zoo.prepare import finish
from graphopt.torchvision_ops import declare_missing_ops

Built = tuple[nn.Module, MakeInputs]


@dataclasses.dataclass(frozen=True)
class Row:
    """`build()` gives a model in eval mode and what makes its inputs for a batch size. A row is
    structural where most of what can be won is in the structure, not in kernels."""

    build: Callable[[], Built]
    structural: bool = False


def _torchvision(name: str) -> Callable[[], Built]:
    def build() -> Built:
        import torchvision

        return finish(torchvision.models.get_model(name), images(3, 224, 224))

    return build


def _timm(name: str) -> Callable[[], Built]:
    def build() -> Built:
        import timm

        return finish(timm.create_model(name), images(3, 224, 224))

    return build


class Tokens(nn.Module):
    """A model of transformers from token ids to one tensor, without a cache."""

    def __init__(self, body: nn.Module, field: str) -> None:
        super().__init__()
        self.body, self.field = body, field

    def forward(self, ids: Tensor) -> Tensor:
        found = self.body(input_ids=ids, **({"use_cache": False} if self.field == "logits" else {}))
        return getattr(found, self.field)  # type: ignore[no-any-return]


class Decode(nn.Module):
    """One token after `past` others: its logits, and the keys and values of all layers for it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, ids: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ids: [N, 1] int64; keys, values: [N, layers, heads, past, head size]."""
        from transformers import DynamicCache

        cache = DynamicCache(list(zip(keys.unbind(1), values.unbind(1), strict=True)))
        found = self.body(input_ids=ids, past_key_values=cache, use_cache=True)
        new = [(one.keys[:, :, -1:], one.values[:, :, -1:]) for one in cache.layers]
        return (found.logits, torch.stack([key for key, _ in new], 1),
                torch.stack([value for _, value in new], 1))  # fmt: skip


def _ids(vocabulary: int, length: int) -> MakeInputs:
    draw = torch.Generator().manual_seed(1)
    return lambda batch: ((torch.randint(0, vocabulary, (batch, length), generator=draw),), {})


def _bert() -> Built:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(), add_pooling_layer=False)
    return finish(Tokens(model, "last_hidden_state"), _ids(30522, 128))


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config())


PAST = 128


def _gpt2_decode() -> Built:
    model = _gpt2()
    draw = torch.Generator().manual_seed(1)

    def make(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = torch.randint(0, 50257, (batch, 1), generator=draw)
        cache = [torch.randn(batch, 12, 12, PAST, 64, generator=draw) for _ in range(2)]
        return (ids, *cache), {}

    return finish(Decode(model), make)


def _llama_lora() -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.adapters.methods import adapted

    config = LlamaConfig(
        hidden_size=640, intermediate_size=1728, num_hidden_layers=8, num_attention_heads=10,
        num_key_value_heads=10, vocab_size=4096, max_position_embeddings=256,
    )  # fmt: skip
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = adapted(Tokens(LlamaForCausalLM(config), "logits"), targets, "LoRA")
    return finish(model, _ids(4096, 128))


def _dora_vit() -> Built:
    import timm

    from benchmarks.adapters.methods import adapted

    model = adapted(
        timm.create_model("vit_small_patch16_224"), ["qkv", "proj", "fc1", "fc2"], "DoRA"
    )
    return finish(model, images(3, 224, 224))


def _spiking() -> Built:
    from benchmarks.spiking.nets import Style, resnet

    return finish(resnet(Style(steps=4), width=16, size=32, channels=3), images(3, 32, 32))


ROWS = {
    "ResNet-18": Row(_torchvision("resnet18")),
    "ResNet-50": Row(_torchvision("resnet50")),
    "MobileNetV3-L": Row(_torchvision("mobilenet_v3_large")),
    "EfficientNet-B0": Row(_torchvision("efficientnet_b0")),
    "DenseNet-121": Row(_torchvision("densenet121"), structural=True),
    "RepVGG-A0, training form": Row(_timm("repvgg_a0"), structural=True),
    "ConvNeXt-T": Row(_torchvision("convnext_tiny")),
    "ViT-Ti": Row(_timm("vit_tiny_patch16_224")),
    "ViT-S": Row(_timm("vit_small_patch16_224")),
    "Swin-T": Row(_torchvision("swin_t")),
    "BERT-base, 128 tokens": Row(_bert),
    "GPT-2, prefill 128": Row(lambda: finish(Tokens(_gpt2(), "logits"), _ids(50257, 128))),
    "GPT-2, one token": Row(_gpt2_decode),
    "Llama 50M, LoRA": Row(_llama_lora, structural=True),
    "ViT-S, DoRA": Row(_dora_vit, structural=True),
    "MPBN ResNet-20, T = 4": Row(_spiking, structural=True),
}


def build(name: str) -> Built:
    declare_missing_ops()
    torch.manual_seed(0)
    return ROWS[name].build()
