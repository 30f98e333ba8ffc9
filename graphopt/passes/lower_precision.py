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
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.contracts import Calibrated
from graphopt.ir.driver import Record, Session, Verdict
from graphopt.ir.graph import Graph
from graphopt.ir.interpret import Interpreter, lift
from graphopt.passes.base import Pass, PassError
from graphopt.passes.precision.narrowing import WIDE, Narrowing, tensors_of
from graphopt.passes.pruning.evidence import EvidenceError, batches, example

METRIC = "relative error"
DTYPES = {"bf16": torch.bfloat16}
RESIDUAL = ("auto", "bf16", "float32")


@dataclasses.dataclass(frozen=True)
class LowerPrecision(Pass):
    """What takes the time is computed in bfloat16, where the outputs stay within a budget."""

    name = "lower-precision"
    dtype: str = "bf16"
    budget: float = 0.05  # of the error of any output, relative in the 2-norm
    # What sums of two activations are: bf16, float32, or, auto, float32 where a layer norm reads them.
    residual: str = "auto"
    embeddings: bool = False  # whether tables of embeddings are rounded too
    force: bool = False  # also where the processor has no instructions for it
    data: Sequence[tuple[Any, Any]] = dataclasses.field(default=(), repr=False)  # (inputs, target)

    def __post_init__(self) -> None:
        for what, known in (("dtype", tuple(DTYPES)), ("residual", RESIDUAL)):
            found = getattr(self, what)
            if found not in known:
                expected = " or ".join(known)
                raise PassError(f"lower-precision: {what} is {found!r}, expected {expected}")
        if not self.budget >= 0:
            raise PassError(f"lower-precision: budget is {self.budget}, expected at least 0")

    def run(self, session: Session) -> None:
        graph, contract = session.graph, Calibrated(METRIC, self.budget)
        if session.applications.exhausted:
            return

        def refuse(reason: str, node: fx.Node, **found: Any) -> None:
            session.refused[self.name, node] = Record(
                self.name, graph.where(node), str(contract), reason, node=node.name,
                stage=session.pass_name, **found,
            )  # fmt: skip

        if reason := self._unfit(graph):
            refuse(reason, graph.output)
            return
        found = Narrowing(graph, DTYPES[self.dtype], self.residual, self.embeddings)
        result = found.result()
        for node, reason in found.refused.items():
            refuse(reason, node)
        if not found.narrowed:
            refuse("there is nothing to compute in bfloat16", graph.output)
            return
        before, error = self._errors(session, result)
        said = (f"{found.narrowed} of {found.narrowed + len(found.refused)} maps, {found.casts} casts; "
                f"error {error:.1e}, in float32 {before:.1e}")  # fmt: skip
        if not error <= self.budget:
            refuse(f"{said}; the budget is {self.budget:g}", graph.output,
                   error=error, bound=self.budget)  # fmt: skip
            return
        reference = session.source  # as before: over the reals nothing has changed
        if session.become(
            self.name, contract, result, lambda _: Verdict(True, error, self.budget), said
        ):
            session.source = reference
            session.applied[-1] = dataclasses.replace(
                session.applied[-1], error=error, bound=self.budget
            )

    def _unfit(self, graph: Graph) -> str:
        """Why a graph is not to be narrowed; empty if it is."""
        return mixed(graph) or ("" if self.force else unsupported(graph.device))

    def _errors(self, session: Session, result: Graph) -> tuple[float, float]:
        """Of the graph and of `result`, both against the graph in float64, the largest over batches."""
        graph = session.graph
        if self.data:
            try:
                inputs = [one for one, _ in batches(graph, self.data, self.name)]
            except EvidenceError as error:
                raise PassError(f"lower-precision: {error}") from error
        else:
            known = getattr(session.validator, "inputs", None)
            inputs = [example(graph) if known is None else list(known)]
        worst = [0.0, 0.0]
        for one in inputs:
            truth = _outputs(graph, one, lifted=True)
            for place, other in enumerate((graph, result)):
                worst[place] = max(worst[place], distance(_outputs(other, one), truth))
        return worst[0], worst[1]


def mixed(graph: Graph) -> str:
    """What a graph computes in beside float32; empty if nothing."""
    dtypes = {
        one.dtype for node in graph.nodes for one in tensors_of(node) if one.is_floating_point()
    }
    other = sorted(str(one).removeprefix("torch.") for one in dtypes - {WIDE})
    return f"the model computes in {', '.join(other)} too, expected float32 alone" if other else ""


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


@torch.no_grad()
def _outputs(graph: Graph, inputs: Sequence[Any], lifted: bool = False) -> list[Any]:
    copies = [one.clone() if isinstance(one, Tensor) else one for one in inputs]
    return list(Interpreter(graph, lifted, writes=False).run(copies))


def distance(found: Sequence[Any], truth: Sequence[Any]) -> float:
    """The largest relative error over floating outputs, in the 2-norm; inf where it is not finite."""
    worst = 0.0
    for a, b in zip(found, truth, strict=True):
        if isinstance(b, Tensor) and b.is_floating_point() and b.numel():
            away = torch.where(lift(a) == b, 0.0, lift(a) - b).norm().item()
            size = torch.where(b.isfinite(), b, 0.0).norm().item()
            relative = away / size if size else (0.0 if away == 0 else math.inf)
            worst = max(worst, relative if math.isfinite(relative) else math.inf)
    return worst
