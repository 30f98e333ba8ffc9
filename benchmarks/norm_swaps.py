"""Norms and attention that are swapped while training: accuracy on digits, latency, cost of attention.

    python -m benchmarks.norm_swaps

A small DeiT-like transformer is trained on scikit-learn's digits with layer norms; then a copy is trained on
as it is, and another one with its norms swapped. Latency is that of DeiT-Ti at 196 tokens with layer norms
and with swapped ones, all optimized, for the same backend: medians of runs in turns. The cost of attention
with softmax and of simplified linear attention is measured from 256 to 4096 tokens.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import graphopt
from benchmarks.digits import digits
from graphopt.training.swaps import swap
from graphopt.training.swaps.attention import attend

RESULTS = Path(__file__).parent / "results"
STATISTICS = ("layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm", "rsqrt")
MODELS: dict[str, dict[str, int]] = {
    "DeiT-Ti": {
        "size": 224, "patch": 16, "inputs": 3, "width": 192, "depth": 12, "heads": 3, "classes": 1000,
    },
    "as for digits": {
        "size": 28, "patch": 2, "inputs": 1, "width": 64, "depth": 4, "heads": 4, "classes": 10,
    },
}  # fmt: skip
LATENCIES = {
    "prepbn": {"norm": "prepbn"}, "prepbn and sla": {"norm": "prepbn", "attention": "sla"},
}  # fmt: skip
OTHERS = ("batchnorm", "dyt", "rmsnorm", "powernorm", "groupnorm", "evonorm")


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.fc1 = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class DeiT(nn.Module):
    """A vision transformer without class token (DeiT, arXiv 2012.12877, the mean of tokens read)."""

    def __init__(
        self, size: int, patch: int, inputs: int, width: int, depth: int, heads: int, classes: int
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(inputs, width, patch, patch)
        self.position = nn.Parameter(torch.randn((size // patch) ** 2, width) * 0.5)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


# -- accuracy ---------------------------------------------------------------------------------------


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, batch: int, lr: float) -> float:
    """AdamW with a cosine, noise on the images. Returns the processor's seconds."""
    generator = torch.Generator().manual_seed(0)
    steps = epochs * (len(x) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    start = time.process_time()
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)[: len(x) // batch * batch]
        for chosen in order.split(batch):
            images = x[chosen]
            images = images + 0.2 * torch.randn(images.shape, generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), y[chosen]).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    return time.process_time() - start


@torch.no_grad()
def accuracy(model: Any, x: Tensor, y: Tensor) -> float:
    return 100 * float((model(x).argmax(1) == y).double().mean())


def statistics_of(model: graphopt.OptimizedModule) -> int:
    """How many ops compute statistics of their input, for all I know of their names."""
    assert model.graph_module is not None
    names = [getattr(node.target, "__name__", "") for node in model.graph_module.graph.nodes]
    return sum(name.split(".")[0] in STATISTICS for name in names)


