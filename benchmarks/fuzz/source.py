"""The source stays as it was: its values, modes and inputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from benchmarks.fuzz.observe import copied
from benchmarks.fuzz.row import Wrong


def state_of(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    seen: dict[str, Any] = {f"mode of {name}": one.training for name, one in module.named_modules()}
    named = [*module.named_parameters(remove_duplicate=False)]
    named += module.named_buffers(remove_duplicate=False)
    for name, one in named:
        seen[name] = (id(one), one.requires_grad, one.detach().clone())
    for i, one in enumerate(pytree.tree_leaves((args, kwargs))):
        seen[f"input {i}"] = (id(one), None, copied(one))
    return seen


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    if list(before) != list(after):
        raise Wrong("optimize changed the names of the source's states")
    for name, old in before.items():
        new = after[name]
        if isinstance(old, bool):
            same = old == new
        else:
            values = isinstance(old[2], Tensor)
            same = old[:2] == new[:2] and (
                torch.equal(old[2].nan_to_num(), new[2].nan_to_num()) if values else True
            )
        if not same:
            raise Wrong(f"optimize changed {name} of the source")
