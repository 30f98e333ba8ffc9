"""One cell: a method on a kind of layer, merged by us and by PEFT."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

import graphopt
from benchmarks.adapters.methods import FLOAT32_INSIDE, LAYERS, Layer, adapted, as_double, ops_of
from graphopt.ir.distance import relative_error


@dataclasses.dataclass
class Cell:
    """Relative errors to the unmerged model in float64; how far a merged bfloat16 weight is from the
    exact one, over the least possible; None where there is none, and `note` says why.

    `merged` is whether the layer is all that is left, of the float32 model if the method computes in
    float32 inside, where a float64 one has to round: its errors count then, up to `limit`.
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
    def limit(self) -> float:
        return FLOAT32_INSIDE.get(self.method, 1e-12)

    @property
    def ours(self) -> float | None:
        return self.ours32 if self.method in FLOAT32_INSIDE else self.ours64

    @property
    def peft(self) -> float | None:
        return self.peft32 if self.method in FLOAT32_INSIDE else self.peft64

    @property
    def right(self) -> bool:
        if self.ours is None or self.ours64 is None:
            return True
        return self.ours64 < 1e-6 and self.ours < max(self.limit, 1e-6)


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
        if bits == (32 if method in FLOAT32_INSIDE else 64):
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
    """The errors of the merged weight of a bfloat16 model, where the exact one has to be rounded."""
    if not cell.merged or what.op == "layer_norm":
        return
    x = what.input()
    try:
        model = adapted(nn.Sequential(what.make(), nn.Tanh()).bfloat16(), ["0"], method)
        if method in FLOAT32_INSIDE:
            exact = graphopt.optimize(copy.deepcopy(model).float(), (x,))
        else:
            exact = graphopt.optimize(as_double(model), (_as_double(x),))
        truth = _weight(exact).double()
        fast = graphopt.optimize(model, (x.bfloat16() if x.is_floating_point() else x,))
        least = (truth.bfloat16().double() - truth).norm()
        if not least:
            return
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


def _as_double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x
