"""Example inputs: those a model declares, how a caller may spell them, and what to check on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

Inputs = tuple[tuple[Any, ...] | None, Mapping[str, Any] | None]


class Call(NamedTuple):
    """Positional and keyword inputs together."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def as_call(args: Any, kwargs: Mapping[str, Any] | None) -> Inputs:
    """(args, kwargs) of a call from a tensor, a tuple of inputs, keyword inputs alone, or a `Call`;
    (None, None) if nothing is given.

    Raises:
        TypeError: if `args` is none of these.
    """
    if isinstance(args, Call):
        return args
    if isinstance(args, torch.Tensor):
        return (args,), kwargs
    if isinstance(args, Mapping) and kwargs is None:
        return (), dict(args)
    if isinstance(args, (tuple, list)):
        return tuple(args), kwargs
    if args is not None:
        raise TypeError(
            f"args: expected a tuple of inputs or a tensor, found {type(args).__name__}"
        )
    return (None, None) if kwargs is None else ((), kwargs)


def declared_inputs(model: nn.Module) -> Inputs:
    """Example inputs that a model itself declares, as (args, kwargs); (None, None) if none."""
    declared = getattr(model, "example_input_array", None)
    if isinstance(declared, torch.Tensor):
        return (declared,), None
    if isinstance(declared, tuple):
        return declared, None
    for found in (declared, _attribute(model, "dummy_inputs")):
        if isinstance(found, Mapping):
            return (), dict(found)
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, Mapping) else None
    if size is not None:
        like = next(model.parameters(), torch.empty(0))
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(1, *size, generator=generator)
        return (image.to(like.device, like.dtype),), None
    return None, None


def _attribute(model: nn.Module, name: str) -> Any:
    """An attribute whose computation may fail (some models declare inputs they cannot take)."""
    try:
        return getattr(model, name, None)
    except Exception:  # a property of a third party: any failure means "not declared"
        return None


def telling(given: Any, generator: torch.Generator) -> Any:
    """An input that shows what a model computes. A blank floating one (zeros, ones) would hide
    every error in a weight: it becomes normal draws."""
    if isinstance(given, torch.Tensor) and given.is_floating_point() and given.numel() > 1:
        if bool((given == given.flatten()[0]).all()):
            return torch.randn(given.shape, generator=generator).to(given)
    return given
