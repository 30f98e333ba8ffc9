"""What lower precision is worth: time and error of whole models in float32, bfloat16 and int8, side by side.

    python -m benchmarks.precision --row ResNet-50 --batch 4
    python -m benchmarks.precision --digits            # only the accuracy of a net that is trained

One thread, medians of interleaved rounds; the peer is eager PyTorch, in float32 and of `model.bfloat16()`.
Errors are against the model in float64. Weights are random, norms randomized; the ranges of int8 are fitted
to the inputs that are timed. Trained is a small net on scikit-learn's digits; its accuracy is that on those
which it has not seen.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.utils._pytree as pytree
import typer
from torch import Tensor, nn

import graphopt
from benchmarks.digits import digits
from benchmarks.scoreboard import models
from benchmarks.scoreboard.table import mean, processor
from graphopt.backends.measure import measure
from graphopt.ir.distance import relative_error
from graphopt.passes.quantize import Quantize

RESULTS = Path(__file__).parent / "results"
ROWS = ("ResNet-18", "ResNet-50", "ViT-S", "BERT-base, 128 tokens")  # bound by computing
BATCHES = (1, 4)
PRECISIONS = {"fp32": None, "bf16": "bf16", "int8": "int8"}
LOSSY = ("quantize", "lower-precision")  # passes
BASE = "prepacked fp32"


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    """Floating-point inputs in another dtype."""
    return pytree.tree_map_only(
        Tensor, lambda one: one.to(dtype) if one.is_floating_point() else one, inputs
    )


@torch.no_grad()
def measured(name: str, batch: int, seconds: float) -> dict[str, Any]:
    """Milliseconds and error of every side, and how much of the model is in its precision."""
    model, make = models.build(name)
    args, _ = make(batch)
    truth = pytree.tree_leaves(copy.deepcopy(model).double()(*cast(args, torch.float64)))
    half = copy.deepcopy(model).bfloat16()
    calls: dict[str, Callable[[], Any]] = {
        "eager fp32": partial(model, *args),
        "eager bf16": partial(half, *cast(args, torch.bfloat16)),
    }
    parts = {}
    for precision, asked in PRECISIONS.items():
        fast = graphopt.optimize(model, args, backend="prepacked", precision=asked)
        calls[f"prepacked {precision}"] = partial(fast, *args)
        done = [one.reason for one in fast.report.applied if one.rewrite in LOSSY]
        parts[f"prepacked {precision}"] = "; ".join(done)
    errors = {
        side: relative_error(pytree.tree_leaves(call()), truth) for side, call in calls.items()
    }
    times = measure(calls, seconds, race=False)
    return {
        side: {"ms": 1e3 * times[side].median, "error": errors[side], "parts": parts.get(side, "")}
        for side in calls
    }


# -- accuracy ---------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        wide = 32
        self.stem = nn.Sequential(nn.Conv2d(1, wide, 3, padding=1), nn.BatchNorm2d(wide), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(wide, wide, 3, padding=1), nn.BatchNorm2d(wide), nn.ReLU(),
                nn.Conv2d(wide, wide, 3, padding=1), nn.BatchNorm2d(wide),
            ) for _ in range(2)
        )  # fmt: skip
        self.head = nn.Linear(wide * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(block(x) + x)
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


def accuracies() -> dict[str, Any]:
    """How many digits are right in each precision, and how far the logits are off."""
    x, y, test_x, test_y = digits(test=600)
    torch.manual_seed(0)
    model = Residual()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(12):
        for part in torch.randperm(len(x)).split(64):
            loss = nn.functional.cross_entropy(model(x[part]), y[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    data = [((part,), None) for part in x[:256].split(64)]
    deploy = partial(graphopt.optimize, model, (x[:2],))
    sides = {
        "fp32": deploy(),
        "bf16": deploy(precision="bf16"),
        "int8": deploy(passes=["deploy", Quantize(force=True, data=data)]),
        "int8, biases as they are": deploy(
            passes=["deploy", Quantize(force=True, correct=False, data=data)]
        ),
    }
    with torch.no_grad():
        truth = model.double()(test_x.double())
        found = {side: fast(test_x) for side, fast in sides.items()}
    return {
        side: {
            "right": int((logits.argmax(1) == test_y).sum()), "of": len(test_y),
            "error": relative_error([logits], [truth]),
        } for side, logits in found.items()
    }  # fmt: skip


# -- the tables -------------------------------------------------------------------------------------


def markdown(stored: dict[str, Any]) -> str:
    about, rows = stored["about"], stored["rows"]
    lines = [
        "# Lower precision\n",
        f"{about['machine']}, torch {about['torch']}, one thread. Milliseconds, in brackets how many times "
        f"as fast as {BASE}; errors relative to float64.\n",
    ]
    sides = list(next(iter(rows.values()), ()))
    if sides:
        ours = [one for one in sides if not one.startswith("eager")]
        heads = ["model", *sides, *(f"error {one}" for one in ours), "int8 of it"]
        lines += ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
        for name, row in rows.items():
            base = row[BASE]["ms"]
            times = [f"{row[one]['ms']:.1f} ({base / row[one]['ms']:.2f})" for one in sides]
            errors = [f"{row[one]['error']:.1e}" for one in ours]
            lines.append(
                f"| {' | '.join([name, *times, *errors, row['prepacked int8']['parts']])} |"
            )
        for one in ("prepacked bf16", "prepacked int8"):
            speedup = mean(row[BASE]["ms"] / row[one]["ms"] for row in rows.values())
            lines.append(f"\n{one} over {BASE}, geometric mean: {speedup:.2f}.")
    if "digits" in stored:
        lines += ["\n## Digits\n", "| | right | error of the logits |", "| --- | --- | --- |"]
        lines += [f"| {side} | {one['right']} of {one['of']} | {one['error']:.1e} |"
                  for side, one in stored["digits"].items()]  # fmt: skip
    return "\n".join([*lines, ""])


def main(
    row: Annotated[list[str] | None, typer.Option(help="only rows with this in the name")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="batch sizes")] = None,
    only_digits: Annotated[bool, typer.Option("--digits", help="no whole models")] = False,
    seconds: Annotated[float, typer.Option(help="of timing for a row")] = 30.0,
    out: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS,
) -> None:
    """Measure rows of the scoreboard; store and print the table."""
    torch.set_num_threads(1)
    path = out / "precision.json"
    stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    stored["about"] = {"machine": processor(), "torch": torch.__version__}

    def keep() -> None:
        path.write_text(json.dumps(stored, indent=1) + "\n")
        (out / "precision.md").write_text(markdown(stored))

    for name in () if only_digits else ROWS:
        if row and not any(text in name for text in row):
            continue
        for size in batch or BATCHES:
            found = measured(name, size, seconds)
            stored["rows"][f"{name}, batch {size}"] = found
            print(name, size, found, flush=True)
            keep()
    stored["digits"] = accuracies()
    keep()
    print(markdown(stored))


if __name__ == "__main__":
    typer.run(main)
