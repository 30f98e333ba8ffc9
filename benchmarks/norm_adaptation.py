"""Batch norm statistics adapted to corrupted digits: accuracy before and after, and what folds.

    python -m benchmarks.norm_adaptation

A small convolutional network with batch norms is trained on clean images of scikit-learn's digits. Frozen
statistics are taken from corrupted training images, without labels, and tested on corrupted test images;
norms that adapt online see the test images once, in batches, shuffled or sorted by class.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import graphopt
from benchmarks.digits import digits

RESULTS = Path(__file__).parent / "results"
FROZEN: dict[str, dict[str, Any]] = {"adabn": {}, "alpha-bn": {"alpha": 0.5}, "adamixbn": {}}
ONLINE: dict[str, tuple[str, dict[str, Any]]] = {
    **{method: (method, options) for method, options in FROZEN.items()},
    "unmix-tns": ("unmix-tns", {"components": 16, "momentum": 0.1}),
    "unmix-tns fast": ("unmix-tns", {"components": 4, "momentum": 0.9}),
}
STREAMS = ("shuffled", "sorted")


def noise(x: Tensor, level: float) -> Tensor:
    generator = torch.Generator().manual_seed(len(x))
    return x + level * torch.randn(x.shape, generator=generator)


def blur(x: Tensor, level: float) -> Tensor:
    """A Gaussian of standard deviation `level` pixels."""
    at = torch.arange(-3, 4.0)
    row = (-at.square() / (2 * level**2)).exp()
    kernel = torch.outer(row, row)
    return F.conv2d(F.pad(x, (3, 3, 3, 3), value=-1), (kernel / kernel.sum())[None, None])


def contrast(x: Tensor, level: float) -> Tensor:
    """`level` of what an image is apart from its mean."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + level * (x - mean)


CORRUPTIONS: dict[str, tuple[Callable[[Tensor, float], Tensor], tuple[float, ...]]] = {
    "noise": (noise, (0.5, 1.0, 1.5)),
    "blur": (blur, (0.7, 1.0, 1.3)),
    "contrast": (contrast, (0.4, 0.2, 0.1)),
}


def network() -> nn.Module:
    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, 16, 1), *block(16, 32, 2), *block(32, 32, 1), *block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: Any, x: Tensor, y: Tensor, batch: int) -> float:
    right = [(model(a).argmax(1) == b).sum() for a, b in zip(x.split(batch), y.split(batch),
             strict=True)]  # fmt: skip
    return 100 * float(sum(right)) / len(x)


def norms_left(model: graphopt.OptimizedModule) -> int:
    assert model.graph_module is not None
    return sum("norm" in str(node.target) for node in model.graph_module.graph.nodes
               if node.op == "call_function")  # fmt: skip


def one_run(seed: int, epochs: int, batch: int) -> list[dict[str, Any]]:
    """Accuracies of one trained network for every corruption, method and stream."""
    x, y, test_x, test_y = digits(seed, test=640)
    x, test_x = 2 * x - 1, 2 * test_x - 1
    torch.manual_seed(seed)
    source = network()
    train(source, x, y, epochs)
    print(f"seed {seed}: {accuracy(source, test_x, test_y, batch):.1f} on clean images", flush=True)
    online: dict[str, Any] = {
        name: graphopt.adapt_norm(source, None, method, online=True, inputs=x[:2], **options)
        for name, (method, options) in ONLINE.items()
    }
    order = {"shuffled": torch.randperm(len(test_x)), "sorted": test_y.argsort(stable=True)}
    rows = []
    images = {"clean": (1, lambda one, _: one, 0.0)} | {
        f"{name} {level}": (severity, corrupt, level)
        for name, (corrupt, levels) in CORRUPTIONS.items()
        for severity, level in enumerate(levels, 1)
    }
    for name, (severity, corrupt, level) in images.items():
        seen, met = corrupt(x, level), corrupt(test_x, level)
        row: dict[str, Any] = {"seed": seed, "corruption": name.split()[0], "severity": severity,
                               "level": level}  # fmt: skip
        row["source"] = accuracy(source, met, test_y, batch)
        row["folded"] = {}
        for method, options in FROZEN.items():
            adapted = graphopt.adapt_norm(source, seen.split(256), method, **options)
            fast = graphopt.optimize(adapted, (met[:2],))
            row[f"{method}, frozen"] = accuracy(adapted, met, test_y, batch)
            row["folded"][method] = {
                "norms": norms_left(fast), "accuracy": accuracy(fast, met, test_y, batch),
                "difference": float((fast(met) - adapted(met)).abs().max()),
            }  # fmt: skip
        for method, model in online.items():
            for stream in STREAMS:
                model.adaptation.reset()
                at = order[stream]
                row[f"{method}, {stream}"] = accuracy(model, met[at], test_y[at], batch)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


