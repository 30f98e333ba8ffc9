"""What sweeps of the tests run: a small model, metrics, trials that die."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from graphopt.fleet.trials import Result, Trial, failed

Given = tuple[nn.Module, tuple[Tensor]]


def net() -> Given:
    conv = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)
    model = nn.Sequential(*conv, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    return model, (torch.randn(2, 1, 8, 8),)


def slow() -> Given:
    try:
        time.sleep(60)
    except Exception:
        pass
    return net()


def without_inputs() -> nn.Module:
    return nn.Linear(2, 2)


def batches() -> list[tuple[Tensor, None]]:
    return [(torch.randn(2, 1, 8, 8), None)]


@torch.no_grad()
def score(model: nn.Module) -> float:
    """What a data set would tell: the same of the same model."""
    return -float(model(torch.ones(2, 1, 8, 8)).square().sum())


def not_finite(model: nn.Module) -> float:
    return float("nan")


def answer(trial: Trial) -> Result:
    """A result without a model, but for the trials whose options say otherwise.

    `dies`: the first time, or always, with SIGKILL.
    """
    how, folder = trial.options.get("dies"), Path(trial.folder)
    if how is not None:
        with open(folder / f"starts-{trial.key}", "a") as file:
            file.write("x")
        starts = len((folder / f"starts-{trial.key}").read_text())
        if how == "always" or (how == "once" and starts == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exits":
            os._exit(7)
    if trial.options.get("fails"):
        return failed(trial, "as it should")
    ratio = float(trial.options.get("ratio", 0.0))
    told = {"key": trial.key, "trial": vars(trial), "status": "ok", "reason": ""}
    return told | {
        "value": 1.0 - ratio, "relative": 1.0 - ratio / 2, "latency": 1e-3, "parameters": 1000,
        "backend": trial.backend, "took": 0.0,
    }  # fmt: skip


DIES_ONCE = """
import os, signal
from pathlib import Path
from tests.fleet.models import net

def mortal():
    marker = Path(__file__).with_name("marker")
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return net()
"""
