"""Rounding: what the source itself answers to a change in the last bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from benchmarks.fuzz.observe import distance, put_back
from benchmarks.fuzz.row import Wrong

NUDGE, NOISE_FACTOR = 1e-15, 10


def nudged(value: Any) -> Any:
    """Floating tensors changed by 1e-15, relative, up or down at random."""

    def nudge(one: Tensor) -> Tensor:
        if not one.is_floating_point():
            return one
        signs = 2 * torch.randint(0, 2, one.shape, dtype=one.dtype) - 1
        return one * (1 + NUDGE * signs)

    return pytree.tree_map_only(torch.Tensor, nudge, value)


def noise_of(module: nn.Module, run: Callable[[], list[Any]], truth: list[Any]) -> float:
    """How far the source itself moves when its weights, (by `run`) its inputs and what its modules
    compute do: where maxima are tied, a gradient goes one way or the other."""
    hooks = [
        one.register_forward_hook(lambda _, inputs, output: nudged(output))
        for one in module.modules()
        if not list(one.children())
    ]
    try:
        return _moved(module, run, truth)
    finally:
        for hook in hooks:
            hook.remove()


def _moved(module: nn.Module, run: Callable[[], list[Any]], truth: list[Any]) -> float:
    worst = 0.0
    with torch.random.fork_rng(devices=[]):
        for seed in range(3):
            torch.manual_seed(seed)
            with put_back(module):
                with torch.no_grad():
                    for state in [*module.parameters(), *module.buffers()]:
                        state.copy_(nudged(state))
                try:
                    worst = max(worst, distance(run(), truth, "nudged"))
                except Wrong:
                    return math.inf
    return worst
