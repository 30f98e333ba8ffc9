"""The zoos, and building a model of one by name."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from benchmarks.zoo import timm_models, torchvision_models, transformers_models
from benchmarks.zoo.inputs import MakeInputs

ZOOS = {
    "torchvision": torchvision_models,
    "timm": timm_models,
    "transformers": transformers_models,
}


def build(zoo: str, name: str, size: int) -> tuple[nn.Module, MakeInputs]:
    """A model that runs: at the reduced input size if it can, else at its own."""
    for wanted in (size, None):
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return ZOOS[zoo].build(name, wanted)
        except Exception:
            if wanted is None:
                raise
    raise AssertionError("unreachable")
