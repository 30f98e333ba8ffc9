"""20 configurations on a local Ray cluster, of which workers are killed: `python -m benchmarks.sweep_killed`.

    python -m benchmarks.sweep_killed [--kills 2] [--processes 2]

A residual network trained on scikit-learn's digits is pruned by two importances to five sizes and run by
two backends: `graphopt sweep --ray local` with accuracy as the metric. When the 5th and the 12th trial have
begun, their workers get SIGKILL. All trials must have a result in the end, and a second sweep must run none.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import tempfile
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor, nn

from benchmarks.training_sparsity import accuracy, data, network, train

RESULTS = Path(__file__).parent / "results"
FOLDER = "GRAPHOPT_SWEEP_KILLED"  # in the environment: where the weights are, and who runs
VICTIMS = (5, 12)

CONFIG = """\
[sweep]
metric = "benchmarks.sweep_killed:right"
backends = ["eager", "prepacked"]
processes = {processes}
seconds = 1.0

[[models]]
name = "digits"
source = "benchmarks.sweep_killed:model"

[[pipelines]]
name = "pruned"
passes = "canonicalize,prune{{ratio=$ratio,importance=$importance}},deploy"

[grid]
ratio = [0.1, 0.2, 0.3, 0.4, 0.5]
importance = ["l2", "batch-norm-scale"]
"""


def model() -> tuple[nn.Module, tuple[Tensor]]:
    folder = Path(os.environ[FOLDER])
    (folder / "running" / f"{time.time_ns()}-{os.getpid()}").touch()
    made = network(16, 1)
    made.load_state_dict(torch.load(folder / "digits.pt"))
    return made.eval(), (_data()[2][:32],)


def right(made: nn.Module) -> float:
    """Per cent of the digits held back."""
    return accuracy(made, *_data()[2:])


@cache
def _data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return data(0)


def trained(path: Path) -> None:
    torch.manual_seed(0)
    made = network(16, 1)
    x, y, *_ = _data()
    train(
        made,
        torch.optim.SGD(made.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4),
        x,
        y,
        15,
        64,
    )
    torch.save(made.state_dict(), path)


class Killer(threading.Thread):
    """Sends SIGKILL to the process of the trials that begin as the 5th and the 12th."""

    def __init__(self, folder: Path, kills: int) -> None:
        super().__init__(daemon=True)
        self.folder, self.left = folder, list(VICTIMS[:kills])
        self.killed: list[int] = []

    def run(self) -> None:
        while self.left:
            begun = sorted(one.name for one in self.folder.iterdir())
            if len(begun) >= self.left[0]:
                time.sleep(0.1)  # in the middle of it
                self.killed.append(self.left.pop(0))
                os.kill(int(begun[self.killed[-1] - 1].partition("-")[2]), signal.SIGKILL)
            time.sleep(0.01)


def main(kills: int = 2, processes: int = 2) -> None:
    from rich.console import Console

    from graphopt.fleet.sweeping import sweep

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "running").mkdir()
        os.environ[FOLDER] = place
        trained(folder / "digits.pt")
        (folder / "sweep.toml").write_text(CONFIG.format(processes=processes))
        killer = Killer(folder / "running", kills)
        killer.start()
        start = time.perf_counter()
        found = sweep(folder / "sweep.toml", ray="local")
        seconds = time.perf_counter() - start
        begun = len(list((folder / "running").iterdir()))
        again = sweep(folder / "sweep.toml").run
        if kills == len(VICTIMS):
            shutil.copy(folder / "sweep" / "pareto.png", RESULTS / "sweep.png")
    Console().print(found.table())
    keep = (
        "status",
        "reason",
        "value",
        "latency",
        "source_latency",
        "relative",
        "rounds",
        "parameters",
    )
    rows: list[dict[str, Any]] = [
        {"pipeline": one["trial"]["pipeline"], **one["trial"]["options"], "backend": one["trial"]["backend"],
         **{key: one.get(key) for key in keep}, "front": one["key"] in found.front}
        for one in found.results
    ]  # fmt: skip
    done = len(found.results) - len(found.failed)
    summary = {
        "configurations": len(found.results) - 1, "with a result": done - 1, "trials that began": begun,
        "workers killed": len(killer.killed), "run again by a second sweep": again, "seconds": seconds,
        "processes": processes, "torch": torch.__version__,
        "machine": platform.machine(), "processors": os.cpu_count(), "load average": os.getloadavg()[0],
    }  # fmt: skip
    print(json.dumps(summary, indent=1))
    if kills == len(VICTIMS):
        text = json.dumps({**summary, "trials": rows}, indent=1)
        (RESULTS / "sweep.json").write_text(text + "\n")
        (RESULTS / "sweep.md").write_text(found.markdown() + "\n")
    assert not found.failed and not again and len(killer.killed) == kills
    assert begun == len(found.results) + kills


if __name__ == "__main__":
    typer.run(main)
