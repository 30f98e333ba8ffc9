"""One small network per operator, pruned by ours and by the peer, each against a truth of its own.

    python -m benchmarks.prunability.operators [--only flip] [--no-peer]

The truth knows nothing of either pruner: entries of parameters that are not in the result are set to
zero in the source, in float64. That is the model without them wherever a channel that is zero, or that
is read with zero weights, is one that is not there. It is not where a statistic, a softmax, a maximum or a
kernel runs over channels: for these networks (`STATISTIC`) ours is compared with the masked source, which
counts what stays only, and the peer is said to differ.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

import graphopt
from benchmarks.prunability.networks import NETWORKS, STATISTIC, Network
from benchmarks.prunability.row import first_line
from graphopt.fleet.trials import OutOfTime, at_most

RESULTS = Path(__file__).parents[1] / "results"
LIMIT = 1e-9  # relative, in float64
PATIENCE = 20  # seconds, for the peer
SEEDS = 3
Kept = dict[str, list[list[int]]]  # entries of every axis of every parameter that stay


@dataclasses.dataclass
class Result:
    """`outcome`: exact, wrong, differs (a statistic), refused, crash or hang; `left` of the parameters;
    `error` is the largest over seeds and batch sizes, relative to the truth."""

    outcome: str
    reason: str = ""
    left: float = 1.0
    error: float = math.nan


# -- the truth ------------------------------------------------------------------------------------


def kept(source: nn.Module, result: dict[str, Tensor]) -> Kept:
    """Which entries of every axis of the parameters of `source` are those of `result`, found by value:
    random parameters have no value twice.

    Raises:
        ValueError: if a parameter is not what some entries of each axis of the source's are.
    """
    found: Kept = {}
    for name, one in source.named_parameters():
        if name not in result:
            continue
        before, after = one.detach().numpy(), result[name].detach().numpy()
        place = {value: i for i, value in enumerate(before.ravel().tolist())}
        flat = np.array([place.get(value, -1) for value in after.ravel().tolist()])
        if (flat < 0).any():
            raise ValueError(f"{name} has values that the source has not")
        axes = [
            list(dict.fromkeys(np.moveaxis(index.reshape(after.shape), axis, 0)
                               .reshape(after.shape[axis], -1)[:, 0].tolist()))
            for axis, index in enumerate(np.unravel_index(flat, before.shape))
        ]  # fmt: skip
        if not np.array_equal(before[np.ix_(*axes)], after):
            raise ValueError(f"{name} is not what some entries of each axis are")
        found[name] = axes
    return found


@torch.no_grad()
def without(source: nn.Module, stays: Kept) -> nn.Module:
    """The source with zeros in place of the parameters' entries that do not stay."""
    model = copy.deepcopy(source)
    for name, one in model.named_parameters():
        for axis, entries in enumerate(stays.get(name, ())):
            gone = sorted(set(range(one.shape[axis])) - set(entries))
            one.index_fill_(axis, torch.tensor(gone, dtype=torch.long), 0.0)
    return model


def check(
    network: Network, source: nn.Module, result: nn.Module, parameters: dict[str, Tensor],
) -> tuple[str, float]:  # fmt: skip
    """Why a result is not the source without what it has lost, empty if it is; the relative error."""
    truth = without(source, kept(source, parameters))
    worst = 0.0
    for batch in (2, 1, 3):
        x = torch.randn(batch, *network.sizes, dtype=torch.float64)
        with torch.no_grad():
            worst = max(worst, _error(result(x), truth(x)))
    return ("" if worst <= LIMIT else f"differs by {worst:.1e}"), worst


def _error(found: Any, truth: Any) -> float:
    pairs = zip(_leaves(found), _leaves(truth), strict=True)
    return max(
        math.inf if a.shape != b.shape else float((a - b).norm() / b.norm()) for a, b in pairs
    )


