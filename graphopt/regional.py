"""Regional capture: the largest submodules that capture are optimized in place, the rest stays
eager, as torch.compile does with graph breaks."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from graphopt.ir.contracts import METRIC
from graphopt.ir.distance import relative_error
from graphopt.ir.driver import Record
from graphopt.ir.inputs import Call, as_call
from graphopt.ir.source import CaptureError, clone_inputs, copy_module, first_line, untouched
from graphopt.module import OptimizedModule
from graphopt.passes.base import Data
from graphopt.report import Report

Seen = Callable[[Data], Data]  # from calls of the model to those of a region
Optimizer = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Seen], OptimizedModule]


def optimize_regions(
    source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], why: CaptureError,
    optimizer: Optimizer, report: Report, check: bool = True,
) -> OptimizedModule:  # fmt: skip
    """Optimize what can be captured inside `source`; `why` says why the whole cannot. With
    `check`, regions that change what the model computes are not used."""
    report.backend = "eager"
    report.capture.left_out[""] = _short(why)
    expected, calls = _watch(source, args, kwargs)
    shell = copy_module(source)
    for path, module in _regions(source, calls, report, optimizer):
        replace(shell, path, module)
    report.capture.left_out = dict(sorted(report.capture.left_out.items()))
    allowed = max(map(_allowed, report.regions.values()), default=0.0)
    problem = _difference(shell, args, kwargs, expected, allowed) if check else ""
    if problem:
        report.capture.notes.append(f"no region was used: {problem}")
        report.regions = {}
        shell = copy_module(source)
    report.refused += list(_eager_norms(shell))
    for path, region in report.regions.items():
        _add_up(report, path, region)
    report.backend_notes += _backends(report)
    return OptimizedModule(shell, None, report)


def _allowed(region: Report) -> float:
    """The relative error that what was applied to a region may have by its contract."""
    lossy = (one for one in region.applied if one.contract.startswith(f"Calibrated({METRIC}"))
    return max((one.bound for one in lossy), default=0.0)


def _eager_norms(shell: nn.Module, path: str = "") -> Iterator[Record]:
    """Batch norms outside every region, as refusals."""
    for name, child in shell.named_children():
        below = f"{path}.{name}".lstrip(".")
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            reason = "it is in a part of the model that was not captured"
            yield Record("fold-batch-norm", below, "Algebraic", reason)
        elif not isinstance(child, OptimizedModule):
            yield from _eager_norms(child, below)


def _add_up(report: Report, path: str, region: Report) -> None:
    """Enter what happened in a region into the report of the whole."""

    def below(name: str) -> str:
        return f"{path}.{name}".rstrip(".")

    for name in ("applied", "refused", "rolled_back", "ops_before", "ops_after"):
        getattr(report, name).extend(
            dataclasses.replace(one, where=below(one.where), origins=tuple(map(below, one.origins)))
            for one in getattr(region, name)
        )
    for name in ("before", "after"):
        mine, theirs = getattr(report, name), getattr(region, name)
        setattr(report, name, theirs if mine is None else mine + theirs)
    seconds = dict(report.passes)
    for name, spent in region.passes:
        seconds[name] = seconds.get(name, 0.0) + spent
    report.passes = list(seconds.items())
    report.validation_seconds += region.validation_seconds


def _backends(report: Report) -> list[str]:
    """What the regions run on, where that is not eager; their own reports say more."""
    count = Counter(region.backend for region in report.regions.values())
    whole = len(report.regions)
    return [
        f"{name}: runs {number} of {whole} regions; what was not captured runs eager"
        for name, number in count.items() if name != "eager"
    ]  # fmt: skip


def _watch(
    source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Any], dict[nn.Module, Any]]:
    """The model's outputs, and the first inputs that each submodule was called with."""
    calls: dict[nn.Module, Any] = {}

    def note(module: nn.Module, a: tuple[Any, ...], k: dict[str, Any]) -> None:
        if module not in calls:
            calls[module] = clone_inputs(a, k)

    handles = [
        one.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
        for one in source.modules()
        if one is not source
    ]
    try:
        inputs = clone_inputs(args, kwargs)
        with untouched(source):
            outputs = pytree.tree_leaves(source(*inputs[0], **inputs[1]))
    finally:
        for handle in handles:
            handle.remove()
    return outputs, calls


