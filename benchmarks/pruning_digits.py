"""Accuracy at a number of FLOPs: every importance and reconstruction of `prune`, beside torch-pruning.

    python -m benchmarks.pruning_digits

A residual network of 20 layers and a small vision transformer are trained on scikit-learn's digits (8x8
images, 1437 to train, 360 to test), pruned to parts of their FLOPs, and fine-tuned in the same way on both
sides. Rows are stored as they come; what is stored is not run again.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import graphopt
from benchmarks.training_sparsity import accuracy, data, network, train
from graphopt.ir.capture import capture
from graphopt.ir.channels import find_groups
from graphopt.ir.driver import Session
from graphopt.module import build
from graphopt.passes.prune import Prune
from graphopt.passes.pruning.evidence import Evidence, Scores
from graphopt.passes.pruning.importance import IMPORTANCE
from graphopt.passes.pruning.reconstruction import RECONSTRUCTION
from graphopt.verify import SiteValidator

RESULTS = Path(__file__).parent / "results"
LEVELS = (0.7, 0.5, 0.3)  # parts of the FLOPs that stay
FEW = ("l2", "taylor", "hessian")  # with a second allocation
PEERS = ("magnitude", "batch-norm-scale", "taylor", "hessian", "random")
ALIKE = {"l2": "magnitude", "batch-norm-scale": "batch-norm-scale", "taylor": "taylor",
         "hessian": "hessian", "random": "random"}  # fmt: skip
CALIBRATION, BATCH = 256, 64
LAYERS = {"resnet": 3, "vit": 4}
HEADS = 4


# -- models -----------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Over the tokens; any number of features, in `heads` heads of equal width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            one(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for one in (self.q, self.k, self.v)
        )
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        found: Tensor = self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return found


class Layer(nn.Module):
    """Attention and a perceptron, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        found: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return found


class ViT(nn.Module):
    """A vision transformer (arXiv 2010.11929) on patches of 2x2, with the mean over tokens read."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.position = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        found: Tensor = self.head(self.norm(self.layers(x)).mean(1))
        return found


# -- what both sides get ------------------------------------------------------------------------------


@dataclasses.dataclass
class Case:
    """A trained model and its data."""

    seed: int
    kind: str
    width: int
    epochs: int

    def __post_init__(self) -> None:
        self.x, self.y, self.test_x, self.test_y = data(self.seed)
        torch.manual_seed(self.seed)
        self.model: nn.Module
        if self.kind == "resnet":
            self.model = network(self.width, LAYERS["resnet"])
            optimizer: Any = torch.optim.SGD(
                self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4
            )
            train(self.model, optimizer, self.x, self.y, 8, 64)
        else:
            self.model = ViT(64, LAYERS["vit"], HEADS)
            optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, weight_decay=0.05)
            train(self.model, optimizer, self.x, self.y, 12, 64)
        self.dense = accuracy(self.model, self.test_x, self.test_y)
        self.full = counted(self.model, self.x)

    @property
    def calibration(self) -> tuple[Tensor, Tensor]:
        return self.x[:CALIBRATION], self.y[:CALIBRATION]

    def judged(self, model: nn.Module, train_mode: bool = False) -> dict[str, float]:
        """Accuracies of a pruned model, and what is left of it. It is changed."""
        before = accuracy(model, self.test_x, self.test_y)
        left = counted(model, self.x) / self.full
        parameters = sum(one.numel() for one in model.parameters())
        tune(model, self.x, self.y, self.epochs, train_mode)
        after = accuracy(model, self.test_x, self.test_y)
        return {"flops": left, "parameters": parameters, "before": before, "after": after}


def counted(model: nn.Module, x: Tensor) -> int:
    """The FLOPs of one image, by PyTorch's counter."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x[:2])
    return counter.get_total_flops() // 2


