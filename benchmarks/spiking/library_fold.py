"""SpikingJelly's own re-parameterization of MPBN beside ours, on the net it is for.

Its neuron overwrites the potential with what the norm makes of it, so that the threshold alone says nothing
about the next step: `re_parameterize_v_threshold` moves the norm into the threshold and keeps the raw
potential, or with `normalize_residual` normalizes it where there was no spike. Ours has to leave the norms
wherever the state is read again, and say so.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from spikingjelly.activation_based import neuron
from torch import nn

import graphopt
from benchmarks.digits import Digits
from benchmarks.spiking.exact import CHUNK, norms, refusals
from benchmarks.spiking.libraries import SPIKES
from benchmarks.spiking.nets import Recorded
from benchmarks.spiking.train import accuracy, many, mix_signs


@dataclasses.dataclass
class LibraryFold:
    """One way to fold one net; spikes are compared with those of the net itself, in float64."""

    net: str
    scales: str  # of the norms of membrane potentials
    way: str
    differ: float = 0.0  # percent of the spikes of all layers
    accuracy: list[float] = dataclasses.field(default_factory=list)  # of the net itself, folded
    norms: str = ""
    refused: dict[str, int] = dataclasses.field(default_factory=dict)


UNROLLED = "canonicalize,drop-gradients,fold-thresholds"  # where refusals have a place
WAYS = ("graphopt", "normalize_residual=False", "normalize_residual=True")


def measure(net: str, model: nn.Module, data: Digits, samples: int = 1000) -> list[LibraryFold]:
    """`model` is trained; it is measured as it is, with positive scales, and with scales of both
    signs and no zeros, which SpikingJelly would divide by."""
    rows = []
    x, y = many(data.test_x, data.test_y, samples)
    for scales in ("as trained", "positive", "both signs"):
        source = copy.deepcopy(model).double()
        if scales == "both signs":
            for one in _nodes(source):
                mix_signs(one.vbn, zeros=0.0)
        with torch.no_grad():
            for one in _nodes(source):
                if scales == "positive":
                    one.vbn.weight.abs_().clamp_(min=0.05)
        for way in WAYS:
            row = LibraryFold(net, scales, way)
            folded: Any
            recorded = Recorded(source, SPIKES)
            if way == "graphopt":
                folded = graphopt.optimize(recorded, (x[:2].double(),))
                row.norms = norms(folded)
                unrolled = graphopt.optimize(recorded, (x[:2].double(),), passes=UNROLLED)
                row.refused = refusals(unrolled, "fold-threshold")
            else:
                folded = Recorded(copy.deepcopy(source), SPIKES)
                for one in _nodes(folded):
                    one.re_parameterize_v_threshold(normalize_residual=way.endswith("True"))
            different = every = 0
            with torch.no_grad():
                for chunk in x.double().split(CHUNK):
                    pairs = zip(recorded(chunk)[1:], folded(chunk)[1:], strict=True)
                    for truth, found in pairs:
                        different += int((truth != found).sum())
                        every += truth.numel()
            row.differ = 100 * different / every

            def logits(x: Any, run: Any = folded) -> Any:
                return run(x)[0]

            row.accuracy = [accuracy(one, x.double(), y) for one in (source, logits)]
            rows.append(row)
    return rows


def _nodes(model: nn.Module) -> list[neuron.MPBNLIFNode]:
    return [one for one in model.modules() if isinstance(one, neuron.MPBNLIFNode)]
