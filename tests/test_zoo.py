"""A varied sample of the zoos; `benchmarks.zoo` sweeps them whole, by the same checks."""

from __future__ import annotations

import pytest

from benchmarks.zoo.checks import run_one
from graphopt.torchvision_ops import declare_missing_ops

declare_missing_ops()

SAMPLE = [
    ("torchvision", "densenet121"),  # norms before activations on concatenations: refused
    ("torchvision", "googlenet"),
    ("torchvision", "mobilenet_v3_small"),
    ("torchvision", "shufflenet_v2_x0_5"),
    ("torchvision", "swin_t"),
    ("timm", "levit_128s"),  # norms over flattened linears
    ("timm", "repvgg_a0"),  # norms on identity branches: refused
    ("timm", "xcit_nano_12_p16_224"),  # constants in a narrower dtype
    ("transformers", "bert"),
    ("transformers", "gpt2"),
    ("transformers", "t5"),
]


@pytest.mark.parametrize(("source", "name"), SAMPLE)
def test_model_is_right_and_explained(source: str, name: str):
    row = run_one(source, name, size=64)
    assert row.verdict == "right", row
    assert row.batch == "yes", row
