"""sweep(): models and pipelines tried, in processes here or on a Ray cluster.

    OUTPUT/trials/KEY.json    the result of a trial, written in one step when it is there
    OUTPUT/trials/KEY.log     what its process printed
    OUTPUT/results.json, table.md, pareto.png

A trial whose result is stored is not run again, so a sweep that was ended at any moment goes on from there.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from graphopt.builds.errors import NotWritten
from graphopt.files import write
from graphopt.fleet.outcome import Swept, front, plotting
from graphopt.fleet.runners import Cluster, Processes, Runner, connected
from graphopt.fleet.study import Grid, Studies, library
from graphopt.fleet.sweep_config import File, read
from graphopt.fleet.trials import Result, Trial

Say = Callable[[str], None]


def sweep(
    path: str | os.PathLike[str], *, ray: str | None = None, retry: bool = False, progress: Say | None = None
) -> Swept:  # fmt: skip
    """Run the trials that a configuration describes, those that have no result yet.

    Args:
        path: a `sweep.toml`; see docs/sweep.md.
        ray: the address of a Ray cluster, "auto" for the one that there is, "local" to start one.
        retry: run trials again that failed.
        progress: called with a line of text at each step.

    Raises:
        ConfigError: if the configuration cannot be used, or an extra is not installed.
        NotWritten: if results cannot be stored.
    """
    file, say = read(Path(path)), progress or (lambda _: None)
    plotting()
    if file.config.study is not None:
        library()
    settings, output = file.config.sweep, file.within(file.config.sweep.output)
    try:
        store = _Store(output / "trials", retry)
        with ExitStack() as stack:
            runner: Runner
            if ray is None:
                runner = Processes(settings.processes or 1, settings.retries, store.folder)
            else:
                cpus = None if settings.processes is None else settings.processes * settings.threads
                cluster = stack.enter_context(connected(ray, cpus))
                runner = Cluster(cluster, settings.processes, settings.threads, settings.retries)
            stack.callback(runner.close)
            found = _all(file, runner, store, say)
        models = {one.name: one.metric or settings.metric for one in file.config.models}
        measured = {
            name: ("error", False)
            if metric is None
            else (metric.rpartition(":")[2], settings.maximize)
            for name, metric in models.items()
        }
        order = list(models)
        found.sort(key=lambda one: (order.index(one["trial"]["model"]), one["status"] != "ok",
                                    one.get("relative", 0.0)))  # fmt: skip
        fronts = (front((one for one in found if one["trial"]["model"] == name), more)
                  for name, (_, more) in measured.items())  # fmt: skip
        swept = Swept(output, found, frozenset().union(*fronts), measured, store.written)
        say("drawing")
        swept.store()
    except OSError as error:
        raise NotWritten(f"{output}: {error.strerror or error}") from error
    return swept


def _all(file: File, runner: Runner, store: _Store, say: Say) -> list[Result]:
    """The results of the sources, then of a grid or of studies."""
    questions: Grid | Studies = Grid([*file.sources(), *file.grid()])
    found = []
    if file.config.study is not None:
        found = _each(Grid(file.sources()), runner, store, say)
        questions = Studies(file, store.all(), runner.slots)
        found += questions.known
    return found + _each(questions, runner, store, say)


def _each(questions: Grid | Studies, runner: Runner, store: _Store, say: Say) -> list[Result]:
    found: list[Result] = []
    running = 0
    while True:
        while running < runner.slots and (trial := questions.ask()) is not None:
            if (result := store.get(trial)) is None:
                say(str(trial))
                runner.submit(trial)
                running += 1
            else:
                questions.tell(trial, result)
                found.append(result)
        if not running:
            return found
        trial, result = runner.finished()
        running -= 1
        store.put(result)
        questions.tell(trial, result)
        found.append(result)


class _Store:
    """Results in files by the keys of their trials."""

    def __init__(self, folder: Path, retry: bool) -> None:
        self.folder, self._retry, self.written = folder, retry, 0
        folder.mkdir(parents=True, exist_ok=True)

    def all(self) -> list[Result]:
        """Every result that counts."""
        found = (self._read(path) for path in sorted(self.folder.glob("*.json")))
        return [one for one in found if one is not None]

    def get(self, trial: Trial) -> Result | None:
        found = self._read(self.folder / f"{trial.key}.json")
        return None if found is None else {**found, "trial": dataclasses.asdict(trial)}

    def put(self, result: Result) -> None:
        text = json.dumps(result, indent=1, sort_keys=True, allow_nan=False)
        write(self.folder / f"{result['key']}.json", text + "\n")
        self.written += 1

    def _read(self, path: Path) -> Result | None:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            fits = found["key"] == path.stem and (found["status"] == "ok" or not self._retry)
            return found if fits else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None  # damaged: it is run again
