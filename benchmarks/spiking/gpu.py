"""On a GPU: nets of SpikingJelly's, whose neurons run there as one fused kernel, beside ours.

SpikingJelly 2.0 chooses the implementation of a neuron in multi-step mode by itself; which one it chose is
in the row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from spikingjelly.activation_based import functional

from benchmarks.spiking import speed, zoo
from benchmarks.spiking.train import upsampled

ROWS = (("SpikingJelly LIF", "lif"), ("SpikingJelly PLIF", "plif"),
        ("SpikingJelly spiking ResNet", "lif"))  # fmt: skip


def planned(rounds: float) -> Iterator[tuple[str, Any]]:
    """Rows for T = 4 and 16 and batches of 16 and 256."""
    for name, kind in ROWS:
        for steps in (4, 16):
            for batch in (16, 256):

                def measured(
                    name: str = name, kind: str = kind, steps: int = steps, batch: int = batch
                ) -> Any:
                    torch.manual_seed(0)
                    model = zoo.NETS[name].make(steps=steps).eval().cuda()
                    x = upsampled().test_x[:batch].cuda()
                    ways = ("eager", "compiled", "ours eager", "ours inductor", "ours triton")
                    row = dataclasses.asdict(speed.measure(name, model, x, steps, rounds, ways))
                    chosen: Any = functional.neuron_implementation(kind, x.device)
                    return {**row, "implementation": chosen["implementation"]}

                yield f"{name}, T={steps}, batch {batch}", measured
