"""Weights and activations in bfloat16, where that is what a model spends its time on.

    f(x)  ->  float32(f(bfloat16(x)))        |difference| / |f(x)| <= budget, measured

Convolutions, linear maps, matrix products and attention read and write bfloat16. What only moves numbers,
and elementwise arithmetic, does so behind them, so that casts stand where such a region begins and ends and
nowhere within. Everything else is float32 as it was: embeddings, root mean square norms, exponentials,
powers, cumulative sums, what is unknown. Softmax, means, pooling and the other norms take bfloat16 and are
float32 inside, their own parameters included, so that they round once, as a cast behind them would.

Weights are the float64 values of their expressions rounded once to bfloat16. Whatever a comparison, a
rounding or a loop over time depends on stays in float32: there a last bit decides. The casts change nothing
over the reals, so that the result is checked in float64 as any other; the contract is `Calibrated` beside.
See docs/precision.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.driver import Session
from graphopt.ir.graph import Graph
from graphopt.ir.source import first_line
from graphopt.passes.base import PassError
from graphopt.passes.precision.measured import Measured, Watching, distance, mixed, outputs
from graphopt.passes.precision.narrowing import Narrowing

DTYPES = {"bf16": torch.bfloat16}
RESIDUAL = ("auto", "bf16", "float32")


@dataclasses.dataclass(frozen=True)
class LowerPrecision(Measured):
    """What takes the time is computed in bfloat16, where the outputs stay within a budget."""

    name = "lower-precision"
    dtype: str = "bf16"
    budget: float = 0.05  # of the error of any output, relative in the 2-norm
    # What sums of two activations are: bf16, float32, or, auto, float32 where a layer norm reads them.
    residual: str = "auto"
    embeddings: bool = False  # whether tables of embeddings are rounded too
    force: bool = False  # also where the processor has no instructions for it

    def __post_init__(self) -> None:
        super().__post_init__()
        for what, known in (("dtype", tuple(DTYPES)), ("residual", RESIDUAL)):
            found = getattr(self, what)
            if found not in known:
                expected = " or ".join(known)
                raise PassError(f"lower-precision: {what} is {found!r}, expected {expected}")

    def run(self, session: Session) -> None:
        graph = session.graph
        if session.applications.exhausted:
            return
        if reason := mixed(graph) or ("" if self.force else unsupported(graph.device)):
            return self.refuse(session, reason)
        inputs, dtype = self.inputs(session), DTYPES[self.dtype]
        watch = _Huge(graph, dtype)
        own = [list(watch.run(one)) for one in inputs]
        found = Narrowing(graph, dtype, self.residual, self.embeddings, watch.huge)
        result = found.result()
        for node, reason in found.refused.items():
            self.refuse(session, reason, node)
        if not found.narrowed:
            return self.refuse(session, "there is nothing to compute in bfloat16")
        truth = [outputs(graph, one, lifted=True) for one in inputs]
        try:
            error = _error((outputs(result, one) for one in inputs), truth)
        except RuntimeError as failure:  # a kernel that a device lacks
            return self.refuse(session, f"the result raises {first_line(failure)}")
        done = (
            f"{found.narrowed} of {found.narrowed + len(found.refused)} maps, {found.casts} casts"
        )
        said = self.said(session, done, error, _error(own, truth))
        if not error <= self.budget:
            return self.refuse(session, f"{said}; the budget is {self.budget:g}", error=error)
        reference = session.source  # as before: over the reals nothing has changed
        if self.commit(session, result, said, error):
            session.source = reference
        return None


class _Huge(Watching):
    """Notes the values that are finite, but not in another dtype."""

    def __init__(self, graph: Graph, dtype: torch.dtype) -> None:
        super().__init__(graph)
        self.largest = torch.finfo(dtype).max
        self.huge: set[fx.Node] = set()

    def see(self, node: fx.Node, value: Tensor) -> None:
        if value.is_floating_point() and node not in self.huge:
            if bool((value.isfinite() & (value.abs() > self.largest)).any()):
                self.huge.add(node)


def _error(found: Iterable[Sequence[Any]], truth: Sequence[Sequence[Any]]) -> float:
    return max(map(distance, found, truth))


def unsupported(device: str) -> str:
    """Why bfloat16 would not be faster on a device; empty if it is."""
    if device == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return "" if fast else "this GPU has no arithmetic in bfloat16"
    if device != "cpu":
        return f"bfloat16 is not known to be faster on {device}"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN does not compute in bfloat16 on this processor"
    x86 = torch.cpu._is_avx2_supported()
    if x86 and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "this processor has no instructions for bfloat16 (avx512_bf16 or amx_bf16)"
    return ""
