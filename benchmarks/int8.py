"""What `precision="int8"` is worth: time and error of whole models, and the accuracy of one that is trained.

    python -m benchmarks.int8 ["ResNet-50" ...] [--inductor] [--batch 1 4]
    python -m benchmarks.int8 --digits

Times are the least of some interleaved runs. Weights of the models are random, their norms randomized; ranges
are fitted to the inputs that are timed. The errors are against the model in float64. Trained is a small
network on the digits of scikit-learn, whose accuracy is that on the third of them that it has not seen.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import graphopt
from benchmarks.scoreboard import models
from graphopt.passes.quantize import Quantize

MODELS = ("ResNet-18", "ResNet-50", "BERT-base, 128 tokens")


def timed(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds."""
    best = dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return best


def lifted(inputs: Any) -> Any:
    def lift(one: Any) -> Any:
        return one.double() if isinstance(one, Tensor) and one.is_floating_point() else one

    return pytree.tree_map(lift, inputs)


@torch.no_grad()
def compare(name: str, batch: int, inductor: bool, rounds: int) -> None:
    model, make = models.build(name)
    args, kwargs = make(batch)
    exact = copy.deepcopy(model).double()(*lifted(args), **lifted(kwargs))
    truth = pytree.tree_leaves(exact)[0]
    built = {}
    for precision in (None, "bf16", "int8"):
        for backend in ("prepacked", "inductor") if inductor else ("prepacked",):
            start = time.perf_counter()
            fast = graphopt.optimize(model, args, kwargs, backend=backend, precision=precision)
            fast(*args, **kwargs)
            seconds = time.perf_counter() - start
            built[f"{fast.report.backend} {precision or 'fp32'}"] = fast
            done = [
                one for one in fast.report.applied if one.rewrite in ("quantize", "lower-precision")
            ]
            print(f"  {backend} {precision}: {seconds:.0f} s, {[one.reason for one in done]}")
    runs = {which: lambda fast=fast: fast(*args, **kwargs) for which, fast in built.items()}
    best = timed(runs, rounds)
    for which, fast in built.items():
        found = pytree.tree_leaves(fast(*args, **kwargs))[0].double()
        error = float((found - truth).norm() / truth.norm())
        print(f"{name} | {batch} | {which} | {best[which]:.1f} ms | {error:.1e}", flush=True)


class Digits(nn.Module):
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


def digits() -> None:
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    found = load_digits()
    x = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(found.target)
    order = torch.randperm(len(x))
    train, test = order[: 2 * len(x) // 3], order[2 * len(x) // 3 :]
    model = Digits()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(12):
        for part in train[torch.randperm(len(train))].split(64):
            loss = nn.functional.cross_entropy(model(x[part]), y[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    data = [((x[part],), None) for part in train[:256].split(64)]
    rows = {
        "float32": graphopt.optimize(model, (x[:2],)),
        "int8": graphopt.optimize(model, (x[:2],), passes=["deploy", Quantize(force=True, data=data)]),
        "int8, biases as they are": graphopt.optimize(
            model, (x[:2],), passes=["deploy", Quantize(force=True, correct=False, data=data)]
        ),
    }  # fmt: skip
    with torch.no_grad():
        truth = model(x[test])
        for name, fast in rows.items():
            logits = fast(x[test])
            right = int((logits.argmax(1) == y[test]).sum())
            error = float((logits - truth).norm() / truth.norm())
            print(f"{name}: {right} of {len(test)} right, logits off by {error:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--inductor", action="store_true")
    parser.add_argument("--digits", action="store_true")
    options = parser.parse_args()
    if options.digits:
        return digits()
    for name in options.models:
        for batch in options.batch:
            compare(name, batch, options.inductor, options.rounds)
    return None


if __name__ == "__main__":
    main()
