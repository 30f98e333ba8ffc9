"""Kernels as torch.library custom operators: `torch.ops.graphopt_triton.<name>_<hash>`.

An operator has the region's tensors and sizes as arguments and its outputs as results. Its CUDA
implementation is the kernel; on the CPU, and for the shapes that tracing asks for, it is the region's
own graph of torch ops. Where that graph is differentiable so is the operator: the backward pass runs
the graph again with gradients. So operators compose with torch.compile, torch.export and autograd.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import fx

from graphopt.backends.triton.region import Region

NAMESPACE = "graphopt_triton"


@cache
def _library() -> torch.library.Library:
    return torch.library.Library(NAMESPACE, "FRAGMENT")


_REGISTERED: dict[str, Callable[..., Any]] = {}


def schema_of(region: Region) -> str:
    """(Tensor x0, SymInt n0) -> (Tensor, Tensor)"""
    arguments = [f"Tensor x{k}" for k in range(len(region.inputs))]
    arguments += [f"SymInt n{k}" for k in range(len(region.sizes))]
    return f"({', '.join(arguments)}) -> ({', '.join(['Tensor'] * len(region.outputs))})"


def identity_of(region: Region) -> str:
    """What distinguishes an operator: its source and its meaning."""
    text = f"{region.source}\n{region.reference.code}\n{schema_of(region)}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def operator(region: Region) -> Callable[..., Any]:
    """The region's operator, registered on first use. It returns a tensor, or a tuple of several."""
    name = f"{region.name}_{identity_of(region)}"
    if name not in _REGISTERED:
        _REGISTERED[name] = _registered(region, name)
    return _REGISTERED[name]


def _registered(region: Region, name: str) -> Callable[..., Any]:
    library, reference, launch = _library(), region.reference, region.launcher()
    single = len(region.outputs) == 1
    library.define(f"{name}{schema_of(region)}", tags=(torch.Tag.pt2_compliant_tag,))

    def computed(*arguments: Any) -> Any:
        # Outputs are dense and their own memory, as the kernel's are.
        found = tuple(
            one.clone(memory_format=torch.contiguous_format) for one in reference(*arguments)
        )
        return found[0] if single else found

    def launched(*arguments: Any) -> Any:
        found = launch(*arguments)
        return found[0] if single else found

    library.impl(name, computed, "CPU")
    library.impl(name, launched, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", computed, lib=library)
    if differentiable(region):
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}", _backward(reference), setup_context=_keep, lib=library
        )
    found: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return found


def differentiable(region: Region) -> bool:
    """Whether an output can have a gradient."""
    return any(node.meta["val"].dtype.is_floating_point for node in region.outputs)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*(one for one in inputs if isinstance(one, torch.Tensor)))
    ctx.sizes = [one for one in inputs if not isinstance(one, torch.Tensor)]


def _backward(reference: fx.GraphModule) -> Callable[..., Any]:
    """Gradients of the region's graph, computed again from its inputs; differentiable themselves."""

    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        saved, again = ctx.saved_tensors, torch.is_grad_enabled()
        wanted = [
            one.dtype.is_floating_point and needed
            for one, needed in zip(saved, ctx.needs_input_grad[: len(saved)], strict=True)
        ]
        inputs = saved if again else [
            one.detach().requires_grad_(need) for one, need in zip(saved, wanted, strict=True)
        ]  # fmt: skip
        with torch.enable_grad():
            outputs = reference(*inputs, *ctx.sizes)
        pairs = [
            (out, gradient) for out, gradient in zip(outputs, gradients, strict=True)
            if gradient is not None and out.requires_grad
        ]  # fmt: skip
        leaves = [one for one, need in zip(inputs, wanted, strict=True) if need]
        results: Any = [None] * len(leaves)
        if pairs and leaves:
            results = torch.autograd.grad(
                [out for out, _ in pairs], leaves, [gradient for _, gradient in pairs],
                allow_unused=True, create_graph=again,
            )  # fmt: skip
        found = iter(results)
        return (*(next(found) if need else None for need in wanted), *[None] * len(ctx.sizes))

    return backward
