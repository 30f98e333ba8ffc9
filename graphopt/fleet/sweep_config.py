"""`sweep.toml`: which models, pipelines, backends and options are tried.

A pipeline may have places, `prune{ratio=$ratio}`, that values of the table [grid] are put in: every
combination is a trial. With [study], Optuna chooses among them instead. Errors name the line and the nearest
valid key, as those of `graphopt.toml` do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Template
from typing import Any, Literal

from pydantic import Field

from graphopt.builds import toml
from graphopt.builds.toml import Location, Section, nearest
from graphopt.fleet.trials import Trial

NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]*$"
TAKEN = ("pipeline", "backend", "precision")  # what a study chooses too
SOURCE = "source"  # the name of the trial that runs the model as it is


class Sweep(Section):
    """How trials are run."""

    output: str = Field("sweep", min_length=1, description="a folder")
    metric: str | None = Field(
        None, description="package.module:callable(model) -> float; without, the error"
    )
    maximize: bool = Field(True, description="whether more of the metric is better")
    data: str | None = Field(None, description="package.module:callable -> [(inputs, target), ...]")
    backends: list[str] = Field(["eager"], min_length=1)
    precisions: list[Literal["none", "bf16", "int8"]] = Field(["none"], min_length=1)
    processes: int | None = Field(None, ge=1, description="at once; 1, or what a cluster has")
    threads: int = Field(1, ge=1, description="of each process")
    retries: int = Field(2, ge=0, description="of a trial whose process dies")
    seconds: float = Field(2.0, gt=0, description="that a trial is timed for")
    limit: float | None = Field(None, gt=0, description="seconds that a trial may take")


class Swept(Section):
    """A model; its metric and data, if they are not those of all."""

    name: str = Field(pattern=NAME)
    source: str = Field(min_length=1, description="as for [model] of graphopt.toml")
    trust: bool = False
    metric: str | None = None
    data: str | None = None


class Passes(Section):
    """A pipeline; `$name` stands for a value of [grid] or a range."""

    name: str = Field("deploy", pattern=NAME)
    passes: str = Field("deploy", min_length=1)


class Range(Section):
    """Numbers between two ends, integers if both are; of a study only."""

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None


class Study(Section):
    """Optuna chooses what is tried, by latency and metric."""

    trials: int = Field(ge=1, description="of each model")
    seed: int = Field(0, ge=0)
    ranges: dict[str, Range] = Field(default_factory=dict)


class Config(Section):
    """The whole file."""

    sweep: Sweep = Sweep()
    models: list[Swept] = Field(min_length=1)
    pipelines: list[Passes] = Field(default=[Passes()], min_length=1)
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    study: Study | None = None


class File(toml.File[Config]):
    """A configuration that was read, with everything in it checked."""

    schema = Config

    def check(self) -> None:
        self._check_names()
        self._check_values()
        self._check_trials()

    def _check_names(self) -> None:
        config = self.config
        models = [one.name for one in config.models]
        pipelines = [one.name for one in config.pipelines]
        for key, taken, names in (("models", set(), models), ("pipelines", {SOURCE}, pipelines)):
            for number, name in enumerate(names):
                if name in taken:
                    raise self.error((key, number, "name"), f"{name!r} is taken already")
                taken.add(name)

    def _check_values(self) -> None:
        """Of the grid and of ranges."""
        study, used = self.config.study, set()
        ranges = {} if study is None else study.ranges
        known = {*self.config.grid, *ranges}
        for number, one in enumerate(self.config.pipelines):
            template = Template(one.passes)
            where: Location = ("pipelines", number, "passes")
            if not template.is_valid():
                raise self.error(where, "a $ that no name follows; expected $name, or $$ for a $")
            for name in template.get_identifiers():
                used.add(name)
                if name not in known:
                    raise self.error(where, f"${name} has no values{nearest(name, known)}")
        for name, values in self.config.grid.items():
            where = ("grid", name)
            if name in ranges:
                raise self.error(where, "it is a range of [study] too")
            if not values:
                raise self.error(where, "expected at least one value")
            for value in values:
                if not isinstance(value, (str, int, float)):
                    raise self.error(
                        where, f"expected text, numbers or booleans, found {value!r:.80}"
                    )
        for name, ends in ranges.items():
            where = ("study", "ranges", name)
            if not ends.low < ends.high or (ends.log and ends.low <= 0):
                raise self.error(where, f"expected {'0 < ' if ends.log else ''}low < high, found {ends.low} "
                                 f"and {ends.high}")  # fmt: skip
            if ends.step is not None and (ends.step <= 0 or ends.log):
                raise self.error(where, "expected step > 0, and no log with it")
        for name in known:
            where = ("grid", name) if name in self.config.grid else ("study", "ranges", name)
            if name in TAKEN:
                raise self.error(
                    where, f"the name is taken; expected another than {', '.join(TAKEN)}"
                )
            if name not in used:
                raise self.error(where, f"no pipeline has ${name}{nearest(name, used)}")

    def _check_trials(self) -> None:
        """Passes, backends and callables are there."""
        from graphopt.backends.base import BackendError, find
        from graphopt.optimize import at_precision, pipeline_of
        from graphopt.passes.base import PassError
        from graphopt.pipeline import PipelineError
        from graphopt.sources import SourceError

        settings = self.config.sweep
        for one in settings.backends:
            try:
                if one != "auto":
                    find(one)
            except (BackendError, ValueError) as error:
                raise self.error(("sweep", "backends"), str(error)) from error
        with self.importable():
            for number, pipeline in enumerate(self.config.pipelines):
                where: Location = ("pipelines", number, "passes")
                for values in self.examples(pipeline):
                    try:
                        made = pipeline_of("deploy", filled(pipeline, values))
                        for precision in settings.precisions:
                            at_precision(made, None if precision == "none" else precision, "deploy")
                    except (PipelineError, PassError, SourceError, ValueError) as error:
                        told = ", ".join(f"{name} = {value!r}" for name, value in values.items())
                        raise self.error(
                            where, f"{error}{f' (with {told})' if told else ''}"
                        ) from error
            for number, model in enumerate(self.config.models):
                for key in ("metric", "data"):
                    own = getattr(model, key)
                    where = ("sweep", key) if own is None else ("models", number, key)
                    self._check_callable(where, getattr(settings, key) if own is None else own)
                if ":" in model.source and not self.within(model.source).exists():
                    if model.source.partition(":")[0] not in ("torchvision", "timm"):
                        self._check_callable(("models", number, "source"), model.source)

    def _check_callable(self, where: Location, text: str | None) -> None:
        from graphopt.sources import SourceError, import_object

        if text is None:
            return
        try:
            found = import_object(text, "expected package.module:callable")
        except (SourceError, ValueError) as error:
            raise self.error(where, str(error)) from error
        if not callable(found):
            raise self.error(where, f"{text} is {type(found).__name__}, expected a callable")

    def importable(self) -> Any:
        """Callables of a configuration are looked for beside it first."""
        from graphopt.builds.building import importable

        return importable(self.folder)

    def examples(self, pipeline: Passes) -> Iterator[dict[str, Any]]:
        """The combinations of values that a pipeline has places for; of a range, its ends."""
        study = self.config.study
        ranges = {} if study is None else study.ranges
        names = Template(pipeline.passes).get_identifiers()
        values = [
            self.config.grid[one]
            if one in self.config.grid
            else [ranges[one].low, ranges[one].high]
            for one in names
        ]
        for chosen in itertools.product(*values):
            yield dict(zip(names, chosen, strict=True))

    def trial(
        self, model: Swept, pipeline: Passes | None, options: Mapping[str, Any] | None = None,
        backend: str = "eager", precision: str = "none",
    ) -> Trial:  # fmt: skip
        """A trial of a model; without a pipeline, of the model as it is."""
        settings, path = self.config.sweep, self.within(model.source)
        return Trial(
            model.name, str(path) if path.exists() else model.source,
            SOURCE if pipeline is None else pipeline.name,
            None if pipeline is None else filled(pipeline, options or {}),
            backend, None if precision == "none" else precision, dict(options or {}), model.trust,
            settings.metric if model.metric is None else model.metric,
            settings.data if model.data is None else model.data,
            settings.threads, settings.seconds, str(self.folder), settings.limit,
        )  # fmt: skip

    def sources(self) -> list[Trial]:
        """Every model as it is."""
        return [self.trial(one, None) for one in self.config.models]

    def grid(self) -> list[Trial]:
        """Every combination, each once."""
        settings = self.config.sweep
        found: dict[tuple[str, str], Trial] = {}
        for model, pipeline in itertools.product(self.config.models, self.config.pipelines):
            for chosen in itertools.product(
                self.examples(pipeline), settings.backends, settings.precisions
            ):
                one = self.trial(model, pipeline, *chosen)
                found.setdefault((model.name, one.key), one)
        return list(found.values())


def filled(pipeline: Passes, options: Mapping[str, Any]) -> str:
    """The text of a pipeline with values in their places."""
    spelt = {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in options.items()
    }
    return Template(pipeline.passes).substitute(spelt)


def read(path: Path) -> File:
    """The configuration in a file.

    Raises:
        ConfigError: naming the line, what was expected and what was found.
    """
    return File.read(path)