def tune(model: nn.Module, x: Tensor, y: Tensor, epochs: int, train_mode: bool) -> None:
    """Adam, with the statistics of batch norms as they are but in train mode."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    model.train(train_mode)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    model.eval()


class Run(NamedTuple):
    """One configuration of one side."""

    side: str
    importance: str
    scope: str = "local"
    allocation: str = "uniform"
    reconstruct: str = ""
    mode: str = "eval"  # of batch norms in fine-tuning

    def __str__(self) -> str:
        more = [self.scope * (self.scope != "local"), self.allocation * (self.allocation == "milp"),
                self.reconstruct, "batch norms tuned" * (self.mode == "train")]  # fmt: skip
        return ", ".join([self.importance, *filter(None, more)])


# -- ours -------------------------------------------------------------------------------------------


class Ours:
    """The pass `prune` on a model that is captured once; scores are found once for every importance."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.graph = capture(copy.deepcopy(case.model), (case.x[:2],), {}, None).graph
        x, y = case.calibration
        self.data = [((one,), two) for one, two in zip(x.split(BATCH), y.split(BATCH), strict=True)]
        self.single = [((one,), two) for one, two in zip(x.split(1), y.split(1), strict=True)]
        self.scores: dict[str, Scores] = {}

    def score(self, name: str) -> Scores:
        if name not in self.scores:
            given = self.single if name == "fisher" else self.data
            evidence = Evidence(
                find_groups(self.graph.clone()), given, nn.functional.cross_entropy, self.case.seed
            )
            self.scores[name] = IMPORTANCE[name](evidence)
        return self.scores[name]

    def prune(self, run: Run, level: float) -> nn.Module:
        scores = self.score(run.importance)
        options: dict[str, Any] = {
            "target_flops": level, "importance": lambda _: scores.copy(), "scope": run.scope,
            "allocation": run.allocation, "reconstruct": run.reconstruct, "data": self.data,
            "loss": nn.functional.cross_entropy,
        }  # fmt: skip
        if run.mode == "train":  # as modules, whose norms can be told to
            return graphopt.prune_module(self.case.model, self.case.x[:2], **options)
        graph = self.graph.clone()
        session = Session(graph, SiteValidator(graph, [self.case.x[:2]]))
        Prune(**options).run(session)
        wrong = [*session.rolled_back, *session.refused.values()]
        if wrong or not session.applied:
            print(f"  {run}: {[f'{one.rewrite}: {one.reason}' for one in wrong]}", flush=True)
        return copy.deepcopy(build(session.graph))


# -- theirs -----------------------------------------------------------------------------------------


