"""channel_groups(): which channels of a model have to be removed together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from graphopt.ir.capture import capture
from graphopt.ir.channels import Groups, find_groups
from graphopt.ir.inputs import as_call
from graphopt.ir.source import copy_module


def channel_groups(
    model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None = None,
    *, free: Collection[str] = (),
) -> Groups:  # fmt: skip
    """The channel groups of a model: what is coupled, how large it is, and what is fixed and why.

    Args:
        model: any nn.Module that is captured as one graph; it is not changed.
        args, kwargs: example inputs, as for `graphopt.optimize`. Sizes are those of the example.
        free: "inputs" or "outputs", whose axes are otherwise fixed, but for those that are dynamic.

    Returns:
        `Groups`: `families()` lists the groups of one width together, `fixed()` the axes of parameters
        that keep all entries and why; `drawn()` is a networkx graph, `str()` a summary.

    Raises:
        CaptureError: if the model is not captured as one graph.
        ValueError: if `free` names anything else.
    """
    if unknown := set(free) - {"inputs", "outputs"}:
        raise ValueError(f"free: expected of inputs, outputs; found {', '.join(sorted(unknown))}")
    args, kwargs = as_call(args, kwargs)
    return find_groups(capture(copy_module(model), args, dict(kwargs or {})).graph, free)
