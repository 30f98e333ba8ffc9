"""The models of the benchmark: how each is built, and how its authors deploy it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from benchmarks.reparam.blocks import BLOCKS, deploy_stack, stack
from benchmarks.reparam.ibn_net import deploy_ibn_net, ibn_net
from benchmarks.reparam.patch_norm import PatchNormViT, deploy_patch_norm_vit
from benchmarks.reparam.timm_deploy import by_timm, fold_layer_scale, standardized_once
from benchmarks.zoo.inputs import MakeInputs, images
from benchmarks.zoo.prepare import finish
from graphopt.ir.distance import relative_error
from graphopt.torchvision_ops import declare_missing_ops


@dataclasses.dataclass(frozen=True)
class Model:
    """`build()` is the training form, and `deploy(model)` makes the published deploy form of it, in
    place if it likes. Images are `size` pixels wide."""

    build: Callable[[], nn.Module]
    deploy: Callable[[nn.Module], nn.Module]
    size: int


@dataclasses.dataclass
class Forms:
    """A model in eval mode, its published deploy form, and inputs by batch size."""

    training: nn.Module
    deploy: nn.Module
    make: MakeInputs

    def images(self, batch: int) -> torch.Tensor:
        image: torch.Tensor = self.make(batch)[0][0]
        return image


def forms(name: str) -> Forms:
    """Both forms of a model, with norms and parameters that hide no error.

    Raises:
        ValueError: if they do not compute the same, but for the float32 that timm deploys in.
    """
    declare_missing_ops()  # timm imports torchvision
    torch.manual_seed(0)
    model = MODELS[name]
    training, make = finish(model.build(), images(3, model.size, model.size))
    double = copy.deepcopy(training).double()
    deploy = model.deploy(copy.deepcopy(double)).double().eval()
    found = Forms(training, deploy, make)
    x = found.images(2)[:, :, :96, :96].double()  # depthwise convolutions in float64 are slow
    with torch.no_grad():
        error = relative_error(deploy(x), double(x))
    if not error <= 1e-6:
        raise ValueError(f"{name}: its deploy form differs from the training form by {error:.1e}")
    found.deploy = deploy.float()
    return found


def from_timm(name: str) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name)
    return model


def timm_model(name: str, size: int = 224, deploy: Callable[..., nn.Module] = by_timm) -> Model:
    return Model(partial(from_timm, name), deploy, size)


MODELS = {
    "repvgg_a0": timm_model("repvgg_a0"),
    "mobileone_s0": timm_model("mobileone_s0"),
    "fastvit_t8": timm_model("fastvit_t8", 256),
    "repvit_m0_9": timm_model("repvit_m0_9"),
    "repghostnet_050": timm_model("repghostnet_050"),
    "nf_resnet26": timm_model("nf_resnet26", deploy=standardized_once),
    "convnext_atto": timm_model("convnext_atto", deploy=fold_layer_scale),
    "PatchNormViT": Model(PatchNormViT, deploy_patch_norm_vit, 64),
    "IBN-Net": Model(ibn_net, deploy_ibn_net, 64),
    **{name: Model(partial(stack, block), partial(deploy_stack, block=block), 64)
       for name, block in BLOCKS.items()},
}  # fmt: skip
