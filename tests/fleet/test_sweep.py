"""The specification of `graphopt sweep`: every trial has a result or a reason, whatever happens to its
process; what is stored is not run again; one table, one picture, and the fronts in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings, strategies as st
from typer.testing import CliRunner

from graphopt.builds.errors import ConfigError
from graphopt.cli import app
from graphopt.fleet import outcome, study, sweeping
from graphopt.fleet.outcome import front
from graphopt.fleet.runners import Processes
from graphopt.fleet.sweep_config import read
from graphopt.fleet.sweeping import sweep
from graphopt.fleet.trials import Result, Trial, run_trial
from tests.fleet.models import DIES_ONCE, answer

BASIC = """\
[sweep]
seconds = 0.02
{sweep}
[[models]]
name = "net"
source = "tests.fleet.models:net"
{model}
[[pipelines]]
name = "pruned"
passes = "canonicalize,prune{{ratio=$ratio}},deploy"
{pipelines}
[grid]
ratio = [0.25, 0.5]
{more}
"""

STUDY = "[study]\ntrials = 1\n[study.ranges]\n"


def configured(folder: Path, **parts: str) -> Path:
    empty = dict.fromkeys(("sweep", "model", "pipelines", "more"), "")
    path = folder / "sweep.toml"
    path.write_text(BASIC.format(**{**empty, **parts}))
    return path


class Inline:
    """Runs trials in this process, one after the other, and remembers which."""

    ran: ClassVar[list[Trial]] = []
    slots = 2

    def __init__(self, *_: Any) -> None:
        self._done: list[tuple[Trial, Result]] = []

    def submit(self, trial: Trial) -> None:
        assert len(self._done) < self.slots
        Inline.ran.append(trial)
        self._done.append((trial, answer(trial)))

    def finished(self) -> tuple[Trial, Result]:
        return self._done.pop()

    def close(self) -> None:
        pass


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> list[Trial]:
    """The trials that were run, by an answer that needs no model."""
    monkeypatch.setattr(sweeping, "Processes", Inline)
    monkeypatch.setattr(outcome.Swept, "draw", lambda *_: None)
    Inline.ran = []
    return Inline.ran


# -- trials -------------------------------------------------------------------------------------------


def trial(**changes: Any) -> Trial:
    told = {"model": "net", "source": "tests.fleet.models:net", "pipeline": "p", "passes": "deploy"}
    return Trial(**{**told, "seconds": 0.01, **changes})


def test_a_trial_tells_metric_error_and_latency_beside_the_source() -> None:
    found = run_trial(trial(passes="canonicalize,prune{ratio=0.5},deploy", backend="prepacked",
                            metric="tests.fleet.models:score"))  # fmt: skip
    source = run_trial(trial(passes=None, metric="tests.fleet.models:score"))
    assert (found["status"], source["status"]) == ("ok", "ok"), found["reason"]
    assert found["backend"] == "prepacked" and found["applied"] > 0
    assert found["parameters"] < source["parameters"]
    assert found["value"] != source["value"] and found["latency"] > 0
    assert source["relative"] == 1.0
    json.dumps(found, allow_nan=False)


def test_without_a_metric_the_value_is_the_error_against_float64() -> None:
    exact, pruned = run_trial(trial()), run_trial(trial(passes="canonicalize,prune{ratio=0.5}"))
    assert 0 < exact["value"] < 1e-5 < pruned["value"] < 10


@pytest.mark.parametrize(("changes", "reason"), [
    ({"source": "tests.fleet.models:gone"}, "has no 'gone'"),
    ({"source": "tests.fleet.models:without_inputs"}, "declares no example inputs"),
    ({"metric": "tests.fleet.models:not_finite"}, "not_finite is nan"),
    ({"metric": "tests.fleet.models:net"}, "TypeError"),
    ({"passes": "canonicalize,no-such-pass"}, "no-such-pass"),
    ({"source": "tests.fleet.models:slow", "limit": 0.2}, "it took more than 0.2 s"),
])  # fmt: skip
def test_a_trial_that_fails_says_why(changes: dict[str, Any], reason: str) -> None:
    found = run_trial(trial(**changes))
    assert found["status"] == "failed"
    assert reason in found["reason"] and "\n" not in found["reason"]


def test_the_key_is_of_all_that_the_result_depends_on() -> None:
    different = [
        trial(), trial(passes=None), trial(passes="tune"), trial(backend="triton"), trial(source="x"),
        trial(precision="bf16"), trial(metric="m:m"), trial(data="m:d"), trial(threads=2),
    ]  # fmt: skip
    assert len({one.key for one in different}) == len(different)
    assert trial(model="other", pipeline="other", folder="/elsewhere").key == trial().key


# -- processes ----------------------------------------------------------------------------------------


def test_a_process_that_dies_is_replaced_and_the_others_go_on(tmp_path: Path) -> None:
    kinds = ("once", "always", "exits", "never")
    trials = [trial(passes=one, options={"dies": one}, folder=str(tmp_path)) for one in kinds]
    runner = Processes(2, 2, tmp_path, run=answer)
    waiting, found = list(trials), {}
    for running in (2, 2, 2, 1):
        while len(waiting) > 0 and len(trials) - len(waiting) - len(found) < running:
            runner.submit(waiting.pop(0))
        one, result = runner.finished()
        found[one.passes] = result
    runner.close()
    assert {name: one["status"] for name, one in found.items()} == {
        "once": "ok", "always": "failed", "exits": "failed", "never": "ok",
    }  # fmt: skip
    assert {name: one["attempts"] for name, one in found.items()} == {
        "once": 2, "always": 3, "exits": 3, "never": 1,
    }  # fmt: skip
    assert found["always"]["reason"].startswith("its process was ended by SIGKILL, 3 times")
    assert found["exits"]["reason"].startswith("its process ended with exit code 7, 3 times")


def test_a_sweep_in_processes_survives_one_that_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real thing, by the command; and again, when there is nothing left to run."""
    (tmp_path / "swept_once.py").write_text(DIES_ONCE)
    path = configured(tmp_path, sweep='metric = "tests.fleet.models:score"\nprocesses = 2')
    path.write_text(path.read_text().replace("tests.fleet.models:net", "swept_once:mortal"))
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(app, ["sweep", str(path), "--json"])
    assert run.exit_code == 0, run.output
    told = json.loads(run.stdout)
    assert [one["status"] for one in told["trials"]] == ["ok"] * 3
    assert sorted(one["attempts"] for one in told["trials"])[-1] == 2
    for name in ("results.json", "table.md", "pareto.png"):
        assert (tmp_path / "sweep" / name).stat().st_size > 0
    assert json.loads((tmp_path / "sweep" / "results.json").read_text())["front"] == told["front"]
    again = CliRunner().invoke(app, ["sweep", str(path)])
    assert again.exit_code == 0 and "3 trials, 0 run now, 0 failed" in again.output


