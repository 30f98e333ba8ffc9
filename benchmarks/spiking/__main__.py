"""The command line: `python -m benchmarks.spiking`; what is stored is not measured again."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from benchmarks.spiking import exact, gpu, library_fold, speed, streaming, zoo
from benchmarks.spiking.table import markdown
from benchmarks.spiking.train import encode, upsampled

RESULTS = Path(__file__).parents[1] / "results"
PARTS = ("exact", "library", "nets", "speed", "streaming", "gpu")
EXACT = ("MPBN ResNet-20", "MPBN ResNet-20, soft reset")
LIBRARY = ("SpikingJelly MPBN", "SpikingJelly MPBN, soft reset")
SPEED = (
    ("MPBN ResNet-20", 4, 1), ("MPBN ResNet-20", 4, 16), ("MPBN ResNet-20", 16, 1),
    ("MPBN ResNet-20", 16, 16), ("MPBN VGG by steps", 4, 1), ("MPBN VGG by steps", 4, 16),
    ("MPBN VGG by steps", 16, 1), ("MPBN VGG by steps", 16, 16), ("SpikingJelly LIF", 16, 16),
)  # fmt: skip


def main(
    part: Annotated[
        list[str] | None, typer.Option(help=f"of {', '.join(PARTS)}; repeatable")
    ] = None,
    net: Annotated[list[str] | None, typer.Option(help="only nets with this in their name")] = None,
    samples: Annotated[int, typer.Option(help="of the part `exact`")] = 10_000,
    rounds: Annotated[float, typer.Option(help="seconds of timing for a row of `speed`")] = 8.0,
    passes: Annotated[str | None, typer.Option(help="pipeline in place of the preset")] = None,
    again: Annotated[bool, typer.Option(help="measure what is stored too")] = False,
    out: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS,
) -> None:
    """Measure every row that is not stored, store it, and print the tables."""
    if unknown := set(part or ()) - set(PARTS):
        raise typer.BadParameter(f"unknown {sorted(unknown)}; expected of {', '.join(PARTS)}")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    path = out / "spiking.json"
    rows: dict[str, dict[str, Any]] = {one: {} for one in PARTS}
    if path.exists():
        rows.update(json.loads(path.read_text())["rows"])
    for which in part or PARTS:
        for key, measure in planned(which, samples, rounds, passes):
            if (net and not any(one in key for one in net)) or (key in rows[which] and not again):
                continue
            found = measure()
            if found is None:
                continue
            rows[which][key] = found
            print(which, key, json.dumps(found), flush=True)
            data = {"about": about(), "rows": rows}
            out.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(data, indent=1) + "\n")
            (out / "spiking.md").write_text(markdown(data))
    if path.exists():
        print((out / "spiking.md").read_text())


def planned(
    part: str, samples: int, rounds: float, passes: str | None
) -> Iterator[tuple[str, Any]]:
    """The keys of a part's rows, each with what measures it."""
    data = upsampled()

    def trained(name: str, steps: int = 4) -> nn.Module:
        return zoo.NETS[name].trained(name, data, steps)

    if part == "exact":
        for name in EXACT:
            yield name, lambda name=name: _plain(exact.measure(name, trained(name), data, samples))
    elif part == "library":
        for name in LIBRARY:
            yield (
                name,
                lambda name=name: [
                    _plain(one) for one in library_fold.measure(name, trained(name), data)
                ],
            )
    elif part == "nets":
        for name in zoo.NETS:
            yield name, lambda name=name: _plain(zoo.measure(name, data))
    elif part == "speed":
        for name, steps, batch in SPEED:
            ways = speed.WAYS if (steps, batch) == (16, 16) else speed.FEW

            def measured(
                name: str = name, steps: int = steps, batch: int = batch, ways: Any = ways
            ) -> Any:
                net = zoo.NETS[name]
                torch.manual_seed(0)
                model = net.make(steps=steps).eval()
                generator = torch.Generator().manual_seed(1)
                x = encode(data.test_x[:batch], net.encoding, steps, generator)
                return _plain(speed.measure(name, model, x, steps, rounds, ways, passes))

            yield f"{name}, T={steps}, batch {batch}", measured
    elif part == "streaming":
        yield from streaming.planned(data, passes)
    elif torch.cuda.is_available():
        yield from gpu.planned(rounds)


def about() -> dict[str, Any]:
    names = ("torch", "spikingjelly", "snntorch")
    return {
        **{name: importlib.metadata.version(name) for name in names},
        "machine": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def _plain(row: Any) -> Any:
    return dataclasses.asdict(row)


if __name__ == "__main__":
    typer.run(main)
