"""One cell: a method on a kind of layer, merged by us and by PEFT."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

import graphopt
from benchmarks.adapters.methods import LAYERS, Layer, adapted, ops_of
from graphopt.verify.model import relative_error


@dataclasses.dataclass
class Cell:
    """Relative errors to the unmerged model in float64; how far a merged bfloat16 weight is from the
    exact one, over the least possible; None where there is none, and `note` says why.

    `merged` is whether the layer is all that is left.
    """

    method: str
    layer: str
    merged: bool = False
    ours64: float | None = None
    ours32: float | None = None
    ours_bf16: float | None = None
    peft64: float | None = None
    peft32: float | None = None
    peft_bf16: float | None = None
    note: str = ""

    @property
    def right(self) -> bool:
        return self.ours64 is None or self.ours64 < 1e-6


def measure(method: str, layer: str) -> Cell:
    cell, what = Cell(method, layer), LAYERS[layer]
    try:
        model = adapted(nn.Sequential(what.make(), nn.Tanh()), ["0"], method)
        with torch.no_grad():
            exact = as_double(model)(_as_double(what.input()))
    except Exception as error:
        cell.note = f"PEFT: {type(error).__name__}: {' '.join(str(error).split())[:80]}"
        return cell
    for bits, change in ((64, as_double), (32, copy.deepcopy)):
        x = _as_double(what.input()) if bits == 64 else what.input()
        fast = graphopt.optimize(change(model), (x,))
        with torch.no_grad():
            setattr(cell, f"ours{bits}", relative_error(fast(x), exact))
        if bits == 64:
            cell.merged = sorted(ops_of(fast)) == sorted([what.op, "tanh", *_pads(layer)])
        try:
            theirs = change(model).merge_and_unload()
            with torch.no_grad():
                setattr(cell, f"peft{bits}", relative_error(theirs(x), exact))
        except Exception as error:
            cell.note = f"PEFT's merge: {type(error).__name__}: {' '.join(str(error).split())[:60]}"
    _bf16(cell, method, what)
    return cell


def _bf16(cell: Cell, method: str, what: Layer) -> None:
    """The errors of the merged weight of a bfloat16 model."""
    if not cell.merged:
        return
    x = what.input()
    try:
        model = adapted(nn.Sequential(what.make(), nn.Tanh()).bfloat16(), ["0"], method)
        truth = _weight(graphopt.optimize(as_double(model), (_as_double(x),)))
        fast = graphopt.optimize(model, (x.bfloat16() if x.is_floating_point() else x,))
        least = (truth.bfloat16().double() - truth).norm()
        if ops_of(fast)[0] in (what.op, "pad") and _weight(fast).dtype == torch.bfloat16:
            cell.ours_bf16 = float((_weight(fast).double() - truth).norm() / least)
        theirs = copy.deepcopy(model).merge_and_unload()[0].weight
        theirs = theirs.T if theirs.shape != truth.shape else theirs
        if type(what.make()).__name__ == "Conv1D":
            theirs = theirs.T
        cell.peft_bf16 = float((theirs.double() - truth).norm() / least)
    except Exception as error:
        cell.note = cell.note or f"bfloat16: {type(error).__name__}: {str(error)[:60]}"


def _weight(model: Any) -> Tensor:
    """The one weight of an optimized model."""
    (found,) = (one for one in model.parameters() if one.ndim > 1)
    return found.detach()  # type: ignore[no-any-return]


def _pads(layer: str) -> list[str]:
    return ["pad"] if layer == "reflecting" else []


def as_double(model: nn.Module) -> Any:
    return copy.deepcopy(model).double()


def _as_double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x
