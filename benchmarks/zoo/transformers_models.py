"""Architectures of transformers, each in a size of its own that is small enough to check."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.zoo.inputs import Inputs, MakeInputs, images
from benchmarks.zoo.prepare import finish

_TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 101,
         "intermediate_size": 96, "max_position_embeddings": 64}  # fmt: skip
_CAUSAL = {**_TEXT, "num_key_value_heads": 2, "use_cache": False}
_VISION = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
           "intermediate_size": 96, "image_size": 32, "patch_size": 8}  # fmt: skip
_SEQ2SEQ = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
            "vocab_size": 101, "use_cache": False}  # fmt: skip
_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 101,
       "use_cache": False}  # fmt: skip
_SPEECH = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
           "intermediate_size": 96, "conv_dim": (32, 32), "conv_kernel": (10, 3),
           "conv_stride": (5, 2), "num_conv_pos_embeddings": 16,
           "num_conv_pos_embedding_groups": 4, "vocab_size": 32}  # fmt: skip

# name: (class, options of its config, what it is fed)
TRANSFORMERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("BertModel", _TEXT, "text"),
    "roberta": ("RobertaModel", _TEXT, "text"),
    "distilbert": ("DistilBertModel", {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96,
                                       "vocab_size": 101}, "text"),
    "albert": ("AlbertModel", {**_TEXT, "embedding_size": 32}, "text"),
    "electra": ("ElectraModel", {**_TEXT, "embedding_size": 32}, "text"),
    "gpt2": ("GPT2Model", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 101,
                           "n_positions": 64, "use_cache": False}, "text"),
    "gpt-neox": ("GPTNeoXModel", {**_TEXT, "use_cache": False}, "text"),
    "opt": ("OPTModel", {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "ffn_dim": 96, "vocab_size": 101, "max_position_embeddings": 64,
                         "word_embed_proj_dim": 64, "use_cache": False}, "text"),
    "llama": ("LlamaForCausalLM", _CAUSAL, "text"),
    "mistral": ("MistralModel", {**_CAUSAL, "sliding_window": 8}, "text"),
    "qwen2": ("Qwen2Model", _CAUSAL, "text"),
    "gemma2": ("Gemma2Model", {**_CAUSAL, "head_dim": 16}, "text"),
    "phi": ("PhiModel", {**_CAUSAL, "num_key_value_heads": 4}, "text"),
    "t5-encoder": ("T5EncoderModel", _T5, "text"),
    "t5": ("T5Model", _T5, "text to text"),
    "bart": ("BartModel", {**_SEQ2SEQ, "max_position_embeddings": 64}, "text to text"),
    "whisper": ("WhisperModel", {**_SEQ2SEQ, "num_mel_bins": 16, "max_source_positions": 20,
                                 "max_target_positions": 32, "pad_token_id": 0,
                                 "decoder_start_token_id": 1}, "mel to text"),
    "whisper-encoder": ("WhisperModel", {**_SEQ2SEQ, "num_mel_bins": 16, "pad_token_id": 0,
                                         "max_source_positions": 20}, "mel"),
    "wav2vec2": ("Wav2Vec2Model", {**_SPEECH, "num_feat_extract_layers": 2}, "wave"),
    "hubert": ("HubertModel", {**_SPEECH, "num_feat_extract_layers": 2}, "wave"),
    "vit": ("ViTModel", _VISION, "image 32"),
    "deit": ("DeiTModel", _VISION, "image 32"),
    "beit": ("BeitModel", {**_VISION, "use_relative_position_bias": True}, "image 32"),
    "dinov2": ("Dinov2Model", _VISION, "image 32"),
    "clip-vision": ("CLIPVisionModel", _VISION, "image 32"),
    "siglip-vision": ("SiglipVisionModel", _VISION, "image 32"),
    "swin": ("SwinModel", {"image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [2, 2],
                           "num_heads": [2, 4], "window_size": 4}, "image 32"),
    "swinv2": ("Swinv2Model", {"image_size": 32, "patch_size": 2, "embed_dim": 32,
                               "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
               "image 32"),
    "convnext": ("ConvNextModel", {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]},
                 "image 64"),
    "convnextv2": ("ConvNextV2Model", {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]},
                   "image 64"),
    "resnet": ("ResNetModel", {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64],
                               "depths": [1, 2, 1, 1]}, "image 64"),
    "regnet": ("RegNetModel", {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64],
                               "depths": [1, 2, 1, 1], "groups_width": 16}, "image 64"),
    "mobilenet-v1": ("MobileNetV1Model", {"depth_multiplier": 0.25}, "image 64"),
    "mobilenet-v2": ("MobileNetV2Model", {"depth_multiplier": 0.35}, "image 64"),
    "mobilevit": ("MobileViTModel", {"hidden_sizes": [32, 48, 64], "image_size": 64,
                                     "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 96]},
                  "image 64"),
    "efficientnet": ("EfficientNetModel", {"width_coefficient": 0.5, "hidden_dim": 640},
                     "image 64"),
    "levit": ("LevitModel", {"image_size": 64, "hidden_sizes": [32, 48, 64], "key_dim": [8, 8, 8],
                             "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1]}, "image 64"),
    "segformer": ("SegformerModel", {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
                  "image 64"),
    "pvt": ("PvtModel", {"image_size": 64, "hidden_sizes": [16, 32, 48, 64],
                         "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 3, 4]}, "image 64"),
    "poolformer": ("PoolFormerModel", {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
                   "image 64"),
}  # fmt: skip

_draw = torch.Generator().manual_seed(2)


def _tokens(batch: int, length: int = 16) -> torch.Tensor:
    return torch.randint(3, 101, (batch, length), generator=_draw)


def _text(batch: int) -> Inputs:
    mask = torch.ones(batch, 16, dtype=torch.int64)
    mask[:, 13:] = 0
    return (), {"input_ids": _tokens(batch), "attention_mask": mask}


def _text_to_text(batch: int) -> Inputs:
    args, kwargs = _text(batch)
    return args, {**kwargs, "decoder_input_ids": _tokens(batch, 7)}


def _mel_to_text(batch: int) -> Inputs:
    mel = torch.randn(batch, 16, 40, generator=_draw)
    return (), {"input_features": mel, "decoder_input_ids": _tokens(batch, 7)}


_FEEDS: dict[str, MakeInputs] = {
    "text": _text,
    "text to text": _text_to_text,
    "mel": images(16, 40),
    "mel to text": _mel_to_text,
    "wave": images(800),
    "image 32": images(3, 32, 32),
    "image 64": images(3, 64, 64),
}


def names() -> list[str]:
    return list(TRANSFORMERS)


def build(name: str, size: int | None) -> tuple[nn.Module, MakeInputs]:
    import transformers

    architecture, options, kind = TRANSFORMERS[name]
    cls = getattr(transformers, architecture)
    transformers.logging.set_verbosity_error()  # special tokens outside a small vocabulary
    model = cls(cls.config_class(**options))
    if name == "whisper-encoder":
        model = model.encoder
    return finish(model, _FEEDS[kind])
