"""Running any module in float64: not its code is changed, but every op that it dispatches to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt.ir.interpret import lift, lift_dtype
from graphopt.ir.source import clone_inputs, first_line, untouched


class Lifted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Ops take and return float64 (complex128) wherever they would take and return less.

    An op without a float64 kernel runs in float32; `notes` says which and why.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.notes: dict[str, str] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = args, kwargs or {}
        wide = pytree.tree_map(_widen, given)
        try:
            found = func(*wide[0], **wide[1])
        except RuntimeError as error:
            narrow = pytree.tree_map(_narrow, given)
            try:
                found = func(*narrow[0], **narrow[1])
            except RuntimeError:
                raise error from None
            self.notes.setdefault(str(func), f"{func} ran in float32: {first_line(error)}")
        found = pytree.tree_map(lift, found)
        self.saw(func, given, found)
        return found

    def starts(self, inputs: list[Any]) -> None:
        """Called with the leaves of the inputs before the first op."""

    def saw(self, func: Any, given: Any, found: Any) -> None:
        """Called after every op with its inputs and its results."""


def _widen(leaf: Any) -> Any:
    return lift_dtype(leaf) if isinstance(leaf, torch.dtype) else lift(leaf)


def _narrow(leaf: Any) -> Any:
    wide = isinstance(leaf, torch.Tensor) and leaf.dtype is torch.float64
    return leaf.float() if wide else leaf


@contextmanager
def eagerly() -> Iterator[None]:
    """Compiled parts run as the eager code they were compiled from."""
    with torch.compiler.set_stance("force_eager"):
        yield


def run_lifted(module: nn.Module, inputs: Any, mode: Lifted) -> Any:
    """What a float64 copy returns for (args, kwargs), computed under `mode`."""
    args, kwargs = pytree.tree_map(lift, clone_inputs(*inputs))
    mode.starts(pytree.tree_leaves((args, kwargs)))
    with untouched(module), eagerly(), mode:
        return module(*args, **kwargs)
