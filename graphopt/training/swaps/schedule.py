"""The schedule of a swap, driven by the forward calls of training, and its report."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt.ir.driver import Record


@dataclasses.dataclass
class SwapReport:
    """What was swapped and what was not. Records have `rewrite`, `where` (module path in the source
    model), `node` and `reason`."""

    swapped: list[Record] = dataclasses.field(default_factory=list)
    refused: list[Record] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        def listed(records: list[Record]) -> list[str]:
            return [
                f"    {one.rewrite} at {one.where or one.node}"
                + (f": {one.reason}" if one.reason else "")
                for one in records
            ]

        return "\n".join([
            f"  swapped    {len(self.swapped)}", *listed(self.swapped),
            f"  refused    {len(self.refused)}", *listed(self.refused),
            *(f"  note       {note}" for note in self.notes),
        ])  # fmt: skip


class Swaps(nn.Module):
    """Counts the forward calls of training and says what share of the old modules is left.

    For `warm` calls all of it, 1; then `1 - k / steps` at call number `warm + 1 + k`, down to 0, where
    it stays (SLAB, arXiv 2405.11582). In eval mode it is that of the last training call, so that the
    model that is evaluated is the one that is trained; with `eval_new` it is 0, as in SLAB's code.

    Attributes:
        calls: the number of training calls so far, a buffer: the schedule goes on where a state dict
            was saved.
        report: what was swapped, what was refused and why.
    """

    calls: Tensor

    def __init__(self, warm: int, steps: int, eval_new: bool, report: SwapReport) -> None:
        super().__init__()
        self.warm, self.steps, self.eval_new, self.report = warm, steps, eval_new, report
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self._done = 0  # `calls` as a number, which needs no wait for a device

    @property
    def share(self) -> float:
        """The share of the old modules at the last training call, from 1 to 0."""
        late = self._done - self.warm
        if late <= 0:
            return 1.0
        return max(0.0, 1 - (late - 1) / self.steps) if self.steps else 0.0

    @property
    def finished(self) -> bool:
        """Whether only the new modules are left."""
        return self.share == 0

    def forward(self) -> float:
        if self.training:
            return float(self._next())
        return 0.0 if self.eval_new else self.share

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _next(self) -> float:
        self._done += 1
        self.calls.fill_(self._done)
        return self.share

    def train(self, mode: bool = True) -> Swaps:
        self._read()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._read()

    def _read(self) -> None:
        self._done = int(self.calls)


class Progressive(nn.Module):
    """`share * old(...) + (1 - share) * new(...)`.

    `old` is the piece of the source's graph that is replaced, without parameters of its own; `new` takes
    some of its operands, those of the numbers `takes`.
    """

    def __init__(self, old: fx.GraphModule, new: nn.Module, takes: tuple[int, ...]) -> None:
        super().__init__()
        self.old, self.new, self.takes = old, new, takes

    def forward(self, share: float, *operands: Any) -> Tensor:
        if share == 1:
            return self.old(*operands)  # type: ignore[no-any-return]
        new: Tensor = self.new(share, *(operands[i] for i in self.takes))
        if share == 0:
            return new
        old: Tensor = self.old(*operands)
        return share * old + (1 - share) * new


class BatchNorm(nn.Module):
    """A batch norm of the source model, in its mode; its parameters and statistics are operands."""

    def __init__(self, momentum: float, eps: float) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor
    ) -> Tensor:
        return nn.functional.batch_norm(
            x, mean, var, weight, bias, self.training, self.momentum, self.eps
        )