def _leaves(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _count(parameters: dict[str, Tensor]) -> int:
    return sum(one.numel() for one in parameters.values())


# -- ours -----------------------------------------------------------------------------------------


def ours(name: str, seeds: int = SEEDS) -> Result:
    """Prune the network of a name by half, with several draws of what goes."""
    network = NETWORKS[name]
    source = network.build()
    total = _count(dict(source.named_parameters()))
    x = torch.randn(2, *network.sizes, dtype=torch.float64)
    worst, left = 0.0, 1.0
    for seed in range(seeds):
        fast = graphopt.optimize(source, (x,), passes=f"prune{{importance=random,seed={seed}}}")
        report = fast.report
        if report.rolled_back:
            return Result("wrong", report.rolled_back[0].reason)
        if not report.applied:
            reason = report.refused[0].reason if report.refused else _fixed(source, x)
            return Result("refused", reason)
        parameters = dict(fast.named_parameters())
        left = min(left, _count(parameters) / total)
        worst = max(worst, report.applied[0].error)
        if name in STATISTIC:
            for batch in (1, 3):
                fast(torch.randn(batch, *network.sizes, dtype=torch.float64))
            continue
        said, error = check(network, source, fast, parameters)
        worst = max(worst, error)
        if said:
            return Result("wrong", said, left, worst)
    return Result("exact", "", left, worst)


def _fixed(source: nn.Module, x: Tensor) -> str:
    """Why nothing goes away: the reasons of what is neither input nor output."""
    found = graphopt.channel_groups(source, (x,)).fixed().values()
    usual = ("a kernel runs along the axis", "it is an output of the model",
             "it is read by a map whose inputs are fixed")  # fmt: skip
    return "; ".join(dict.fromkeys(one for one in found if one not in usual))


# -- the peer -------------------------------------------------------------------------------------


def peer(name: str) -> Result:
    """torch-pruning, told the layers that give the outputs and nothing else."""
    import torch_pruning

    network = NETWORKS[name]
    source, model = network.build(), network.build()
    total = _count(dict(source.named_parameters()))
    x = torch.randn(2, *network.sizes, dtype=torch.float64)
    ignored = [one for path, one in model.named_children() if path.startswith("last")]
    stage = "crash-build"
    try:
        with at_most(PATIENCE):
            pruner = torch_pruning.pruner.BasePruner(
                model, x, importance=torch_pruning.importance.MagnitudeImportance(p=2),
                pruning_ratio=0.5, ignored_layers=ignored,
            )  # fmt: skip
            stage = "crash-prune"
            pruner.step()
            stage = "crash-forward"
            with torch.no_grad():
                model(x)
    except OutOfTime:
        return Result("hang", f"{PATIENCE} s")
    except Exception as error:
        return Result(stage, first_line(error))
    parameters = dict(model.named_parameters())
    left = _count(parameters) / total
    if left == 1.0:
        return Result("refused", "nothing is removed")
    try:
        said, error = check(network, source, model, parameters)
    except Exception as failure:
        return Result("wrong", first_line(failure), left)
    if said and name in STATISTIC:
        return Result("differs", "a statistic over channels", left, error)
    return Result("wrong" if said else "exact", said, left, error)


# -- the table ------------------------------------------------------------------------------------


def markdown(about: dict[str, str], rows: dict[str, dict[str, Result]]) -> str:
    def counted(side: str) -> str:
        counts = Counter(one[side].outcome for one in rows.values() if side in one)
        return ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())

    lines = [
        "# One operator at a time", "", ", ".join(f"{key} {one}" for key, one in about.items()) + ".",
        "",
        "A small network around each operator, half of its channels removed, in float64, against the "
        "source with zeros for the parameters that are gone; ours for "
        f"{SEEDS} draws of what goes. *exact*: equal to {LIMIT:g} at batch sizes 1, 2 and 3. Where a "
        "statistic, a softmax, a maximum or a kernel runs over channels, ours is compared with the "
        "masked source, which counts what stays only, and the peer *differs*.", "",
        f"Ours: {counted('ours')}. The peer: {counted('peer')}.", "",
        "| network | ours | left | error | peer | left | why |", "|" + " --- |" * 7,
    ]  # fmt: skip
    for name, sides in rows.items():
        a, b = sides.get("ours", Result("-")), sides.get("peer", Result("-"))
        why = " / ".join(
            f"{who}: {one.reason}" for who, one in (("ours", a), ("peer", b)) if one.reason
        )
        error = "-" if math.isnan(a.error) else f"{a.error:.0e}"
        cells = [name, a.outcome, f"{a.left:.2f}", error, b.outcome, f"{b.left:.2f}", why]
        lines.append("| " + " | ".join(one.replace("|", "\\|") for one in cells) + " |")
    return "\n".join(lines) + "\n"


def main(
    only: Annotated[
        list[str] | None, typer.Option(help="names with this in them; repeatable")
    ] = None,
    with_peer: Annotated[bool, typer.Option("--peer/--no-peer", help="the peer too")] = True,
    out: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS,
) -> None:
    """Prune every network, and keep the table; exits with 1 if one of ours is wrong."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    path = out / "prunability_operators.json"
    known = json.loads(path.read_text())["networks"] if path.exists() else {}
    rows = {
        name: {side: Result(**{"error": math.nan, **one}) for side, one in known[name].items()}
        for name in NETWORKS if name in known
    }  # fmt: skip
    for name in NETWORKS:
        if only and not any(one in name for one in only):
            continue
        found = rows.setdefault(name, {})
        for side, run in (("ours", ours), ("peer", peer)):
            if side == "ours" or with_peer:
                found[side] = run(name)
                print(f"{name:46} {side} {found[side]}", flush=True)
    rows = {name: rows[name] for name in NETWORKS if name in rows}
    about = {"torch": torch.__version__, "torch-pruning": version("torch-pruning")}
    plain = {
        name: {side: {key: value for key, value in dataclasses.asdict(one).items() if value == value}
               for side, one in sides.items()}
        for name, sides in rows.items()
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"about": about, "networks": plain}, indent=1) + "\n")
    (out / "prunability_operators.md").write_text(markdown(about, rows))
    raise typer.Exit(any(one["ours"].outcome == "wrong" for one in rows.values() if "ours" in one))


if __name__ == "__main__":
    typer.run(main)
