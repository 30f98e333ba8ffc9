"""What Optuna tries next, for the latency and the metric of each model.

The study itself is not stored: it is made anew from the results that are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from string import Template
from typing import Any

from graphopt.builds.errors import ConfigError
from graphopt.fleet.sweep_config import File, Passes, Swept
from graphopt.fleet.trials import Result, Trial

IDLE = 20  # proposals in a row that were made before: there is nothing else to try


class Grid:
    """Trials that are known beforehand."""

    def __init__(self, trials: Iterable[Trial]) -> None:
        self._trials = iter(trials)

    def ask(self) -> Trial | None:
        return next(self._trials, None)

    def tell(self, trial: Trial, result: Result) -> None:
        pass


class Studies:
    """A study for every model, in turns."""

    def __init__(self, file: File, stored: Iterable[Result], slots: int) -> None:
        stored = list(stored)
        self._studies = {one.name: _Study(file, one, stored, slots) for one in file.config.models}
        self._turns = list(self._studies)
        self.known = [result for one in self._studies.values() for result in one.known]

    def ask(self) -> Trial | None:
        while self._turns:
            name = self._turns.pop(0)
            if (trial := self._studies[name].ask()) is not None:
                self._turns.append(name)
                return trial
        return None

    def tell(self, trial: Trial, result: Result) -> None:
        self._studies[trial.model].tell(trial, result)


@dataclasses.dataclass
class _Asked:
    """A proposal: Optuna's own trial of it."""

    trial: Any
    told: bool = False


class _Study:
    """Of one model. Proposals that were made before are answered with what came of them."""

    def __init__(self, file: File, model: Swept, stored: Iterable[Result], slots: int) -> None:
        optuna = library()
        assert file.config.study is not None
        self._optuna, self._file, self._model, self._settings = (
            optuna,
            file,
            model,
            file.config.study,
        )
        self._results: dict[str, Result] = {}
        known = self.known = [
            {**one, "trial": {**one["trial"], "model": model.name}}
            for one in stored if self._fits(one)
        ]  # fmt: skip
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        better = "maximize" if file.config.sweep.maximize and self._measured else "minimize"
        sampler = optuna.samplers.TPESampler(
            seed=self._settings.seed + len(known), constant_liar=slots > 1
        )
        self._study = optuna.create_study(directions=["minimize", better], sampler=sampler)
        self._asked: dict[str, list[_Asked]] = {}
        for one in sorted(known, key=lambda one: str(one["key"])):
            self._study.enqueue_trial(params(one["trial"]))
            self.tell(self._propose(), one)
        self._left = self._settings.trials - len(self._results)

    def _fits(self, stored: Result) -> bool:
        """Whether a result is of a trial that could be proposed now."""
        told, settings = stored["trial"], self._file.config.sweep
        for pipeline in self._file.config.pipelines:
            names = Template(pipeline.passes).get_identifiers()
            if pipeline.name != told["pipeline"] or set(names) != told["options"].keys():
                continue
            chosen = told["backend"], told["precision"] or "none"
            return (
                chosen[0] in settings.backends
                and chosen[1] in settings.precisions
                and all(self._may_be(name, value) for name, value in told["options"].items())
                and self._file.trial(self._model, pipeline, told["options"], *chosen).key
                == stored["key"]
            )
        return False

    def _may_be(self, name: str, value: Any) -> bool:
        if name in self._file.config.grid:
            return value in self._file.config.grid[name]
        ends = self._settings.ranges[name]
        return isinstance(value, (int, float)) and ends.low <= value <= ends.high

    @property
    def _measured(self) -> bool:
        return (self._model.metric or self._file.config.sweep.metric) is not None

    def ask(self) -> Trial | None:
        for _ in range(IDLE):
            if self._left <= 0:
                return None
            trial = self._propose()
            if trial.key in self._results:
                self.tell(trial, self._results[trial.key])
            elif len(self._asked[trial.key]) == 1:
                self._left -= 1
                return trial
        return None

    def tell(self, trial: Trial, result: Result) -> None:
        """To all proposals of the trial; those that failed are no points."""
        self._results[trial.key] = result
        for one in self._asked.get(trial.key, ()):
            if one.told:
                continue
            one.told = True
            if result["status"] == "ok":
                self._study.tell(one.trial, [result["relative"], result["value"]])
            else:
                self._study.tell(one.trial, state=self._optuna.trial.TrialState.FAIL)

    def _propose(self) -> Trial:
        asked, settings = self._study.ask(), self._file.config.sweep
        by_name = {one.name: one for one in self._file.config.pipelines}
        pipeline = by_name[asked.suggest_categorical("pipeline", list(by_name))]
        backend = asked.suggest_categorical("backend", settings.backends)
        precision = asked.suggest_categorical("precision", settings.precisions)
        options = self._options(asked, pipeline)
        trial = self._file.trial(self._model, pipeline, options, backend, precision)
        self._asked.setdefault(trial.key, []).append(_Asked(asked))
        return trial

    def _options(self, asked: Any, pipeline: Passes) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in Template(pipeline.passes).get_identifiers():
            if name in self._file.config.grid:
                found[name] = asked.suggest_categorical(name, self._file.config.grid[name])
                continue
            ends = self._settings.ranges[name]
            if isinstance(ends.low, int) and isinstance(ends.high, int):
                found[name] = asked.suggest_int(
                    name, ends.low, ends.high, step=int(ends.step or 1), log=ends.log
                )
            else:
                found[name] = asked.suggest_float(
                    name, ends.low, ends.high, step=ends.step, log=ends.log
                )
        return found


def params(trial: dict[str, Any]) -> dict[str, Any]:
    """What a study chose, of a stored trial."""
    return {
        "pipeline": trial["pipeline"], "backend": trial["backend"],
        "precision": trial["precision"] or "none", **trial["options"],
    }  # fmt: skip


def library() -> Any:
    """
    Raises:
        ConfigError: if Optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise ConfigError("[study] needs Optuna; pip install 'graphopt[sweep]'") from None
    return optuna
