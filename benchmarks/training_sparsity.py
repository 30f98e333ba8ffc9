"""Channels trained to zero and removed with no fine-tuning: a small residual network on handwritten digits.

    python -m benchmarks.training_sparsity

For every seed the same network is trained twice on scikit-learn's digits (8x8 images, 1437 to train, 360 to
test) for the same number of steps, with SGD and with DHSPG; then what is zero is removed.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import graphopt
from benchmarks.digits import digits
from graphopt.ir.channels.remove import remove
from graphopt.ir.cost import cost
from graphopt.ir.graph import Graph
from graphopt.ir.interpret import Interpreter
from graphopt.passes.pruning.evidence import Evidence
from graphopt.passes.pruning.zeros import zeros
from graphopt.training import DHSPG, zero_invariant_groups

RESULTS = Path(__file__).parent / "results"


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, as in ResNet-20 (arXiv 1512.03385)."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inside != out:
            conv = nn.Conv2d(inside, out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(y)) + self.shortcut(x)).relu()


def network(width: int, blocks: int) -> nn.Module:
    """Three stages of residual blocks; with three blocks each, ResNet-20."""
    layers: list[nn.Module] = [
        nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
    ]  # fmt: skip
    inside = width
    for stage in range(3):
        for number in range(blocks):
            out = width << stage
            layers.append(Block(inside, out, 2 if stage and not number else 1))
            inside = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 10))


def train(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor, epochs: int, batch: int) -> float:
    """The processor's seconds that training took; the learning rate falls to zero along a cosine."""
    generator = torch.Generator().manual_seed(0)
    steps = epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    start = time.process_time()
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=generator)[: len(x) // batch * batch].split(
            batch
        ):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    return time.process_time() - start


@torch.no_grad()
def accuracy(model: Any, x: Tensor, y: Tensor) -> float:
    return 100 * float((model(x).argmax(1) == y).double().mean())


def without(model: nn.Module, labels: list[int], x: Tensor) -> Graph:
    return remove(graphopt.channel_groups(model, x[:2]), labels)


def right(graph: Graph, x: Tensor, y: Tensor) -> float:
    return accuracy(lambda inputs: Interpreter(graph).run([inputs])[0], x, y)


def smallest(model: nn.Module, x: Tensor, fraction: float) -> list[int]:
    """The groups with the smallest norms, a fraction of every family."""
    groups = zero_invariant_groups(graphopt.channel_groups(model, x[:2]), model)
    norms = groups.norms()
    return [
        groups.labels[one] for family in groups.families
        for one in family[norms[family].argsort()[: int(fraction * len(family))]].tolist()
    ]  # fmt: skip


def one_run(
    seed: int, width: int, blocks: int, epochs: int, batch: int, sparsity: float
) -> dict[str, Any]:
    """Both trainings for one seed."""
    x, y, test_x, test_y = digits(seed)
    x, test_x = x - 0.3, test_x - 0.3
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}

    torch.manual_seed(seed)
    dense = network(width, blocks)
    took = train(dense, torch.optim.SGD(dense.parameters(), **options), x, y, epochs, batch)
    cut = without(dense, smallest(dense, test_x, sparsity), test_x)

    torch.manual_seed(seed)
    model = network(width, blocks)
    groups = graphopt.channel_groups(model.eval(), test_x[:2])
    steps = epochs * (len(x) // batch)
    optimizer = DHSPG(
        groups, model, target_sparsity=sparsity, start_step=steps // 5, ramp_steps=steps * 2 // 5, **options
    )  # fmt: skip
    slower = train(model, optimizer, x, y, epochs, batch) / took

    groups = graphopt.channel_groups(model, test_x[:2])
    scores = zeros(Evidence(groups))
    gone = [one.label for one in groups.groups() if scores[one.label] == 0]
    small = remove(groups, gone)
    before, after = (cost(one, [test_x[:1]]) for one in (groups.graph, small))
    with torch.no_grad():
        truth = model.double()(test_x.double())
        (found,) = Interpreter(small, lifted=True).run([test_x])
    return {
        "seed": seed,
        "groups": len(groups.groups()),
        "removed": len(gone),
        "flops": before.flops,
        "flops_left": after.flops,
        "parameters": before.parameters,
        "parameters_left": after.parameters,
        "accuracy": accuracy(dense, test_x, test_y),
        "accuracy_left": right(small, test_x, test_y),
        "accuracy_cut_later": right(cut, test_x, test_y),
        "float64_error": float((found - truth).abs().max() / truth.abs().max()),
        "time": slower,
    }


HEAD = """# Channels trained to zero

{network}, on scikit-learn's digits ({train} images to train, {test} to test): {epochs} epochs of
SGD with momentum, and of DHSPG with the same settings and target_sparsity={sparsity}; torch {torch}, one thread. What is
zero in the end is removed, with no fine-tuning. "Cut after SGD": the dense network without as many channels,
those of the smallest norms, with no fine-tuning either.

| seed | channels removed | FLOPs removed | parameters removed | accuracy, SGD | accuracy, removed | cut after SGD | float64 error | time per step |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""  # noqa: E501


def table(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        flops, parameters = (1 - row[f"{one}_left"] / row[one] for one in ("flops", "parameters"))
        lines.append(
            f"| {row['seed']} | {row['removed']} of {row['groups']} | {flops:.1%} | {parameters:.1%} "
            f"| {row['accuracy']:.1f} | {row['accuracy_left']:.1f} | {row['accuracy_cut_later']:.1f} "
            f"| {row['float64_error']:.1e} | x{row['time']:.2f} |"
        )
    mean = [statistics.mean(row[one] for row in rows) for one in ("accuracy", "accuracy_left")]
    lines.append(f"\nMean accuracy {mean[0]:.2f} and {mean[1]:.2f}.\n")
    return HEAD.format(**about) + "\n".join(lines)


def main(
    seeds: Annotated[int, typer.Option(help="how many")] = 3,
    width: Annotated[int, typer.Option(help="channels of the first stage")] = 16,
    blocks: Annotated[int, typer.Option(help="of every stage")] = 3,
    epochs: Annotated[int, typer.Option(help="of both trainings")] = 12,
    batch: Annotated[int, typer.Option(help="size")] = 64,
    sparsity: Annotated[float, typer.Option(help="fraction of the groups")] = 0.35,
    store: Annotated[bool, typer.Option(help="write the tables")] = True,
) -> None:
    """Train, remove, compare, and write the table."""
    torch.set_num_threads(1)
    rows = []
    for seed in range(seeds):
        rows.append(one_run(seed, width, blocks, epochs, batch, sparsity))
        print(json.dumps(rows[-1]), flush=True)
    about = {
        "network": f"A residual network of {6 * blocks + 2} layers, {width} channels wide",
        "epochs": epochs, "batch": batch, "sparsity": sparsity, "torch": torch.__version__,
        "train": 1437, "test": 360,
    }  # fmt: skip
    print(table(about, rows))
    if store:
        stored = json.dumps({"about": about, "rows": rows}, indent=1) + "\n"
        (RESULTS / "training_sparsity.json").write_text(stored)
        (RESULTS / "training_sparsity.md").write_text(table(about, rows))


if __name__ == "__main__":
    typer.run(main)
