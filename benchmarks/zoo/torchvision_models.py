"""All classification models of torchvision."""

from __future__ import annotations

from torch import nn

from benchmarks.zoo.inputs import MakeInputs, images
from benchmarks.zoo.prepare import finish


def names() -> list[str]:
    from torchvision import models

    return models.list_models(module=models)


def build(name: str, size: int | None) -> tuple[nn.Module, MakeInputs]:
    from torchvision import models

    options = {}
    if name.startswith("vit_"):
        patch = int(name.rpartition("_")[2])
        size = 224 if size is None else max(2, size // patch) * patch
        options = {"image_size": size}
    model = models.get_model(name, weights=None, **options)
    size = size or (299 if name == "inception_v3" else 224)
    return finish(model, images(3, size, size))
