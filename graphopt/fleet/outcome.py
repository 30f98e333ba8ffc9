"""What a sweep found: one table, the fronts, a picture.

A trial is on the front of its model if no other is at least as good in latency and in value, and better in
one of them. Latencies are relative to the source, which was timed in the same rounds.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from graphopt.builds.errors import ConfigError
from graphopt.files import write
from graphopt.fleet.trials import Result

ABOUT = ("model", "pipeline", "options", "backend", "precision")
FOUND = ("latency", "speedup", "parameters")


@dataclasses.dataclass(frozen=True)
class Swept:
    """All trials of a sweep: `results` as they are stored, by model, the fastest first, failed ones last;
    `front` the keys of those on the fronts; how many were run now, the others were stored already."""

    path: Path
    results: list[Result]
    front: frozenset[str]
    measured: dict[
        str, tuple[str, bool]
    ]  # by model: the name of the value, and whether more is better
    run: int

    @property
    def failed(self) -> list[Result]:
        return [one for one in self.results if one["status"] != "ok"]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `json.dumps` takes."""
        return {
            "trials": self.results, "front": sorted(self.front),
            "values": {name: {"name": value, "maximize": more}
                       for name, (value, more) in self.measured.items()},
        }  # fmt: skip

    # -- the table ------------------------------------------------------------------------------

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Titles and cells; a star marks the front. What is the same for all is left out."""
        values = {name for name, _ in self.measured.values()}
        title = values.pop() if len(values) == 1 else "value"
        cells = [self._row(one) for one in self.results]
        titles = [*ABOUT, *FOUND, title, "front"]
        kept = [
            number for number, name in enumerate(titles)
            if name not in ABOUT or len({one[number] for one in cells}) > 1
        ]  # fmt: skip
        return [titles[one] for one in kept], [[row[one] for one in kept] for row in cells]

    def _row(self, one: Result) -> list[str]:
        trial = one["trial"]
        options = " ".join(f"{name}={_short(value)}" for name, value in trial["options"].items())
        backend = "" if trial["passes"] is None else trial["backend"]
        if backend and one.get("backend", backend) != backend:
            backend = f"{backend}: {one['backend']}"
        told = [trial["model"], trial["pipeline"], options, backend, trial["precision"] or ""]
        if one["status"] != "ok":
            return [*told, "failed", "", "", "", ""]
        return [
            *told, f"{1e3 * one['latency']:.3g} ms", f"{1 / one['relative']:.2f}x",
            f"{one['parameters']:,}", f"{one['value']:.4g}",
            "*" if one["key"] in self.front else "",
        ]  # fmt: skip

    def reasons(self) -> list[str]:
        """A line for each trial that failed."""
        told = [" ".join(filter(None, self._row(one)[: len(ABOUT)])) for one in self.failed]
        return [
            f"{name} failed: {one['reason']}" for name, one in zip(told, self.failed, strict=True)
        ]

    def table(self) -> Table:
        titles, rows = self.rows()
        found = Table(box=SIMPLE, padding=(0, 1, 0, 0))
        for title in titles:
            text = title in ABOUT
            found.add_column(
                title, justify="left" if text else "right", no_wrap=not text, overflow="fold"
            )
        for row in rows:
            found.add_row(*map(escape, row))
        return found

    def markdown(self) -> str:
        titles, rows = self.rows()
        lines = [titles, ["---"] * len(titles), *rows]
        text = [f"| {' | '.join(cell.replace('|', '/') for cell in one)} |" for one in lines]
        return "\n".join([*text, *(f"\n{one}" for one in self.reasons())])

    # -- files ----------------------------------------------------------------------------------

    def store(self) -> None:
        """`results.json`, `table.md` and `pareto.png`."""
        text = json.dumps(self.to_dict(), indent=1, sort_keys=True, allow_nan=False)
        write(self.path / "results.json", text + "\n")
        write(self.path / "table.md", self.markdown() + "\n")
        self.draw(self.path / "pareto.png")

    def draw(self, path: Path) -> None:
        """A picture for each model: its trials, value over relative latency, and the front."""
        plotting()
        from matplotlib.figure import Figure

        models = list(self.measured)
        figure = Figure(figsize=(6.4, 4.2 * len(models)), layout="constrained")
        axes = figure.subplots(len(models), 1, squeeze=False)[:, 0]
        for model, plot in zip(models, axes, strict=True):
            value, more = self.measured[model]
            mine = [
                one
                for one in self.results
                if one["trial"]["model"] == model and one["status"] == "ok"
            ]
            for pipeline in dict.fromkeys(one["trial"]["pipeline"] for one in mine):
                some = [one for one in mine if one["trial"]["pipeline"] == pipeline]
                plot.scatter(*_points(some), s=24, alpha=0.8, label=pipeline)
            best = sorted(
                (one for one in mine if one["key"] in self.front), key=lambda one: one["relative"]
            )
            if best:
                plot.step(*_points(best), where="post", color="black", linewidth=1, label="front")
                plot.scatter(*_points(best), s=90, facecolors="none", edgecolors="black")
            if not more and mine and all(one["value"] > 0 for one in mine):
                plot.set_yscale("log")
            plot.set(title=model, xlabel="latency / latency of the source", ylabel=value)
            plot.grid(alpha=0.3)
            if mine:
                plot.legend()
        part = path.with_name(f".{path.name}")
        figure.savefig(part, dpi=150, format="png")
        part.replace(path)


def plotting() -> None:
    """
    Raises:
        ConfigError: if matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("a sweep needs matplotlib; pip install 'graphopt[sweep]'") from None


def _points(results: Sequence[Result]) -> tuple[list[float], list[float]]:
    return [one["relative"] for one in results], [one["value"] for one in results]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def front(results: Iterable[Result], maximize: bool) -> frozenset[str]:
    """The keys of the results of one model that no other one is better than; of equals, the first."""
    sign = -1.0 if maximize else 1.0
    done = [one for one in results if one["status"] == "ok"]
    best, found = float("inf"), set()
    for one in sorted(done, key=lambda one: (one["relative"], sign * one["value"])):
        if sign * one["value"] < best:
            best = sign * one["value"]
            found.add(one["key"])
    return frozenset(found)