class Theirs:
    """torch-pruning's BasePruner, with the ratio that comes nearest to the FLOPs."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.ratios: dict[float, float] = {}  # that of local pruning is the same for all scores

    @cached_property
    def gradients(self) -> list[Tensor]:
        model, (x, y) = copy.deepcopy(self.case.model), self.case.calibration
        nn.functional.cross_entropy(model(x), y).backward()
        return [one.grad for one in model.parameters() if one.grad is not None]

    @cached_property
    def squares(self) -> list[Tensor]:
        """Means over images. `HessianImportance.accumulate_grad` of 1.6.1 keeps those of the last image
        alone, since it asks for names in a dictionary of parameters."""
        model, (x, y) = copy.deepcopy(self.case.model), self.case.calibration
        total = [torch.zeros_like(one) for one in model.parameters()]
        for one, label in zip(x.split(1), y.split(1), strict=True):
            loss = nn.functional.cross_entropy(model(one), label)
            found = torch.autograd.grad(loss, list(model.parameters()))
            total = [old + new.square() / len(x) for old, new in zip(total, found, strict=True)]
        return total

    def prune(self, run: Run, level: float) -> nn.Module:
        if run.scope == "local" and level in self.ratios:
            return self.at(run, self.ratios[level])
        low, high = 0.0, 1.0
        tried = []
        for _ in range(7):
            middle = (low + high) / 2
            model = self.at(run, middle)
            left = counted(model, self.case.x) / self.case.full
            tried.append((abs(left - level), middle, model))
            low, high = (middle, high) if left > level else (low, middle)
        _, ratio, model = min(tried, key=lambda one: one[0])
        if run.scope == "local":
            self.ratios[level] = ratio
        return model

    def at(self, run: Run, ratio: float) -> nn.Module:
        import torch_pruning as tp

        model = copy.deepcopy(self.case.model)
        importance: Any = {
            "magnitude": lambda: tp.importance.MagnitudeImportance(p=2),
            "batch-norm-scale": tp.importance.BNScaleImportance,
            "taylor": tp.importance.TaylorImportance,
            "hessian": tp.importance.HessianImportance,
            "random": tp.importance.RandomImportance,
        }[run.importance]()
        given = {"taylor": "gradients", "hessian": "squares"}.get(run.importance)
        if given is not None:
            for one, gradient in zip(model.parameters(), getattr(self, given), strict=True):
                one.grad = gradient.clone()
        heads = {
            one: module.heads for module in model.modules() if isinstance(module, Attention)
            for one in (module.q, module.k, module.v)
        }  # fmt: skip
        last = [one for one in model.modules() if isinstance(one, nn.Linear)][-1]
        torch.manual_seed(self.case.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tp.pruner.BasePruner(
                model, self.case.x[:1], importance=importance, global_pruning=run.scope == "global",
                pruning_ratio=ratio, ignored_layers=[last], num_heads=heads,
            ).step()  # fmt: skip
        model.zero_grad()
        return model


# -- all runs ---------------------------------------------------------------------------------------


def plan(kind: str, best: str) -> Iterator[Run]:
    """What is run for a model. `best` is an importance for the reconstructions."""
    for one in IMPORTANCE:
        yield Run("ours", one)
    for one in PEERS:
        if kind == "resnet" or one != "batch-norm-scale":
            yield Run("theirs", one)
            if one != "random":
                yield Run("theirs", one, "global")
    for one in FEW:
        yield Run("ours", one, "global")
    for one in FEW[:2]:
        yield Run("ours", one, allocation="milp")
    for reconstruct in RECONSTRUCTION:
        yield Run("ours", "l2", reconstruct=reconstruct)
    for reconstruct in ("least-squares", "bias-correction"):
        yield Run("ours", best, reconstruct=reconstruct)
    if kind == "resnet":
        for scope in ("local", "global"):
            yield Run("theirs", "magnitude", scope, mode="train")
            yield Run("ours", "l2", scope, mode="train")
            yield Run("ours", "l2", scope, reconstruct="least-squares", mode="train")


def run_of(row: dict[str, Any]) -> Run:
    return Run(*(row[field] for field in Run._fields))


def best_importance(rows: Iterable[dict[str, Any]], kind: str) -> str:
    """The one with the best accuracies for the first seed, before and after fine-tuning, but l2."""
    found = defaultdict(list)
    for row in rows:
        run = run_of(row)
        if row["model"] == kind and row["seed"] == 0 and run == Run("ours", run.importance):
            found[run.importance].append(row["before"] + row["after"])
    found.pop("l2", None)
    return max(found, key=lambda one: statistics.mean(found[one]), default="taylor")


def goal(rows: Iterable[dict[str, Any]], case: Case, run: Run, level: float) -> float:
    """The level for a uniform ratio of ours; what that leaves, by how far widths can be cut, for all
    others."""
    if run[:1] + run[2:4] == ("ours", "local", "uniform"):
        return level
    key = (case.seed, case.kind, Run("ours", "l2"), level)
    return next(
        row["flops"] for row in rows
        if (row["seed"], row["model"], run_of(row), row["level"]) == key
    )  # fmt: skip


def stored(rows: Iterable[dict[str, Any]], seed: int, kind: str) -> set[tuple[Run, float]]:
    return {
        (run_of(row), row["level"]) for row in rows if (row["seed"], row["model"]) == (seed, kind)
    }


def complete(rows: list[dict[str, Any]], seed: int, kind: str) -> bool:
    able = [row for row in rows if "error" not in row]
    runs = plan(kind, best_importance(able, kind))
    return {(run, level) for run in runs for level in LEVELS} <= stored(rows, seed, kind)


def measure(case: Case, rows: list[dict[str, Any]], store: Callable[[], None]) -> None:
    """Everything for one model and seed, but what is in `rows`."""
    done = stored(rows, case.seed, case.kind)
    sides: dict[str, Any] = {"ours": Ours(case), "theirs": Theirs(case)}
    importances = [one for one in plan(case.kind, "l2") if not one.reconstruct]

    def several(runs: Iterable[Run]) -> None:
        for run in runs:
            for level in LEVELS:
                if (run, level) in done:
                    continue
                done.add((run, level))
                start = time.perf_counter()
                try:
                    model = sides[run.side].prune(run, goal(rows, case, run, level))
                    took = time.perf_counter() - start
                    found: dict[str, Any] = case.judged(model, run.mode == "train")
                except Exception as error:  # a failure of one side is a result
                    found, took = {"error": f"{type(error).__name__}: {error}"[:200]}, 0.0
                rows.append({
                    "seed": case.seed, "model": case.kind, **run._asdict(), "level": level,
                    "dense": case.dense, "prune_s": took, **found,
                })  # fmt: skip
                print(f"{time.perf_counter() - start:5.1f} s {json.dumps(rows[-1])}", flush=True)
            store()

    several(importances)
    best = best_importance([row for row in rows if "error" not in row], case.kind)
    several(plan(case.kind, best))


# -- tables -----------------------------------------------------------------------------------------

HEAD = """# Accuracy at a number of FLOPs