# -- what is run --------------------------------------------------------------------------------------


def test_every_combination_is_run_once_and_the_sources(tmp_path: Path, inline: list[Trial]) -> None:
    path = configured(
        tmp_path, sweep='backends = ["eager", "prepacked"]',
        pipelines='[[pipelines]]\nname = "plain"\npasses = "deploy"',
        more='size = ["1", 1]\n[[models]]\nname = "b"\nsource = "tests.fleet.models:without_inputs"',
    )  # fmt: skip
    path.write_text(path.read_text().replace("{ratio=$ratio}", "{ratio=$ratio,round_to=$size}"))
    found = sweep(path)
    # two models: the source, and by backends: two ratios (sizes are one and the same), one without
    assert len(found.results) == len(inline) == 2 * (1 + 2 * (2 + 1))
    assert {one.passes for one in inline if one.model == "b"} == {
        None, "deploy", *(f"canonicalize,prune{{ratio={one},round_to=1}},deploy" for one in (0.25, 0.5))
    }  # fmt: skip


def test_what_is_stored_is_not_run_again(tmp_path: Path, inline: list[Trial]) -> None:
    path = configured(tmp_path)
    first = sweep(path)
    assert (first.run, len(inline)) == (3, 3)
    assert (sweep(path).run, len(inline)) == (0, 3)
    trials = tmp_path / "sweep" / "trials"
    gone, damaged, kept = sorted(trials.glob("*.json"))
    gone.unlink()
    damaged.write_text(damaged.read_text()[:20])
    again = sweep(path)
    assert {one.key for one in inline[3:]} == {gone.stem, damaged.stem}
    assert kept.stem not in {one.key for one in inline[3:]}
    assert again.results == first.results
    path.write_text(path.read_text().replace("0.25", "0.125"))
    assert sweep(path).run == 1


