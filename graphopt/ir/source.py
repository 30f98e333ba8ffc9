"""The user's module: copied, run on the example inputs, and left as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.overrides import TorchFunctionMode

from graphopt.ir.process import seeded


class CaptureError(RuntimeError):
    """No rung of the ladder captured the module; `attempts` maps each rung to its reason."""

    def __init__(self, name: str, attempts: dict[str, str]) -> None:
        lines = [f"cannot capture {name} as one graph:"]
        lines += [f"  {rung}: {reason}" for rung, reason in attempts.items()]
        super().__init__("\n".join(lines))
        self.attempts = attempts


def copy_module(model: nn.Module) -> nn.Module:
    """An independent copy of a module: capture and optimization work on it, never on the user's.

    Tensors that are results of a computation are detached in it, wherever the module keeps them: what
    a hook computes anew on every call (torch.nn.utils.weight_norm), states that the last run left.

    Raises:
        CaptureError: if the module cannot be deep-copied.
    """
    try:
        with _LeavesCopied():
            return copy.deepcopy(model)
    except Exception as error:
        reason = f"the module cannot be deep-copied: {first_line(error)}"
        raise CaptureError(type(model).__name__, {"copy": reason}) from error


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


class _LeavesCopied(TorchFunctionMode):
    """Deep copies of tensors that have a history are those of the detached tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.detached: list[torch.Tensor] = []  # a deep copy goes by `id`, so they have to last

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__ and not args[0].is_leaf:
            self.detached.append(args[0].detach())
            args = (self.detached[-1], *args[1:])
        return func(*args, **(kwargs or {}))


def source_notes(model: nn.Module) -> list[str]:
    """What capture bakes into the graph and the user may want to know."""
    notes = []
    for name, module in model.named_modules():
        label = name or type(model).__name__
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        if hooks:
            notes.append(
                f"{label}: {hooks} forward hook(s) captured; what they compute is in the graph, "
                "other side effects are not"
            )
        if module._backward_hooks or module._backward_pre_hooks:
            notes.append(f"{label}: backward hooks do not run in the optimized model")
        if "parametrizations" in module._modules:
            weights = ", ".join(module._modules["parametrizations"]._modules)  # type: ignore[union-attr]
            notes.append(f"{label}: parametrized {weights} captured as computed from its sources")
    return notes


def clone_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return pytree.tree_map(
        lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf,
        (tuple(args), dict(kwargs)),
    )


@contextmanager
def restored(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Fix the seed; afterwards put the module's buffers and the random state back."""
    kept = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with seeded(seed):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in kept:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)


@contextmanager
def untouched(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """`restored`, without gradients: for running a module on example inputs."""
    with restored(model, seed), torch.no_grad():
        yield


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Put back what the modules had for attributes: a trace may leave its stand-ins for tensors there.

    For traces only: what a run for real sets up, a lazy module or a cache, stays.
    """
    attributes = [(vars(one), _contents(one)) for one in model.modules()]
    try:
        yield
    finally:
        for now, before in attributes:
            _put_back(now, before)


def _contents(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module; of parameters, buffers and children, who they are."""
    return {name: dict(value) if isinstance(value, dict) else value
            for name, value in vars(module).items()}  # fmt: skip


def _put_back(now: dict[str, Any], before: dict[str, Any]) -> None:
    for name in set(now) - set(before):
        del now[name]
    for name, value in before.items():
        found = now.get(name)
        if isinstance(value, dict) and isinstance(found, dict):
            found.clear()
            found.update(value)
        elif found is not value:
            now[name] = value


def reference_run(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Any], bool]:
    """The leaves of the module's output, and whether two runs agree bit for bit.

    A buffer that both runs replaced by another tensor is put back: it is a state, of the size of the
    inputs. What the first run alone set up, a lazy module or a cache, stays.
    """
    results = []
    tables = [module._buffers for module in model.modules()]
    held = [[dict(one) for one in tables]]
    for _ in range(2):
        inputs = clone_inputs(args, kwargs)
        with untouched(model):
            results.append(pytree.tree_leaves(model(*inputs[0], **inputs[1])))
        held.append([dict(one) for one in tables])
    for now, *versions in zip(tables, *held, strict=True):
        start, once, twice = versions
        for name in start.keys() & once.keys() & twice.keys():
            if start[name] is not once[name] and once[name] is not twice[name]:
                now[name] = start[name]
    same = len(results[0]) == len(results[1]) and all(map(_identical, *results))
    return results[0], same


def _identical(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return (
            a.shape == b.shape
            and a.dtype == b.dtype
            and torch.equal(
                torch.nan_to_num(a) if a.is_floating_point() else a,
                torch.nan_to_num(b) if b.is_floating_point() else b,
            )
        )
    return True