def _regions(
    source: nn.Module, calls: dict[nn.Module, Any], report: Report, optimizer: Optimizer
) -> Iterator[tuple[str, OptimizedModule]]:
    """The largest submodules that capture, with their paths; shared modules at every path."""
    made: dict[nn.Module, OptimizedModule | None] = {}
    stack = [(name, child) for name, child in source.named_children()][::-1]
    while stack:
        path, module = stack.pop()
        children = [(f"{path}.{name}", child) for name, child in module.named_children()]
        if module not in made:
            made[module] = None
            if module in calls and _worth_a_region(module):
                try:
                    seen = partial(_calls_within, source, module)
                    args, kwargs = calls[module]
                    made[module] = optimizer(copy_module(module), args, kwargs, seen)
                except CaptureError as error:
                    report.capture.left_out[path] = _short(error)
                else:
                    report.regions[path] = made[module].report  # type: ignore[union-attr]
        region = made[module]
        if region is None:
            stack += children[::-1]
        else:
            yield path, region


def _calls_within(source: nn.Module, module: nn.Module, data: Data) -> Data:
    """What a module inside `source` is called with where that is called with `data`; targets are not kept."""
    found: list[tuple[Call, None]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        own = clone_inputs(args, kwargs)
        found.append((Call(own[0], own[1]), None))

    handle = module.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
    try:
        with untouched(source):
            for inputs, _ in data:
                args, kwargs = as_call(inputs, None)
                source(*args or (), **kwargs or {})
    finally:
        handle.remove()
    return found


def _worth_a_region(module: nn.Module) -> bool:
    """Containers of other modules, and leaves that are not torch's own single ops."""
    own = type(module).__module__.startswith("torch.nn.")
    return any(True for _ in module.children()) or not own


def replace(shell: nn.Module, path: str, region: OptimizedModule) -> None:
    """Put a region in place of the module at `path`, which serves inputs of other shapes."""
    parent_path, _, name = path.rpartition(".")
    parent = shell.get_submodule(parent_path)
    original = parent._modules[name]
    if region._fallback is None:
        region.__dict__["_fallback"] = original
        assert original is not None
        _share(region, original)
    parent._modules[name] = region


def _share(region: OptimizedModule, original: nn.Module) -> None:
    """Let the eager stand-in use the region's own parameters where values are the same, so that
    training either trains both."""
    for name, parameter in list(original.named_parameters(remove_duplicate=False)):
        try:
            mine = region.get_parameter(name)
        except AttributeError:
            continue
        if mine.shape == parameter.shape and torch.equal(mine, parameter):
            owner_path, _, field = name.rpartition(".")
            original.get_submodule(owner_path)._parameters[field] = mine


def _difference(
    shell: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], expected: list[Any],
    allowed: float,
) -> str:  # fmt: skip
    """Why the module with its regions is not the source, up to a relative error; empty if it is."""
    inputs = clone_inputs(args, kwargs)
    try:
        with untouched(shell):
            found = pytree.tree_leaves(shell(*inputs[0], **inputs[1]))
    except Exception as failure:
        return f"the model with regions raises {first_line(failure)}"
    if len(found) != len(expected):
        return "the model with regions returns another structure"
    error = relative_error(found, expected)
    floating = [one.dtype for one in expected
                if isinstance(one, torch.Tensor) and one.is_floating_point()]  # fmt: skip
    limit = 1e4 * max((torch.finfo(dtype).eps for dtype in floating), default=0.0)
    if error <= max(limit, allowed):
        return ""
    return f"the model with regions is off by {error:.1e}" + (
        f", allowed {allowed:g}" if allowed else ""
    )


def _short(error: CaptureError) -> str:
    return "; ".join(f"{rung}: {reason}" for rung, reason in error.attempts.items())