{network}, and a vision transformer (patches of 2x2, width 64, depth 4, 4 heads), on scikit-learn's digits
(1437 images to train, 360 to test; splits by seed); torch {torch}, torch-pruning {peer}, one thread.
A uniform ratio of ours takes what keeps to the budget; all else has what that leaves by PyTorch's counter as
its budget, torch-pruning the nearest that it comes to. Then fine-tuned for {epochs} epoch(s) with Adam (2e-3,
batches of 64), batch norms in eval mode on both sides (for "batch norms tuned", in
train mode). Data: 256 training images, in batches of 64 (`fisher`: of one); torch-pruning has the
same, its `hessian` with squared gradients that are averaged over images for it, since `accumulate_grad` of 1.6.1
keeps the last image alone. Accuracies in %: mean and standard deviation over seeds. One test image is 0.28.
"Best" is chosen in hindsight on the test images, and of more configurations on our side.
"""  # noqa: E501


Found = dict[Run, dict[int, dict[str, Any]]]  # by seed


def mean(values: Iterable[float]) -> str:
    known = list(values)
    spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.1f}{spread}"


def average(found: dict[int, dict[str, Any]], what: str) -> float:
    return statistics.mean(row[what] for row in found.values())


def best_of(found: Found, side: str, what: str, seeds: set[int]) -> Run | None:
    """The configuration with the best mean, of those that were run for all seeds."""
    able = [
        run for run in found
        if run.side == side and seeds and seeds <= found[run].keys()
        and not (run.mode == "train" and what == "before")
    ]  # fmt: skip
    return max(able, key=lambda run: average({s: found[run][s] for s in seeds}, what), default=None)


def held_out(found: Found, side: str, what: str, seeds: set[int]) -> list[float]:
    """For every seed, that of the configuration which is best for the other seeds."""
    values = []
    for seed in sorted(seeds):
        run = best_of(found, side, what, seeds - {seed})
        if run is not None and seed in found[run]:
            values.append(found[run][seed][what])
    return values


def by_run(rows: list[dict[str, Any]], kind: str, level: float) -> Found:
    found: Found = defaultdict(dict)
    for row in rows:
        if (row["model"], row["level"]) == (kind, level) and "error" not in row:
            found[run_of(row)][row["seed"]] = row
    return found


def summary(rows: list[dict[str, Any]], kind: str) -> Iterator[str]:
    """Our best beside theirs, level by level, and where ours is not better."""
    yield "| FLOPs left | | our best | | their best | | chosen on other seeds: ours | theirs |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    seeds = {row["seed"] for row in rows}
    behind = []
    for level in LEVELS:
        found = by_run(rows, kind, level)
        for what, name in (("before", "pruned"), ("after", "fine-tuned")):
            best = [best_of(found, side, what, seeds) for side in ("ours", "theirs")]
            if None in best:
                continue
            able = [found[run] for run in best if run is not None]
            cells = [
                f"{run} | {mean(one[what] for one in given.values())}"
                for run, given in zip(best, able, strict=True)
            ]
            chosen = [held_out(found, side, what, seeds) for side in ("ours", "theirs")]
            cells += [mean(one) if one else "" for one in chosen]
            yield f"| {level:.0%} | {name} | {' | '.join(cells)} |"
            pairs = {"": [average(one, what) for one in able]}
            if all(chosen):
                pairs[", chosen on other seeds"] = [statistics.mean(one) for one in chosen]
            behind += [
                f"{level:.0%} {name}{how} ({a:.1f} against {b:.1f})"
                for how, (a, b) in pairs.items() if a <= b
            ]  # fmt: skip
    yield ""
    yield f"Where our best is not better: {'; '.join(behind) or 'nowhere'}."
    alike = list(like_for_like(rows, kind, seeds))
    worse = [f"{name} ({a:.1f} against {b:.1f})" for name, a, b in alike if a < b]
    equal = sum(a == b for _, a, b in alike)
    yield ""
    yield (
        f"The same scores on both sides, fine-tuned, plain removal: ours is better in "
        f"{len(alike) - len(worse) - equal} of {len(alike)}, equal in {equal}, worse at "
        f"{'; '.join(worse) or 'none'}."
    )


def like_for_like(
    rows: list[dict[str, Any]], kind: str, seeds: set[int]
) -> Iterator[tuple[str, float, float]]:
    """What is compared, and the accuracies of both sides."""
    for level in LEVELS:
        found = by_run(rows, kind, level)
        for mine, peer in ALIKE.items():
            for scope in ("local", "global"):
                runs = Run("ours", mine, scope), Run("theirs", peer, scope)
                both = [found.get(one, {}) for one in runs]
                if all(seeds <= one.keys() for one in both):
                    a, b = (average(one, "after") for one in both)
                    yield f"{level:.0%} {runs[0]}", a, b


def table(rows: list[dict[str, Any]], kind: str) -> Iterator[str]:
    """Every configuration."""
    yield "| | FLOPs left | " + " | ".join(
        f"{level:.0%}: pruned | fine-tuned" for level in LEVELS
    ) + " |"  # fmt: skip
    yield "| --- | --- |" + " --- | --- |" * len(LEVELS)
    founds = [by_run(rows, kind, level) for level in LEVELS]
    for side in ("ours", "theirs"):
        runs = dict.fromkeys(run for found in founds for run in found if run.side == side)
        for run in sorted(runs, key=lambda one: (bool(one.reconstruct), one.allocation, one.scope)):
            left, cells = [], []
            for found in founds:
                given = [found[run][seed] for seed in sorted(found.get(run, {}))]
                left.append(
                    f"{statistics.mean(one['flops'] for one in given):.1%}" if given else ""
                )
                cells += [
                    mean(one[what] for one in given) if given else ""
                    for what in ("before", "after")
                ]
            yield f"| {side}: {run} | {', '.join(left)} | {' | '.join(cells)} |"


def text(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    counts = Counter((row["model"], row["seed"]) for row in rows)
    most = {kind: max(counts[one] for one in counts if one[0] == kind) for kind, _ in counts}
    rows = [row for row in rows if counts[row["model"], row["seed"]] == most[row["model"]]]
    lines = [HEAD.format(**about)]
    for kind, title in (("resnet", "Residual network"), ("vit", "Vision transformer")):
        mine = [row for row in rows if row["model"] == kind]
        if not mine:
            continue
        dense = {row["seed"]: row["dense"] for row in mine}
        lines += [
            f"## {title}", "",
            f"Seeds {', '.join(map(str, sorted(dense)))}. Dense: {mean(dense.values())}.", "",
            *summary(mine, kind), "", *table(mine, kind), "",
        ]  # fmt: skip
        missing = [
            f"{run.side}: {run} at {level:.0%}" for run in plan(kind, best_importance(mine, kind))
            for level in LEVELS if run not in by_run(mine, kind, level)
        ]  # fmt: skip
        lines += [f"Not run: {'; '.join(missing)}.", ""] if missing else []
        errors = {
            f"{run_of(row)} at {row['level']:.0%}: {row['error']}" for row in mine if "error" in row
        }
        lines += [f"Failed: {'; '.join(sorted(errors))}.", ""] if errors else []
    return "\n".join(lines)


def main(
    seeds: Annotated[int, typer.Option(help="how many")] = 3,
    width: Annotated[int, typer.Option(help="channels of the first stage")] = 8,
    epochs: Annotated[int, typer.Option(help="of fine-tuning")] = 1,
    only: Annotated[str, typer.Option(help="one model: resnet or vit")] = "",
    fresh: Annotated[bool, typer.Option(help="forget what is stored")] = False,
    out: Annotated[Path, typer.Option(help="where the tables go")] = RESULTS,
) -> None:
    """Train, prune on both sides, fine-tune, and write the table."""
    torch.set_num_threads(1)
    about = {
        "network": f"A residual network of 20 layers, {width} channels wide", "width": width,
        "epochs": epochs, "torch": torch.__version__, "peer": version("torch-pruning"),
    }  # fmt: skip
    path, rows = out / "pruning_digits.json", []
    if path.exists() and not fresh:
        found = json.loads(path.read_text())
        rows = found["rows"] if found["about"] == about else []

    def store() -> None:
        path.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        path.with_suffix(".md").write_text(text(about, rows))

    for seed in range(seeds):
        for kind in LAYERS:
            if only in ("", kind) and not complete(rows, seed, kind):
                measure(Case(seed, kind, width, epochs), rows, store)
    store()


if __name__ == "__main__":
    typer.run(main)
