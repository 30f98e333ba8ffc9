"""Gradients of an optimized model against those of its source."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from benchmarks.fuzz.observe import copied, distance, put_back
from benchmarks.fuzz.rounding import NOISE_FACTOR, noise_of, nudged
from benchmarks.fuzz.row import Row, Wrong, place


def gradients(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Tensor]:
    """Of a fixed random functional of the outputs, by parameter name and input; zero for none."""
    leaves, spec = pytree.tree_flatten(copied((args, kwargs)))
    inputs = {
        f"input {i}": one.requires_grad_()
        for i, one in enumerate(leaves)
        if isinstance(one, Tensor) and one.is_floating_point()
    }
    own = [one.clone() if f"input {i}" in inputs else one for i, one in enumerate(leaves)]
    args, kwargs = pytree.tree_unflatten(own, spec)
    generator = torch.Generator().manual_seed(7)
    with put_back(module):
        total = torch.zeros((), dtype=torch.float64)
        for one in pytree.tree_leaves(module(*args, **kwargs)):
            if isinstance(one, Tensor) and one.is_floating_point():
                weights = torch.randn(one.shape, generator=generator, dtype=torch.float64)
                total = total + (one.double() * weights).sum()
        wanted = {**dict(module.named_parameters()), **inputs}
        if not total.requires_grad:
            return {name: torch.zeros_like(one) for name, one in wanted.items()}
        found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return {
        name: torch.zeros_like(one) if gradient is None else gradient
        for (name, one), gradient in zip(wanted.items(), found, strict=True)
    }


def compare_gradients(
    row: Row, module: nn.Module, fast: nn.Module, args: Any, kwargs: Any, limit: float
) -> None:
    try:
        truth = gradients(module, args, kwargs)
    except Exception:  # written in place what the backward pass needs
        row.gradients = "the source has none"
        return
    try:
        found = gradients(fast, args, kwargs)
    except Exception as error:
        raise Wrong(f"the backward pass raises {place(error)}") from error
    # Gradients are compared at the scale of the largest: smaller ones are rounding of zeros.
    floor = max((float(one.abs().max()) for one in truth.values() if one.numel()), default=0.0)
    unit = torch.full((1,), 1e-4 * floor, dtype=torch.float64)

    def beside(gradient: Tensor) -> list[Any]:
        return [torch.cat([gradient.flatten().double(), unit])]

    def nudged_gradient(name: str) -> list[Any]:
        return beside(gradients(module, *nudged((args, kwargs)))[name])

    for name, expected in truth.items():
        if name not in found:
            if bool(expected.any()):
                raise Wrong(f"the parameter {name} is lost, and has a gradient")
            continue
        error = distance(beside(found[name]), beside(expected), f"gradient of {name}")
        if error > limit:
            noise = noise_of(module, functools.partial(nudged_gradient, name), beside(expected))
            row.noise = max(row.noise, noise)
            if error > NOISE_FACTOR * noise:
                raise Wrong(f"gradient of {name} is off by {error:.1e} (noise {noise:.1e})")
    row.gradients = "right"