def test_failed_trials_are_run_again_on_demand(tmp_path: Path, inline: list[Trial]) -> None:
    path = configured(tmp_path, pipelines='[[pipelines]]\nname = "f"\npasses = "deploy$fails"',
                      more='fails = [""]')  # fmt: skip
    path.write_text(path.read_text().replace('[""]', '[",canonicalize"]'))
    found = sweep(path)
    assert [one["reason"] for one in found.failed] == ["as it should"]
    assert "net f fails=,canonicalize eager failed: as it should" in found.markdown()
    assert sweep(path).run == 0
    assert sweep(path, retry=True).run == 1


def test_a_study_asks_for_as_many_trials_and_goes_on(tmp_path: Path, inline: list[Trial]) -> None:
    pytest.importorskip("optuna")

    def trials(number: int) -> Path:
        more = f"{STUDY.replace('= 1', f'= {number}')}ratio = {{ low = 0.1, high = 0.9 }}"
        path = configured(tmp_path, more=more, sweep='metric = "tests.fleet.models:score"')
        path.write_text(path.read_text().replace("ratio = [0.25, 0.5]\n", ""))
        return path

    assert sweep(trials(8)).run == 1 + 8
    ratios = {one.options["ratio"] for one in inline[1:]}
    assert len(ratios) == 8 and all(0.1 <= one <= 0.9 for one in ratios)
    assert sweep(trials(8)).run == 0
    longer = sweep(trials(12))
    assert (longer.run, len(longer.results)) == (4, 1 + 12)
    assert len({one.key for one in inline}) == len(inline)
    path = trials(12)
    path.write_text(path.read_text().replace('name = "net"', 'name = "renamed"'))
    assert {one["trial"]["model"] for one in sweep(path).results} == {"renamed"}
    assert len(inline) == 1 + 12


def test_a_study_of_few_combinations_ends(tmp_path: Path, inline: list[Trial]) -> None:
    pytest.importorskip("optuna")
    assert sweep(configured(tmp_path, more="[study]\ntrials = 50")).run == 1 + 2


