"""One of two modules that are compared: the inputs it declares, and its runs on copies of itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from graphopt.ir.capture import capture
from graphopt.ir.graph import Graph
from graphopt.ir.inputs import as_call, declared_inputs
from graphopt.ir.interpret import Interpreter, lift
from graphopt.ir.source import CaptureError, clone_inputs, copy_module, first_line, untouched
from graphopt.verify.lifted import Lifted, run_lifted


class VerifyError(ValueError):
    """Two modules that cannot be compared; the message names both."""


class Side:
    """A module in its role, `source` or `optimized`; it is never changed.

    `notes` collects what the user should know about its runs.
    """

    def __init__(self, role: str, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"{role}: expected an nn.Module, found {type(module).__name__}")
        self.role = role
        self.module = module
        self.name = f"{role} {type(module).__name__}"
        self.notes: dict[str, str] = {}
        self._graph: Graph | None = None

    def copy(self) -> nn.Module:
        try:
            return copy_module(self.module)
        except CaptureError as error:
            raise VerifyError(f"{self.name}: {next(iter(error.attempts.values()))}") from error

    def run(self, inputs: Any) -> Any:
        """The outputs for (args, kwargs) in the module's own dtype."""
        module = self.copy()
        args, kwargs = clone_inputs(*inputs)
        with untouched(module):
            return module(*args, **kwargs)

    @torch.no_grad()
    def run_lifted(self, inputs: Any, unit: float = 0.0) -> list[Any]:
        """The leaves of the outputs in float64, every state rounded to `unit` at random.

        Code that insists on another dtype cannot run; its captured graph can.
        """
        if self._graph is None:
            module, mode = self.copy().double(), Lifted()
            round_all((*module.parameters(), *module.buffers()), unit)
            try:
                found = pytree.tree_leaves(run_lifted(module, inputs, mode))
                self.notes |= mode.notes
                return found
            except Exception as error:
                try:
                    self._graph = capture(self.copy(), *inputs).graph
                except CaptureError:
                    raise error from None
                self.notes[self.name] = (
                    f"{self.name} does not run in float64, its captured graph does: "
                    f"{first_line(error)}"
                )
        graph = self._graph.clone()
        for state in graph.states.values():
            exact = lift(state.tensor.detach().clone())
            round_all([exact], unit)
            state.exact = partial(torch.Tensor.detach, exact)
        leaves = pytree.tree_leaves(clone_inputs(*inputs))
        return list(Interpreter(graph, lifted=True, writes=False).run(leaves))


def find_inputs(
    sides: Sequence[Side], inputs: Any = None, kwargs: Mapping[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Those given, else those that a side declares or was captured with.

    Raises:
        VerifyError: if there are none.
    """
    args, kwargs = as_call(inputs, kwargs)
    for side in sides:
        if args is None:
            args, kwargs = declared_inputs(side.module)
        captured = getattr(side.module, "example_inputs", None)
        if args is None and callable(captured):
            try:
                args, kwargs = captured()
            except RuntimeError:  # captured by region, or not yet
                continue
    if args is None:
        raise VerifyError(
            f"no example inputs are declared by {' or '.join(one.name for one in sides)}; "
            "pass inputs"
        )
    return args, dict(kwargs or {})


# -- weights of one's own -----------------------------------------------------------------------


def own_rounding(source: nn.Module, optimized: nn.Module) -> float:
    """The unit roundoff of the coarsest floating state that only one of two modules has; 0 if they
    hold the same values."""
    left, right = dict(_states(source)), dict(_states(optimized))
    apart = left.keys() ^ right.keys()
    return max((torch.finfo({**left, **right}[key]).eps / 2 for key in apart), default=0.0)


def _states(module: nn.Module) -> Iterator[tuple[Any, torch.dtype]]:
    """What identifies the value of a floating state, and its dtype."""
    for one in (*module.parameters(), *module.buffers()):
        if one.is_floating_point():
            wide = one.detach().double()
            yield (one.dtype, one.numel(), float(wide.sum()), float(wide.norm())), one.dtype


def round_all(states: Iterable[torch.Tensor], unit: float) -> None:
    """Multiply every element of every floating state by 1 + unit or 1 - unit, at random."""
    generator = torch.Generator().manual_seed(0)
    for one in states:
        if unit > 0 and one.is_floating_point():
            signs = 2 * torch.randint(0, 2, one.shape, generator=generator) - 1
            one.mul_(1 + unit * signs.to(one))