def one_run(
    seed: int, epochs: int, batch: int, swaps: dict[str, dict[str, str]]
) -> list[dict[str, Any]]:
    """The model with layer norms, trained on as it is and with each swap."""
    x, y, test_x, test_y = digits(seed)
    x, test_x = 2 * x - 1, 2 * test_x - 1
    torch.manual_seed(seed)
    source = DeiT(8, 2, 1, width=64, depth=4, heads=4, classes=10)
    train(source, x, y, epochs, batch, 2e-3)
    steps = epochs * (len(x) // batch)
    rows = []
    base = copy.deepcopy(source)
    took = train(base, x, y, epochs, batch, 2e-3)
    for name, what in {"layer norm": {}, **swaps}.items():
        model, seconds = base, took
        if what:
            torch.manual_seed(seed)
            made = swap(source, (x[:2],), warm=steps // 10, steps=steps // 2, **what)
            model, seconds = made, train(made, x, y, epochs, batch, 2e-3)  # type: ignore[assignment]
        fast = graphopt.optimize(model, (test_x[:2],))
        truth = model.double()(test_x.double())
        found = graphopt.optimize(model, (test_x[:2].double(),))(test_x.double())
        rows.append({
            "seed": seed, "what": name, "before": accuracy(source, test_x, test_y),
            "accuracy": accuracy(fast, test_x, test_y), "statistics": statistics_of(fast),
            "float64_error": float((found - truth).abs().max() / truth.abs().max()),
            "time": seconds / took,
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


# -- latency ------------------------------------------------------------------------------------------


def in_turns(runs: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, float]:
    """Median milliseconds of each, measured in turns."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    with torch.no_grad():
        for number in range(rounds + 3):
            for name, run in runs.items():
                wait()
                start = time.perf_counter()
                run()
                wait()
                if number >= 3:
                    found[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(one) for name, one in found.items()}


def finished(model: nn.Module, x: Tensor, **what: Any) -> nn.Module:
    """A model swapped at once, its statistics those of one batch."""
    model = swap(model, (x[:2],), steps=0, **what)
    with torch.no_grad():
        for _ in range(2):
            model(x if len(x) > 1 else torch.cat([x, x]))
    return model.eval()


def latency(backend: str, name: str, batch: int, rounds: int, device: str) -> dict[str, Any]:
    """A model at 196 tokens with layer norms, with prepbn, and with linear attention too."""
    torch.manual_seed(0)
    shape = MODELS[name]
    source = DeiT(**shape).eval().to(device)
    x = torch.randn(batch, shape["inputs"], shape["size"], shape["size"], device=device)
    sources = {"layer norm": source} | {
        to: finished(source, x, **what) for to, what in LATENCIES.items()
    }
    models = {to: graphopt.optimize(one, (x,), backend=backend) for to, one in sources.items()}
    assert {one.report.backend for one in models.values()} == {backend}
    row: dict[str, Any] = {"device": device, "backend": backend, "model": name, "batch": batch}
    row["ms"] = in_turns({to: partial(one, x) for to, one in models.items()}, rounds, device)
    row["ratio"] = {to: row["ms"]["layer norm"] / row["ms"][to] for to in LATENCIES}
    row["statistics"] = {to: statistics_of(one) for to, one in models.items()}
    print(json.dumps(row), flush=True)
    return row


def linear_cost(backend: str, sides: list[int], rounds: int, device: str) -> list[dict[str, Any]]:
    """One attention layer (192 channels, 3 heads) with softmax, with SLA, and both orders of the
    product alone."""
    rows = []
    for side in sides:
        tokens = side * side
        torch.manual_seed(0)
        x = torch.randn(1, tokens, 192, device=device)
        source = Attention(192, 3).eval().to(device)
        models = {
            "softmax": graphopt.optimize(source, (x,), backend=backend),
            "sla": graphopt.optimize(finished(source, x, attention="sla"), (x,), backend=backend),
        }
        operands = tuple(torch.randn(1, 3, tokens, 64, device=device).relu() for _ in range(3))
        orders = ("linear", "quadratic")
        runs: dict[str, Callable[[], Any]] = {
            **{name: partial(one, x) for name, one in models.items()},
            **{one: partial(attend, *operands, one) for one in orders},
        }
        exact = [attend(*(part.double() for part in operands), one) for one in orders]
        after = {name: one.report.after for name, one in models.items()}
        rows.append({
            "backend": backend, "device": device, "tokens": tokens,
            "ms": in_turns(runs, rounds, device),
            "flops": {name: None if one is None else one.flops for name, one in after.items()},
            "orders_differ": float((exact[0] - exact[1]).abs().max() / exact[1].abs().max()),
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


# -- tables -------------------------------------------------------------------------------------------


def table(about: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["# Norms and attention swapped while training", "", about["text"], ""]
    if found["accuracy"]:
        lines += [
            "| seed | swapped to | accuracy before | after | statistics left | float64 error | time |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]  # fmt: skip
        lines += [
            f"| {one['seed']} | {one['what']} | {one['before']:.1f} | {one['accuracy']:.1f} "
            f"| {one['statistics']} | {one['float64_error']:.1e} | x{one['time']:.2f} |"
            for one in found["accuracy"]
        ]
        means = {
            what: statistics.mean(one["accuracy"] for one in found["accuracy"] if one["what"] == what)
            for what in ("layer norm", "prepbn")
        }  # fmt: skip
        lines += ["", f"Mean accuracy: {means['layer norm']:.2f} with layer norms trained on, "
                  f"{means['prepbn']:.2f} with prepbn.", ""]  # fmt: skip
    if found["latency"]:
        lines += [
            "| device | backend | model | batch | layer norm, ms | prepbn, ms | ratio | with sla, ms "
            "| ratio | statistics | left |",
            "| --- " * 11 + "|",
        ]
        for one in found["latency"]:
            ms, ratio, counts = one["ms"], one["ratio"], one["statistics"]
            lines.append(
                f"| {one['device']} | {one['backend']} | {one['model']} | {one['batch']} "
                f"| {ms['layer norm']:.2f} | {ms['prepbn']:.2f} | {ratio['prepbn']:.3f} "
                f"| {ms['prepbn and sla']:.2f} | {ratio['prepbn and sla']:.3f} "
                f"| {counts['layer norm']} | {counts['prepbn']} |"
            )
        lines.append("")
    if found["attention"]:
        lines += [
            "| device | backend | tokens | softmax, ms | SLA, ms | q (k^T v), ms | (q k^T) v, ms | SLA, FLOPs per token | orders differ by |",  # noqa: E501
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]  # fmt: skip
        lines += [
            f"| {one['device']} | {one['backend']} | {one['tokens']} | {one['ms']['softmax']:.2f} "
            f"| {one['ms']['sla']:.2f} | {one['ms']['linear']:.2f} | {one['ms']['quadratic']:.2f} "
            f"| {one['flops']['sla'] / one['tokens']:.0f} | {one['orders_differ']:.1e} |"
            for one in found["attention"]
        ]
    return "\n".join(lines) + "\n"


TEXT = """A transformer of 4 blocks, 64 channels wide, on scikit-learn's digits (1437 images to train,
360 to test, with some noise): {epochs} epochs with layer norms, then {epochs} more as it is or swapped
(a tenth of the steps warm, half of them for the schedule); AdamW, torch {torch}, one thread.
Latency: at 196 tokens, DeiT-Ti (12 blocks, 192 channels) and the model for digits, all optimized by
graphopt for the same backend, in turns. Attention: one layer of 192 channels, 3 heads; the two
orders are the products alone.
"Statistics": ops that compute moments of their input."""


def main(
    seeds: Annotated[int, typer.Option(help="how many")] = 3,
    epochs: Annotated[int, typer.Option(help="of each training")] = 20,
    batch: Annotated[int, typer.Option(help="size of training batches")] = 64,
    others: Annotated[bool, typer.Option(help="all other norms and SLA too, for one seed")] = True,
    rounds: Annotated[int, typer.Option(help="runs of each in turns")] = 40,
    backends: Annotated[str, typer.Option(help="separated by commas")] = "eager,inductor",
    batches: Annotated[str, typer.Option(help="batch sizes of latency")] = "1,8",
    sides: Annotated[str, typer.Option(help="roots of the numbers of tokens")] = "16,24,32,48,64",
    device: Annotated[str, typer.Option(help="of latency: cpu or cuda")] = "cpu",
    store: Annotated[bool, typer.Option(help="write the tables")] = True,
) -> None:
    """Train, swap, compare, and write the tables."""
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, Any]]] = {"accuracy": [], "latency": [], "attention": []}
    for seed in range(seeds):
        swaps = {"prepbn": {"norm": "prepbn"}}
        if others and not seed:
            swaps |= {to: {"norm": to} for to in OTHERS}
            swaps["prepbn and sla"] = {"norm": "prepbn", "attention": "sla"}
        found["accuracy"] += one_run(seed, epochs, batch, swaps)
    for backend in filter(None, backends.split(",")):
        for size in map(int, batches.split(",")):
            for name in MODELS:
                found["latency"].append(latency(backend, name, size, rounds, device))
        found["attention"] += linear_cost(backend, list(map(int, sides.split(","))), rounds, device)
    about = {"torch": torch.__version__, "epochs": epochs}
    about["text"] = TEXT.format(**about)
    print(table(about, found))
    if store:
        name = "norm_swaps" if device == "cpu" else f"norm_swaps_{device}"
        stored = json.dumps({"about": about, **found}, indent=1) + "\n"
        (RESULTS / f"{name}.json").write_text(stored)
        (RESULTS / f"{name}.md").write_text(table(about, found))


if __name__ == "__main__":
    typer.run(main)