def test_extras_that_are_missing_are_named(
    tmp_path: Path, inline: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, say in (("optuna", study.library), ("matplotlib", outcome.plotting)):
        with monkeypatch.context() as patch:
            patch.setitem(__import__("sys").modules, name, None)
            with pytest.raises(ConfigError, match=r"pip install 'graphopt\[sweep\]'"):
                say()
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'graphopt\[ray\]'"):
        sweep(configured(tmp_path), ray="local")
    assert not inline


# -- the front ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), max_size=8), st.booleans())
def test_no_trial_is_better_than_one_on_the_front(
    points: list[tuple[int, int]], more: bool
) -> None:
    results = [{"key": str(number), "status": "ok", "relative": float(x), "value": float(y)}
               for number, (x, y) in enumerate(points)]  # fmt: skip
    found = front([*results, {"key": "no", "status": "failed"}], more)
    best = {points[int(one)] for one in found}
    assert len(best) == len(found)
    for x, y in points:
        better = [
            (a, b)
            for a, b in points
            if a <= x and (b >= y if more else b <= y) and (a, b) != (x, y)
        ]
        assert ((x, y) in best) == (not better)


# -- configurations -----------------------------------------------------------------------------------

VALUES = "[grid]\nratio = [0.25, 0.5]"
NET = 'name = "net"'
WRONG = {
    "is not there": ("", "", "cannot be read"),
    "is no TOML": ("[grid]", "[grid", "sweep.toml:12: not a TOML file"),
    "has an unknown key": (NET, f'{NET}\nsauce = "x"',
                           "sweep.toml:6: models[0].sauce: unknown key; did you mean 'source'?"),
    "has another one": ("seconds = 0.02", "second = 2",
                        "sweep.toml:2: sweep.second: unknown key; did you mean 'seconds'?"),
    "has a wrong type": ("seconds = 0.02", 'seconds = "long"',
                         "sweep.toml:2: sweep.seconds: expected a valid number, found 'long'"),
    "lacks a key": ('source = "tests.fleet.models:net"\n', "", "models[0]: source is missing"),
    "has a name twice": ("[grid]", f'[[models]]\n{NET}\nsource = "a"\n[grid]', "'net' is taken already"),
    "has no such callable": ("models:net", "models:nett", "has no 'nett'; nearest: net"),
    "has no such metric": ("seconds", 'metric = "tests.fleet.models:scor"\nseconds', "has no 'scor'"),
    "has no such backend": ("seconds", 'backends = ["prepackt"]\nseconds', "sweep.backends:"),
    "has no such precision": ("seconds", 'precisions = ["fp4"]\nseconds',
                              "sweep.precisions[0]: expected 'none', 'bf16' or 'int8', found 'fp4'"),
    "has no such option": ("{ratio=", "{ration=", "pipelines[0].passes: prune has no option 'ration'"),
    "has no such value": ("[0.25, 0.5]", "[0.25, 1.5]", "expected 0 <= ratio < 1 (with ratio = 1.5)"),
    "has a table as value": ("[0.25, 0.5]", "[{a = 1}]", "expected text, numbers or booleans"),
    "has no values": ("[0.25, 0.5]", "[]", "grid.ratio: expected at least one value"),
    "has a place without values": ("=$ratio", "=$ratios", "$ratios has no values; did you mean 'ratio'?"),
    "has a dollar": ("=$ratio", "=$", "a $ that no name follows"),
    "has values without a place": ("[grid]", "[grid]\nsize = [1]", "grid.size: no pipeline has $size"),
    "has a name of ours": (VALUES, f"{VALUES}\nbackend = [1]", "grid.backend: the name is taken"),
    "has a range twice": ("[grid]", f"{STUDY}ratio = {{ low = 0.1, high = 0.2 }}\n[grid]",
                          "grid.ratio: it is a range of [study] too"),
    "has a range backwards": (VALUES, f"{STUDY}ratio = {{ low = 0.3, high = 0.2 }}",
                              "study.ranges.ratio: expected low < high, found 0.3 and 0.2"),
    "has a range of text": (VALUES, f'{STUDY}ratio = {{ low = "a", high = 0.2 }}',
                            "study.ranges.ratio.low: expected a valid integer, found 'a'"),
    "has an unknown key in it": (VALUES, f"{STUDY}ratio = {{ low = 0.1, high = 0.2, steps = 3 }}",
                                 "study.ranges.ratio.steps: unknown key; did you mean 'step'?"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_configuration_that_is_wrong(what: str, tmp_path: Path) -> None:
    before, after, message = WRONG[what]
    path = configured(tmp_path)
    if before:
        assert before in path.read_text()
        path.write_text(path.read_text().replace(before, after))
    else:
        path.unlink()
    with pytest.raises(ConfigError) as error:
        read(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_plan_runs_nothing(tmp_path: Path, inline: list[Trial]) -> None:
    path = configured(tmp_path)
    plan = CliRunner().invoke(app, ["sweep", str(path), "--dry-run"])
    assert plan.exit_code == 0, plan.output
    assert [line.split("  ")[1] for line in plan.output.splitlines()] == [
        "net source", "net pruned ratio=0.25 eager", "net pruned ratio=0.5 eager",
    ]  # fmt: skip
    told = json.loads(CliRunner().invoke(app, ["sweep", str(path), "--dry-run", "--json"]).stdout)
    assert [one["options"] for one in told["trials"]] == [{}, {"ratio": 0.25}, {"ratio": 0.5}]
    wrong = CliRunner().invoke(app, ["sweep", str(tmp_path / "none.toml"), "--json"])
    assert wrong.exit_code == 2 and json.loads(wrong.stdout)["code"] == 2
    assert not inline and not (tmp_path / "sweep").exists()
