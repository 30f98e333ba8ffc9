"""Inputs of a model, and its outputs on a copy of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
MakeInputs = Callable[[int], Inputs]  # batch size -> (args, kwargs), fresh on every call


def images(*shape: int) -> MakeInputs:
    draw = torch.Generator().manual_seed(1)
    return lambda batch: ((torch.randn(batch, *shape, generator=draw),), {})


def run(model: nn.Module, inputs: Inputs) -> list[Any]:
    args, kwargs = pytree.tree_map(lambda x: x.clone() if is_tensor(x) else x, inputs)
    return pytree.tree_leaves(model(*args, **kwargs))


def double(inputs: Inputs) -> Inputs:
    return pytree.tree_map(
        lambda x: x.double() if is_tensor(x) and x.is_floating_point() else x, inputs
    )


def is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
