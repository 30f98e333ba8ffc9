"""Optimize every model of a zoo and check each against its source in float64.

    python -m benchmarks.zoo torchvision|timm|transformers

Models have random weights, batch norms that no rewrite gets right by luck, and nothing left at a
constant initial value that could hide an error. The checks share no code with graphopt's own:

- meaning: the model in float64 against its optimized self, relative error <= 1e-10;
- numerics: float32 error against the float64 truth, optimized <= 2x source;
- both again on fresh inputs of batch size 3;
- every batch norm still there has a refusal with a reason.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import json
import math
import os
import resource
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.utils._pytree as pytree
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import graphopt
from graphopt.sources import randomize_norms
from graphopt.torchvision_ops import declare_missing_ops

FLOAT64_LIMIT = 1e-10
RATIO_LIMIT = 2.0
UNIT_ROUNDOFF = 2.0**-24  # no source is credited with a smaller float32 error than this
IMAGE_SIZE = 96
RESULTS = Path(__file__).parent / "results"

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
MakeInputs = Callable[[int], Inputs]  # batch size -> (args, kwargs), fresh on every call


@dataclasses.dataclass
class Row:
    """What is known of one model. `verdict`: right, wrong, unexplained or failed.

    Errors are relative in the 2-norm, the largest over the outputs; nan where not measured.
    `batch`: "yes", or why the optimized model does not take batch size 3 (or the source cannot).
    """

    name: str
    verdict: str = "failed"
    reason: str = ""
    inputs: str = ""
    parameters: int = 0
    capture: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)
    batch: str = ""
    float64_error: float = math.nan
    float64_error_batch: float = math.nan
    source_error: float = math.nan
    error: float = math.nan
    source_error_batch: float = math.nan
    error_batch: float = math.nan
    norms_before: int = 0
    norms_after: int = 0
    norms_unexplained: list[str] = dataclasses.field(default_factory=list)
    norms_reasons: dict[str, str] = dataclasses.field(default_factory=dict)
    applied: int = 0
    refused: int = 0
    rolled_back: list[str] = dataclasses.field(default_factory=list)
    nodes_before: int = 0
    nodes_after: int = 0
    capture_seconds: float = math.nan
    passes_seconds: float = math.nan
    validation_seconds: float = math.nan
    seconds: float = math.nan

    @property
    def ratio(self) -> float:
        return self.error / max(self.source_error, UNIT_ROUNDOFF)

    @property
    def ratio_batch(self) -> float:
        return self.error_batch / max(self.source_error_batch, UNIT_ROUNDOFF)


# -- checking one model -------------------------------------------------------------------------


@torch.no_grad()
def check(row: Row, model: nn.Module, make: MakeInputs) -> None:
    """Fill in `row`; raises what building, optimizing or running the model raises."""
    example, fresh = make(1), make(3)
    row.inputs = ", ".join(
        "x".join(map(str, one.shape)) for one in pytree.tree_leaves(example) if _is_tensor(one)
    )
    row.parameters = sum(one.numel() for one in model.parameters())
    row.norms_before = _norms_run(model, example)
    found = _run(model, example)
    try:
        found_batch = _run(model, fresh)
        row.batch = "yes"
    except Exception as error:
        found_batch = []
        row.batch = f"source: {_first_line(error)}"

    model.double()  # and back below, which is exact; a copy would be the largest thing in memory
    truth = _run(model, _double(example))
    truth_batch = _run(model, _double(fresh)) if row.batch == "yes" else []
    if not all(bool(one.isfinite().all()) for one in truth if _is_tensor(one)):
        raise ArithmeticError("the source model's outputs are not finite in float64")
    row.source_error = relative_error(found, truth)
    if row.batch == "yes":
        row.source_error_batch = relative_error(found_batch, truth_batch)

    args, kwargs = _double(example)
    fast = graphopt.optimize(model, args, kwargs=kwargs)
    row.float64_error = relative_error(_run(fast, _double(example)), truth)
    row.float64_error_batch = _batch_error(row, fast, _double(fresh), truth_batch)
    del fast
    gc.collect()

    model.float()
    args, kwargs = example
    start = time.perf_counter()
    fast = graphopt.optimize(model, args, kwargs=kwargs)
    row.seconds = time.perf_counter() - start
    row.error = relative_error(_run(fast, example), truth)
    row.error_batch = _batch_error(row, fast, fresh, truth_batch)
    _read_report(row, fast, example)


def relative_error(found: list[Any], truth: list[Any]) -> float:
    """The largest relative 2-norm error over the leaves; inf where they do not compare."""
    if len(found) != len(truth):
        return math.inf
    worst = 0.0
    for a, b in zip(found, truth, strict=True):
        if not (_is_tensor(a) and _is_tensor(b)):
            worst = max(worst, 0.0 if type(a) is type(b) and a == b else math.inf)
        elif a.shape != b.shape:
            worst = math.inf
        elif not b.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(a, b) else math.inf)
        else:
            off, size = float((a.double() - b).norm()), float(b.norm())
            worst = max(worst, off / size if size else math.inf if off else 0.0)
            worst = math.inf if math.isnan(off) else worst
    return worst


def _batch_error(row: Row, fast: nn.Module, inputs: Inputs, truth: list[Any]) -> float:
    if row.batch != "yes":
        return math.nan
    try:
        found = _run(fast, inputs)
    except Exception as error:  # refusing other batch sizes is allowed, answering wrongly is not
        row.batch = _first_line(error)
        return math.nan
    return relative_error(found, truth)


def _run(model: nn.Module, inputs: Inputs) -> list[Any]:
    args, kwargs = pytree.tree_map(lambda x: x.clone() if _is_tensor(x) else x, inputs)
    return pytree.tree_leaves(model(*args, **kwargs))


def _double(inputs: Inputs) -> Inputs:
    return pytree.tree_map(
        lambda x: x.double() if _is_tensor(x) and x.is_floating_point() else x, inputs
    )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()[:200]}" if lines else type(error).__name__


# -- batch norms --------------------------------------------------------------------------------


class _CountNorms(TorchDispatchMode):
    """Counts the batch norm kernels that run, wherever they are called from."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "batch_norm" in func._schema.name
        return func(*args, **(kwargs or {}))