# -- tables -----------------------------------------------------------------------------------------

COLUMNS = [
    "source", *(f"{one}, frozen" for one in FROZEN),
    *(f"{one}, {stream}" for stream in STREAMS for one in ONLINE),
]  # fmt: skip


def cell(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ± {spread:.1f}"


def table(text: str, rows: list[dict[str, Any]]) -> str:
    lines = ["# Batch norm statistics adapted to corrupted digits", "", text, ""]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        level = "" if row["corruption"] == "clean" else f" {row['level']}"
        groups.setdefault(row["corruption"] + level, []).append(row)
    seeds = sorted({row["seed"] for row in rows})
    bad = [row for row in rows if row["corruption"] != "clean"]
    means = [  # per seed, over all corruptions
        {name: statistics.mean(row[name] for row in bad if row["seed"] == seed) for name in COLUMNS}
        for seed in seeds
    ]
    groups["mean of corruptions"] = means
    titles = {"frozen": ["source", *FROZEN], "shuffled": ["source", *ONLINE],
              "sorted": ["source", *ONLINE]}  # fmt: skip
    for kind, methods in titles.items():
        what = "Frozen" if kind == "frozen" else f"Online, {kind} stream"
        lines += [f"| {what} | " + " | ".join(methods) + " |", "| --- " * (len(methods) + 1) + "|"]
        for name, found in groups.items():
            keys = [one if one == "source" else f"{one}, {kind}" for one in methods]
            cells = [cell([row[key] for row in found]) for key in keys]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    folded = [(row, method, one) for row in rows for method, one in row["folded"].items()]
    same = sum(one["accuracy"] == row[f"{method}, frozen"] for row, method, one in folded)
    left = sum(one["norms"] for _, _, one in folded)
    error = max(one["difference"] for _, _, one in folded)
    lines.append(
        f"Frozen ones optimized: {len(folded)} models, {left} norms left, the same accuracy in {same}; "
        f"outputs differ by {error:.0e} at most (float32)."
    )
    return "\n".join(lines) + "\n"


TEXT = """A network of 4 convolutions with batch norms, trained for {epochs} epochs on 1157 clean images of
scikit-learn's digits (pixels from -1 to 1); accuracy on 640 test images in percent, mean and standard
deviation over {seeds} seeds. Noise: its standard deviation; blur: that of the Gaussian in pixels; contrast:
the factor. Frozen: statistics of the corrupted training images, no labels. Online: the test images once, in
batches of {batch}, shuffled or sorted by class. alpha-BN has alpha = 0.5; UnMix-TNS 16 components and
momentum 0.1, meant for longer streams; "fast" is 4 components, momentum 0.9, chosen on these images."""


def main(
    seeds: Annotated[int, typer.Option(help="how many")] = 3,
    epochs: Annotated[int, typer.Option(help="of training")] = 15,
    batch: Annotated[int, typer.Option(help="size of test batches")] = 32,
    store: Annotated[bool, typer.Option(help="write the tables")] = True,
) -> None:
    """Train, corrupt, adapt, and write the tables."""
    torch.set_num_threads(1)
    rows = [row for seed in range(seeds) for row in one_run(seed, epochs, batch)]
    text = TEXT.format(epochs=epochs, seeds=seeds, batch=batch)
    print(table(text, rows))
    if store:
        about = {"torch": torch.__version__, "epochs": epochs, "batch": batch}
        stored = json.dumps({"about": about, "rows": rows}, indent=1) + "\n"
        (RESULTS / "norm_adaptation.json").write_text(stored)
        (RESULTS / "norm_adaptation.md").write_text(table(text, rows))


if __name__ == "__main__":
    typer.run(main)