def _norms_run(model: nn.Module, inputs: Inputs) -> int:
    with _CountNorms() as counter:
        _run(model, inputs)
    return counter.count


def _norm_nodes(module: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in module.graph.nodes if "batch_norm" in str(node.target)
            and node.op == "call_function"]  # fmt: skip


def _read_report(row: Row, fast: graphopt.OptimizedModule, inputs: Inputs) -> None:
    report = fast.report
    reports = [report, *report.regions.values()]
    row.capture = report.capture.method
    row.notes = [note for one in reports for note in one.capture.notes]
    row.notes += [f"left eager {path or '(root)'}: {why}"
                  for path, why in report.capture.left_out.items()]  # fmt: skip
    row.applied, row.refused = len(report.applied), len(report.refused)
    row.rolled_back = [f"{one.rewrite} at {one.where}: {one.reason}" for one in report.rolled_back]
    row.nodes_before = sum(one.before.nodes for one in reports if one.before is not None)
    row.nodes_after = sum(one.after.nodes for one in reports if one.after is not None)
    row.capture_seconds = sum(one.capture.seconds for one in reports)
    row.passes_seconds = sum(seconds for one in reports for _, seconds in one.passes)
    row.validation_seconds = sum(one.validation_seconds for one in reports)

    seen = 0
    for part in fast.modules():
        if not isinstance(part, graphopt.OptimizedModule) or part.graph_module is None:
            continue
        records = [one for one in (*part.report.refused, *part.report.rolled_back) if one.reason]
        reasons = {key: one.reason for one in records for key in (one.where, one.node) if key}
        for node in _norm_nodes(part.graph_module):
            seen += 1
            where = node.meta.get("where", "?")
            reason = reasons.get(node.name) or reasons.get(where)
            if reason is None:
                row.norms_unexplained.append(where)
            else:
                row.norms_reasons[where] = reason
    row.norms_after = seen if fast.graph_module is not None else _norms_run(fast, inputs)
    if row.norms_after > seen and not report.capture.left_out:
        row.norms_unexplained.append(f"{row.norms_after - seen} left eager")


def judge(row: Row) -> None:
    """Set the verdict of a row whose checks all ran."""
    problems = [
        f"{name} {value:.1e}, more than {limit:g}"
        for name, value, limit in (
            ("float64 error", row.float64_error, FLOAT64_LIMIT),
            ("float64 error at batch 3", row.float64_error_batch, FLOAT64_LIMIT),
            ("float32 ratio", row.ratio, RATIO_LIMIT),
            ("float32 ratio at batch 3", row.ratio_batch, RATIO_LIMIT),
        )
        if value > limit
    ]
    row.verdict = "right"
    if row.norms_unexplained:
        row.verdict = "unexplained"
        row.reason = f"no reason for the batch norm at {', '.join(row.norms_unexplained)}"
    if problems:
        row.verdict, row.reason = "wrong", "; ".join(problems)


# -- building -----------------------------------------------------------------------------------


@torch.no_grad()
def wake(model: nn.Module, seed: int = 0) -> None:
    """Add noise to every parameter whose elements are all equal.

    Zero biases and layer scales of 1e-6 would hide whatever happens to them and to their branch.
    """
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        flat = parameter.flatten()
        if parameter.is_floating_point() and flat.numel() > 1 and bool((flat == flat[0]).all()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))


def _finish(model: nn.Module, make: MakeInputs) -> tuple[nn.Module, MakeInputs]:
    """Random norms, no constants, eval mode; raises if the model does not run."""
    model.eval()
    wake(model)
    args, kwargs = make(2)
    randomize_norms(model, inputs=args if args else None)
    with torch.no_grad():
        model(*args, **kwargs)
    return model, make


def _images(*shape: int) -> MakeInputs:
    draw = torch.Generator().manual_seed(1)
    return lambda batch: ((torch.randn(batch, *shape, generator=draw),), {})


def torchvision_names() -> list[str]:
    from torchvision import models

    return models.list_models(module=models)


def build_torchvision(name: str, size: int | None) -> tuple[nn.Module, MakeInputs]:
    from torchvision import models

    options = {}
    if name.startswith("vit_"):
        patch = int(name.rpartition("_")[2])
        size = 224 if size is None else max(2, size // patch) * patch
        options = {"image_size": size}
    model = models.get_model(name, weights=None, **options)
    size = size or (299 if name == "inception_v3" else 224)
    return _finish(model, _images(3, size, size))


def timm_names() -> list[str]:
    return TIMM.split()


def build_timm(name: str, size: int | None) -> tuple[nn.Module, MakeInputs]:
    import timm

    model = timm.create_model(name, pretrained=False)
    config = model.pretrained_cfg
    shape = config["input_size"]
    if size is not None:
        if config.get("fixed_input_size"):
            model = timm.create_model(name, pretrained=False, img_size=size)
        shape = (3, size, size)
    return _finish(model, _images(*shape))


def transformers_names() -> list[str]:
    return list(TRANSFORMERS)


def build_transformers(name: str, size: int | None) -> tuple[nn.Module, MakeInputs]:
    import transformers

    architecture, options, kind = TRANSFORMERS[name]
    cls = getattr(transformers, architecture)
    transformers.logging.set_verbosity_error()  # special tokens outside a small vocabulary
    model = cls(cls.config_class(**options))
    if name == "whisper-encoder":
        model = model.encoder
    return _finish(model, _FEEDS[kind])


ZOOS: dict[str, tuple[Callable[[], list[str]], Callable[..., tuple[nn.Module, MakeInputs]]]] = {
    "torchvision": (torchvision_names, build_torchvision),
    "timm": (timm_names, build_timm),
    "transformers": (transformers_names, build_transformers),
}


def build(zoo: str, name: str, size: int) -> tuple[nn.Module, MakeInputs]:
    """A model that runs: at the reduced input size if it can, else at its own."""
    for wanted in (size, None):
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return ZOOS[zoo][1](name, wanted)
        except Exception:
            if wanted is None:
                raise
    raise AssertionError("unreachable")


# One small variant per file of timm.models, and more where a file holds several designs.
TIMM = """
beit_base_patch16_224 botnet26t_256 halonet26t lambda_resnet26t repvgg_a0 mobileone_s0 gernet_s
regnetz_b16 resnet32ts cait_xxs24_224 coat_lite_tiny convit_tiny convmixer_768_32 convnext_atto
convnextv2_atto cpubone_nano crossvit_9_240 csatv2 cs3darknet_focus_s cspresnet50 cspnext_tiny
davit_tiny deit_tiny_distilled_patch16_224 densenet121 dla46_c dpn48b edgenext_xx_small
efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientnet_lite0 efficientvim_m1
efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 fbnetc_100
focalnet_tiny_srf gcvit_xxtiny ghostnet_050 ghostnetv2_100 ghostnetv3_050 gmlp_ti16_224
hardcorenas_a hgnetv2_b0 hiera_tiny_224 hieradet_small hrnet_w18_small iformer_t
inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s
levit_conv_128s lowformer_b0 mambaout_femto coatnet_pico_rw_224 maxvit_pico_rw_256 poolformer_s12
caformer_s18 mixer_s32_224 resmlp_12_224 mixnet_s mnasnet_small mobilenetv2_050
mobilenetv3_small_050 mobilenetv4_conv_small_035 mobilenetv5_base mobilevit_xxs mobilevitv2_050
mvitv2_tiny naflexvit_base_patch16_gap nasnetalarge nest_tiny nextvit_small nf_regnet_b0 nf_resnet26
pit_ti_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 regnety_002
repghostnet_050 repvit_m0_9 res2net50_14w_8s resnest14d resnet10t resnet18d resnetblur18
ecaresnet26t seresnext26d_32x4d resnetv2_18 resnetv2_50x1_bit rexnet_100 selecsls42
legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 spnasnet_100 starnet_s050 swiftformer_xs
swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tinynet_e tiny_vit_5m_224
tnt_s_patch16_224 tresnet_m twins_svt_small vgg11_bn visformer_tiny vit_tiny_patch16_224
vit_tiny_r_s16_p8_224 vit_relpos_small_patch16_224 samvit_base_patch16_224 vitamin_small_224
volo_d1_224 ese_vovnet19b_slim legacy_xception xception41 xcit_nano_12_p16_224
"""

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
    "mel": _images(16, 40),
    "mel to text": _mel_to_text,
    "wave": _images(800),
    "image 32": _images(3, 32, 32),
    "image 64": _images(3, 64, 64),
}


# -- printing and storing -----------------------------------------------------------------------

_STYLES = {"right": "green", "wrong": "bold red", "unexplained": "yellow", "failed": "red"}
_COLUMNS = (
    ("model", 34), ("verdict", 11), ("float64", 8), ("source", 8), ("fast", 8), ("ratio", 6),
    ("batch 3", 8), ("norms", 9), ("nodes", 13), ("capture", 14), ("seconds", 8),
)  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table; errors are those at batch size 1, the ratio the larger of both."""
    if row.verdict == "failed":
        return (row.name, row.verdict, *("-",) * (len(_COLUMNS) - 2))
    ratio = max(row.ratio, row.ratio_batch if row.batch == "yes" else 0.0)
    return (
        row.name, row.verdict, f"{row.float64_error:.0e}", f"{row.source_error:.1e}",
        f"{row.error:.1e}", f"{ratio:.2f}", "yes" if row.batch == "yes" else "no",
        f"{row.norms_before} > {row.norms_after}", f"{row.nodes_before} > {row.nodes_after}",
        row.capture, f"{row.seconds:.1f}",
    )  # fmt: skip


def show(console: Console, row: Row, header: bool) -> None:
    table = Table(box=None, show_header=header, padding=(0, 1, 0, 0))
    for title, width in _COLUMNS:
        table.add_column(title, width=width, no_wrap=True)
    table.add_row(*map(escape, cells(row)), style=_STYLES[row.verdict])
    console.print(table)
    lines = [row.reason] if row.reason else []
    lines += [f"batch 3: {row.batch}"] if row.batch not in ("yes", "") else []
    lines += [f"rolled back: {one}" for one in row.rolled_back[:1]]
    for line in lines:
        console.print(f"  {escape(line)}", style="dim", soft_wrap=True)
    console.file.flush()


def write_results(folder: Path, zoo: str, rows: list[Row]) -> None:
    """`zoo_<zoo>.json` with everything and `zoo_<zoo>.md` with the table."""
    environment = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "graphopt": graphopt.__version__,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    summary = Counter(row.verdict for row in rows)
    data = {
        "zoo": zoo, "environment": environment, "summary": dict(summary),
        "models": [_plain(row) for row in rows],
    }  # fmt: skip
    (folder / f"zoo_{zoo}.json").write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
    lines = [
        f"# {zoo}: {summary['right']} of {len(rows)} right",
        "",
        ", ".join(f"{key} {value}" for key, value in environment.items()) + ".",
        "",
        "float64: relative error of the optimized model in float64. source, fast: float32 error",
        "of the source and of the optimized model against the float64 truth; ratio: fast / source,",
        "the larger of batch sizes 1 and 3. norms: batch norms before > after. seconds: optimize()",
        "",
        "| " + " | ".join(title for title, _ in _COLUMNS) + " |",
        "|" + " --- |" * len(_COLUMNS),
        *("| " + " | ".join(cells(row)) + " |" for row in rows),
    ]
    remarks = [(row, row.reason) for row in rows if row.reason]
    remarks += [(row, f"batch size 3: {row.batch}") for row in rows if row.batch not in ("yes", "")]
    if remarks:
        lines += ["", *(f"- {row.name}: {remark}" for row, remark in remarks)]
    (folder / f"zoo_{zoo}.md").write_text("\n".join(lines) + "\n")


def _plain(row: Row) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in dataclasses.asdict(row).items()
    }


def _read(lines: Iterable[str]) -> dict[str, Row]:
    rows = {}
    for line in lines:
        data = json.loads(line)
        row = Row(**{key: math.nan if value is None else value for key, value in data.items()})
        rows[row.name] = row
    return rows


# -- the sweep ----------------------------------------------------------------------------------


def run_one(zoo: str, name: str, size: int, debug: bool = False) -> Row:
    row = Row(name)
    try:
        check(row, *build(zoo, name, size))
        judge(row)
    except Exception as error:
        row.verdict, row.reason = "failed", _first_line(error)
        if debug:
            traceback.print_exc()
    finally:
        torch._dynamo.reset()
        gc.collect()
    return row


def _limit_memory() -> None:
    """Make what does not fit raise in the model at hand, rather than have the sweep killed."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # no Linux
        return
    available = next(int(one.split()[1]) for one in lines if one.startswith("MemAvailable"))
    limit = int(0.95 * 1024 * available)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def main(
    zoo: Annotated[str, typer.Argument(help="torchvision, timm or transformers")],
    limit: Annotated[int | None, typer.Option(help="only the first N models")] = None,
    only: Annotated[list[str] | None, typer.Option(help="only this model; repeatable")] = None,
    size: Annotated[int, typer.Option(help="side of images where a model allows it")] = IMAGE_SIZE,
    out: Annotated[Path | None, typer.Option(help="folder of the results")] = None,
    resume: Annotated[bool, typer.Option(help="keep rows of an interrupted sweep")] = False,
    debug: Annotated[bool, typer.Option(help="print the tracebacks of failures")] = False,
) -> None:
    """Check a zoo; results of a complete sweep go to benchmarks/results, of a part to --out."""
    if zoo not in ZOOS:
        raise typer.BadParameter(f"unknown zoo {zoo!r}; expected one of {', '.join(ZOOS)}")
    torch.set_num_threads(1)
    _limit_memory()
    declare_missing_ops()
    names = list(only or ZOOS[zoo][0]())[:limit]
    partial = only is not None or limit is not None
    folder = out or (None if partial else RESULTS)
    console = Console(width=160)
    rows: dict[str, Row] = {}
    log = None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / f"zoo_{zoo}.jsonl"  # survives an interruption; merged at the end
        if resume and log.exists():
            rows = _read(log.read_text().splitlines())
        log.write_text("".join(json.dumps(_plain(row)) + "\n" for row in rows.values()))
    shown = 0
    for name in names:
        if name in rows:
            continue
        rows[name] = row = run_one(zoo, name, size, debug)
        show(console, row, header=shown == 0)
        shown += 1
        if log is not None:
            with log.open("a") as file:
                file.write(json.dumps(_plain(row)) + "\n")
    done = [rows[name] for name in names]
    if folder is not None and log is not None:
        write_results(folder, zoo, done)
        if not partial:
            log.unlink()
    counts = Counter(row.verdict for row in done)
    console.print(
        f"{len(done)} models: {counts['right']} right, {counts['wrong']} wrong, "
        f"{counts['unexplained']} refused without a reason, {counts['failed']} failed"
    )
    raise typer.Exit(1 if counts["wrong"] else 0)


if __name__ == "__main__":
    typer.run(main)
