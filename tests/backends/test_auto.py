"""backend="auto": what is built, measured and kept, by backends of known speed and a clock of our own."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import given, strategies as st
from torch import fx, nn

import graphopt
from graphopt.backends import auto, base, choices
from graphopt.backends.auto import Choice, Task, Tuning
from graphopt.backends.base import Backend
from graphopt.backends.measure import FEWEST, MOST, measure
from graphopt.ir.capture import capture
from graphopt.ir.interpret import Interpreter
from graphopt.verify.truth import Truth
from tests.helpers import Net

X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Clock:
    """Time that passes only in what is measured."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclasses.dataclass
class Fake:
    """A backend for `SCALED` that takes `build` seconds to build (`declared`, it says) and `seconds` a call,
    and is off by `error`."""

    name: str
    seconds: float | Iterable[float] = 1.0
    build: float = 0.1
    declared: float | None = None
    error: float = 0.0
    result: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
    built: int = 0
    calls: int = 0

    def backend(self, clock: Clock) -> Backend:
        times = itertools.repeat(self.seconds) if isinstance(self.seconds, float) else self.seconds
        times = iter(times)

        def lower(module, trainable):
            clock.now += self.build
            self.built += 1

            def run(x):
                self.calls += 1
                clock.now += next(times)
                return self.result(2 * x * (1 + self.error))

            return run

        declared = self.build if self.declared is None else self.declared
        return Backend(self.name, lower, build_seconds=(declared, 0.0))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def module_of(clock: Clock, eager: float, scale: float = 2.0) -> fx.GraphModule:
    model = Net(lambda net, x: x * scale)
    module = graphopt.optimize(model, (X,)).graph_module
    module.register_forward_pre_hook(lambda *_: setattr(clock, "now", clock.now + eager))
    return module


def judge(found):
    (one,) = found
    return float((one - 2 * X).norm() / (2 * X).norm()), 1e-5


def choose(
    clock: Clock, *fakes: Fake, eager: float = 1.0, seconds: float = 1000.0, tuning=None
) -> Choice:
    task = Task(module_of(clock, eager), (X,), {}, False, judge)
    backends = [base.find("eager"), *(one.backend(clock) for one in fakes)]
    return auto.choose(task, backends, tuning or Tuning(seconds, clock=clock))


def row(choice: Choice, name: str) -> auto.Row:
    return next(one for one in choice.rows if one.backend == name)


# -- what is kept -----------------------------------------------------------------------------------


def test_the_fastest_is_kept_and_the_table_has_everyone(clock):
    found = choose(clock, Fake("prepacked", 0.8), Fake("quick", 0.5, build=3.0), Fake("slow", 2.0))
    assert found.backend == "quick"
    assert torch.equal(found.run(X), 2 * X)
    assert [one.backend for one in found.rows] == ["eager", "prepacked", "quick", "slow"]
    quick = row(found, "quick").data()
    assert quick["chosen"] and quick["build s"] == pytest.approx(3.5)  # with a first call
    assert (quick["ms"], quick["speed-up"], quick["spread"]) == (500.0, 2.0, 0.0)
    assert quick["error"] < 1e-7
    assert sum(one.chosen for one in found.rows) == 1


@pytest.mark.parametrize(("seconds", "kept"), [(0.98, "eager"), (0.96, "other"), (1.02, "eager")])
def test_three_percent_are_noise_and_the_simpler_one_is_kept(clock, seconds, kept):
    assert choose(clock, Fake("other", seconds)).backend == kept


@pytest.mark.parametrize("wrong", [
    Fake("odd", 0.1, error=1e-3),
    Fake("odd", 0.1, result=lambda x: x.double()),
    Fake("odd", 0.1, result=lambda x: x[:2]),
    Fake("odd", 0.1, result=lambda x: (x, x)),
    Fake("odd", 0.1, result=lambda x: x * torch.nan),
    Fake("odd", 0.1, result=lambda x: x.missing),
], ids=["value", "dtype", "shape", "number", "nan", "raises"])  # fmt: skip
def test_what_is_wrong_or_fails_is_out_with_a_line(clock, wrong):
    found = choose(clock, wrong)
    assert found.backend == "eager"
    assert row(found, "odd").note and row(found, "odd").seconds is None
    assert any(one.startswith(("odd: not used", "odd: failed")) for one in found.notes)


def test_eager_is_left_when_all_fail(clock):
    fakes = [Fake(name, 0.1, error=1.0) for name in ("prepacked", "a", "b")]
    found = choose(clock, *fakes)
    assert found.backend == "eager" and len(found.notes) == 3


def test_one_that_returns_the_module_itself_is_no_candidate(clock):
    task = Task(module_of(clock, 1.0), (X,), {}, True, judge)
    same = Backend("prepacked", lambda module, trainable: module)
    found = auto.choose(task, [base.find("eager"), same], Tuning(10, clock=clock))
    assert [one.backend for one in found.rows] == ["eager"]


# -- what it costs ----------------------------------------------------------------------------------


def test_no_time_takes_prepacked_at_once(clock):
    first, other = Fake("prepacked", 5.0), Fake("other", 0.1)
    found = choose(clock, first, other, seconds=0)
    assert found.backend == "prepacked" and first.calls == 1 and other.built == 0
    assert choose(clock, Fake("prepacked", error=1.0), other, seconds=0).backend == "eager"


def test_what_needs_more_than_is_left_is_not_started_and_named(clock):
    long, short = Fake("long", 0.001, build=41.0), Fake("short", 0.5)
    found = choose(clock, long, short, seconds=30.0)
    assert found.backend == "short" and long.built == 0
    (note,) = (one for one in found.notes if "long" in one)
    assert "not tried: needs about 4" in note and "30.0 s are left of tune_seconds=30" in note


def test_prepacked_is_built_before_the_time_runs(clock):
    assert choose(clock, Fake("prepacked", 0.5, build=50.0), seconds=10).backend == "prepacked"


@given(
    seconds=st.floats(1, 50),
    fakes=st.lists(st.tuples(st.floats(0.001, 3), st.floats(0.01, 30)), min_size=1, max_size=5),
)
def test_honest_backends_keep_within_the_time(seconds, fakes):
    """Beyond it is at most a check, a warm-up and a round of what turned out slower than eager."""
    clock = Clock()
    made = [Fake(f"b{n}", one, build=build) for n, (one, build) in enumerate(fakes)]
    tuning = Tuning(seconds, cache=False, clock=clock)
    choose(clock, *made, tuning=tuning)
    calls = sum(one.seconds for one in made if one.built) + 1.0
    assert tuning.spent <= seconds + FEWEST * calls


def test_regions_share_the_time(clock):
    tuning = Tuning(10.0, cache=False, clock=clock)
    choose(clock, Fake("one", 0.5, build=4.0), tuning=tuning)
    assert tuning.spent > 4
    found = choose(clock, again := Fake("one", 0.5, build=4.0), tuning=tuning)
    assert again.built == 0 and "not tried" in found.notes[0]
    assert tuning.anew().left == 10.0


@pytest.mark.parametrize("seconds", [-1, float("nan")])
def test_seconds_have_to_be_a_time(seconds):
    with pytest.raises(ValueError, match="tune_seconds: expected a number of seconds >= 0, found"):
        graphopt.optimize(nn.ReLU(), (X,), backend="auto", tune_seconds=seconds)


# -- measuring --------------------------------------------------------------------------------------


def timed(clock: Clock, seconds: Iterable[float]) -> Callable[[], None]:
    times = iter(seconds)
    return lambda: setattr(clock, "now", clock.now + next(times))


def test_spikes_do_not_decide(clock):
    spiky = itertools.cycle([0.5, 0.5, 9.0])
    found = measure(
        {"a": timed(clock, itertools.repeat(1.0)), "b": timed(clock, spiky)}, 1e9, clock
    )
    assert found["b"].median == 0.5 and found["a"].median == 1.0


def test_a_clearly_slower_one_is_measured_twice(clock):
    calls = {"a": 1.0, "b": 1.05, "c": 2.0}
    found = measure({k: timed(clock, itertools.repeat(v)) for k, v in calls.items()}, 1e9, clock)
    assert len(found["c"].rounds) == 2
    assert len(found["a"].rounds) == len(found["b"].rounds) == FEWEST  # the order is stable


def test_equals_are_measured_to_the_end_and_the_order_rotates(clock):
    order: list[str] = []

    def call(name):
        def run():
            order.append(name)
            clock.now += 1.0

        return run

    found = measure({name: call(name) for name in "abc"}, 1e9, clock)
    assert all(len(one.rounds) == MOST for one in found.values())
    assert order[3:12] == [*"abc", *"bca", *"cab"]


def test_a_round_of_short_calls_is_above_the_noise(clock):
    calls = {"a": timed(clock, itertools.repeat(1e-5))}
    before = clock.now
    measure(calls, 0.0, clock)
    assert clock.now - before >= 0.002


def test_with_several_threads_the_others_fall_asleep_first(clock, monkeypatch):
    """A call right after one of another runtime would be timed beside its threads, which still spin."""
    order: list[str] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr("time.sleep", lambda seconds: order.append("pause"))

    def call(name):
        def run():
            disturbed = order[-1:] not in ([name], [])
            order.append(name)
            clock.now += 5.0 if disturbed else 1.0

        return run

    found = measure({name: call(name) for name in "ab"}, 1e9, clock)
    assert found["a"].median == found["b"].median == 1.0
    assert order[2:8] == ["pause", "a", "a", "pause", "b", "b"]


def test_a_slow_machine_slows_everyone(clock):
    """The load doubles all times halfway: neither side is favoured."""

    def call(seconds):
        def run():
            clock.now += seconds * (2 if clock.now > 110 else 1)

        return run

    found = measure({"a": call(1.0), "b": call(1.1)}, 1e9, clock)
    assert found["a"].median < found["b"].median


# -- the cache --------------------------------------------------------------------------------------


def test_a_known_graph_builds_the_winner_alone(clock, folder):
    def fakes():
        return Fake("prepacked", 0.9), Fake("quick", 0.5), Fake("slow", 0.7)

    choose(clock, *fakes())
    first, quick, slow = fakes()
    found = choose(clock, first, quick, slow)
    assert found.backend == "quick" and (quick.built, slow.built) == (1, 0)
    assert quick.calls == 1  # it is still checked
    (note,) = found.notes
    assert note.startswith("quick: chosen from the cache of 20") and "measured 500 ms" in note
    assert row(found, "slow").data()["ms"] == 700.0
    assert (folder / "choices.json").is_file()
    for off in (Tuning(1000, cache=False, clock=clock), Tuning(1000, clock=clock)):
        if off.cache:
            (folder / "choices.json").unlink()
        choose(clock, *fakes()[:2], slow := Fake("slow", 0.7), tuning=off)
        assert slow.built == 1


def test_an_empty_variable_switches_it_off(clock, folder, monkeypatch):
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", "")
    for _ in range(2):
        choose(clock, quick := Fake("quick", 0.5), slow := Fake("slow", 0.7))
        assert quick.built == slow.built == 1
    assert not folder.exists()


def test_a_winner_that_is_wrong_now_is_measured_anew(clock):
    choose(clock, Fake("quick", 0.5), Fake("slow", 0.7))
    found = choose(clock, Fake("quick", 0.5, error=1.0), Fake("slow", 0.7))
    assert found.backend == "slow"
    assert any("quick, does not hold; measuring again" in one for one in found.notes)


def test_more_time_tries_what_was_left_out(clock):
    fakes = Fake("short", 0.5), Fake("long", 0.1, build=40.0)
    assert choose(clock, *fakes, seconds=20).backend == "short"
    assert choose(clock, *fakes, seconds=30).backend == "short"
    assert fakes[0].built == 2 and fakes[1].built == 0
    assert choose(clock, *fakes, seconds=100).backend == "long"
    assert choose(clock, *fakes, seconds=20).backend == "short"  # no time to build the best


def test_what_was_left_out_for_another_build_is_left_out_again(clock):
    """At the start there seems to be time for it; the others took that."""
    fakes = Fake("short", 0.5, build=25.0), Fake("long", 0.1, build=40.0)
    for _ in range(2):
        assert choose(clock, *fakes, seconds=50).backend == "short"
    assert fakes[1].built == 0
    measured = fakes[0].calls
    choose(clock, *fakes, seconds=50)
    assert fakes[0].calls - measured <= 2  # checked, not measured


def test_a_build_that_is_expected_to_take_no_time(clock):
    assert choose(clock, Fake("free", 0.5, build=0.0)).backend == "free"


def test_a_user_without_a_home_keeps_no_choices(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    for name in ("GRAPHOPT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(choices.Path, "home", homeless)
    assert choices.folder() is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1, "choices": 3, "builds": {}}',
                                  '{"format": 99, "choices": {}, "builds": {}}'])  # fmt: skip
def test_a_damaged_file_is_as_none(clock, folder, text):
    folder.mkdir()
    (folder / "choices.json").write_text(text)
    assert choose(clock, Fake("quick", 0.5)).backend == "quick"
    choose(clock, quick := Fake("quick", 0.5), slow := Fake("slow", 0.9))
    assert json.loads((folder / "choices.json").read_text())["choices"]
    assert quick.built == slow.built == 1


@pytest.mark.parametrize("entry", [3, {}, {"date": "x"}, {"date": "x", "milliseconds": {"quick": "y"},
                                   "builds": {}, "left_out": {}}])  # fmt: skip
def test_a_damaged_entry_is_as_none(clock, folder, entry):
    choose(clock, Fake("quick", 0.5))
    path = folder / "choices.json"
    data = json.loads(path.read_text())
    data["choices"] = dict.fromkeys(data["choices"], entry)
    path.write_text(json.dumps(data))
    found = choose(clock, Fake("quick", 0.5))
    assert found.backend == "quick" and any("is damaged" in one for one in found.notes)


def test_a_folder_that_cannot_be_written_costs_a_note(clock, folder):
    folder.write_text("a file")
    found = choose(clock, Fake("quick", 0.5))
    assert found.backend == "quick"
    assert any("the choice is not kept" in one for one in found.notes)


def test_how_long_builds_took_corrects_the_estimate(clock):
    """One that takes ten times what it declares is believed no more, on another graph too."""
    liar = Fake("liar", 0.5, build=20.0, declared=2.0)
    choose(clock, liar, seconds=15)
    assert liar.built == 1
    task = Task(module_of(clock, 1.0, scale=3.0), (X,), {}, False, lambda found: (0.0, 1.0))
    found = auto.choose(task, [base.find("eager"), liar.backend(clock)], Tuning(15, clock=clock))
    assert liar.built == 1 and "liar: not tried: needs about 2" in found.notes[0]


def key(model: nn.Module, *inputs: torch.Tensor) -> str:
    module = graphopt.optimize(model.eval(), inputs).graph_module
    return choices.key(module, list(inputs), False, ["eager"])


def test_the_key_knows_the_graph_and_not_its_weights(monkeypatch):
    x = torch.randn(2, 4)

    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(4, 3)

        def forward(self, y):
            return self.other(y)

    known = key(nn.Sequential(nn.Linear(4, 3)), x)
    assert known == key(nn.Sequential(nn.Linear(4, 3)), torch.ones(2, 4)) == key(Renamed(), x)
    others = [
        key(nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4)),
        key(nn.Sequential(nn.Linear(4, 3, bias=False)), x),
        key(nn.Sequential(nn.Linear(4, 5)), x),
        key(nn.Sequential(nn.Linear(4, 3)).double(), x.double()),
        key(nn.Sequential(nn.Linear(4, 3), nn.LeakyReLU(0.1)), x),
        key(nn.Sequential(nn.Linear(4, 3), nn.LeakyReLU(0.2)), x),
    ]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    others.append(key(nn.Sequential(nn.Linear(4, 3)), x))
    assert len({known, *others}) == 1 + len(others)


# -- the truth --------------------------------------------------------------------------------------


def truth_of(model: nn.Module, *inputs: torch.Tensor) -> Truth:
    return Truth(capture(model.eval(), inputs, {}).graph, inputs)


def test_rounding_is_right_and_a_small_error_is_not():
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)), torch.randn(8, 64)
    truth = truth_of(model, x)
    assert truth.own_error < 1e-6
    with torch.no_grad():
        found = model(x)
        for factor, right in ((1 + 1e-6, True), (1 + 1e-4, False)):
            error, limit = truth.judge([factor * found])
            assert (error <= limit) == right


def test_bfloat16_has_its_own_limit():
    model, x = nn.Linear(64, 64).bfloat16(), torch.randn(8, 64).bfloat16()
    truth = truth_of(model, x)
    with torch.no_grad():
        error, limit = truth.judge([model(x)])
    assert error <= limit and 1e-3 < limit < 1


def test_a_class_may_differ_only_where_rounding_decides_it():
    logits = torch.randn(50, 8, dtype=torch.float64)
    logits[0, 1] = logits[0].max() + 1
    logits[0, 2] = logits[0, 1] * (1 + 1e-8)  # the same in float32
    truth = truth_of(Net(lambda net, x: (x / 3).argmax(1)), logits.float())
    right = truth.outputs[0]
    clear = right.clone()
    clear[1] = (clear[1] + 1) % 8
    assert truth.judge([right])[0] == 0
    error, limit = truth_of(Net(lambda net, x: (x / 3).argmax(1)), logits[1:].float()).judge(
        [clear[1:]]
    )
    assert not error <= limit


def test_each_output_has_its_own_limit():
    """Whatever the others are: a coarse output does not excuse a fine one, or a whole number."""
    x = torch.randn(8, 64)

    def body(net, x):
        return x.bfloat16() * 3, x * 3, (x > 0).long()

    truth, right = truth_of(Net(body), x), body(None, x)
    for wrong in ((0, 1 + 2**-7, True), (0, 3.0, False), (1, 1 + 1e-7, True), (1, 1 + 1e-3, False)):
        at, factor, allowed = wrong
        error, limit = truth.judge(
            [factor * one if at == i else one for i, one in enumerate(right)]
        )
        assert (error <= limit) == allowed
    classes = right[2].clone()
    classes[0, 0] = 1 - classes[0, 0]
    error, limit = truth.judge([*right[:2], classes])
    assert not error <= limit


def fires(weight: torch.Tensor, limit: float) -> nn.Module:
    return Net(lambda net, x: x @ weight >= limit)


def test_where_rounding_decides_a_spike_either_is_right():
    """The model alone is right by luck, a sum in another order is not: it may be. A clear case may not."""
    for seed in range(300):
        drawn = torch.Generator().manual_seed(seed)
        x, weight = (torch.randn(shape, generator=drawn) for shape in ((4, 256), (256,)))
        limit = float((x[0].double() @ weight.double()).float())
        truth, other = truth_of(fires(weight, limit), x), fires(weight.flip(0), limit)(x.flip(1))
        if truth.own_error == 0 and not torch.equal(other, truth.outputs[0]):
            break
    else:
        pytest.fail("no such sum")
    error, limit = truth.judge([other])
    assert 0 < error <= limit
    truth = truth_of(fires(weight, 1e-3), x)
    error, limit = truth.judge([~truth.outputs[0]])
    assert not error <= limit


def test_a_model_that_draws_is_compared_with_its_own_draws():
    model = Net(lambda net, x: torch.nn.functional.dropout(x, 0.5, True))
    truth = truth_of(model, X)
    assert truth.random and truth.own_error == 0
    fast = graphopt.optimize(model, (X,), backend="prepacked")
    (said,) = [one for one in fast.report.backend_notes if "not float64" in one]
    assert said.endswith("it draws random numbers")


def test_a_graph_without_a_float64_run_says_why(monkeypatch):
    call = Interpreter.call

    def failing(self, node, env):
        if self.lifted:
            raise ValueError("no such kernel")
        return call(self, node, env)

    truth = truth_of(Net(lambda net, x: x.sin()), X)
    monkeypatch.setattr(Interpreter, "call", failing)
    assert torch.equal(truth.outputs[0], X.sin()) and truth.reason == "ValueError: no such kernel"


# -- in one piece -----------------------------------------------------------------------------------


def test_optimize_measures_and_reports(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    x = torch.randn(2, 3, 16, 16)
    monkeypatch.setattr(base, "_HOMES", {
        name: base._HOMES[name] for name in ("eager", "prepacked", "inductor")
    })  # fmt: skip
    said: list[str] = []
    fast = graphopt.optimize(model, (x,), backend="auto", tune_seconds=2, progress=said.append)
    report = fast.report
    table = {one["backend"]: one for one in report.backend_table}
    assert list(table) == ["eager", "prepacked", "inductor"]
    assert table[report.backend]["chosen"] and report.backend in ("eager", "prepacked")
    assert table["eager"]["speed-up"] == 1.0 and table["prepacked"]["error"] < 1e-5
    assert any("inductor: not tried: needs about" in one for one in report.backend_notes)
    assert "measuring eager, prepacked" in said
    text = str(report)
    assert "backend    build s" in text and f"* {report.backend}" in text
    again = graphopt.Report.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False)))
    assert again.backend_table == report.backend_table and str(again) == text
    report = graphopt.optimize(model, (x,), backend="auto", tune_seconds=2).report
    assert any("chosen from the cache of" in one for one in report.backend_notes)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))


def test_a_lying_backend_is_found_out_by_float64(monkeypatch):
    class Lies:
        def __init__(self, module):
            self.module = module

        def __call__(self, *args):
            return self.module(*args) * (1 + 1e-4)

    lies = Backend("lies", lambda module, trainable: Lies(module), build_seconds=(0, 0))
    monkeypatch.setattr(base, "candidates", lambda: [base.find("eager"), lies])
    fast = graphopt.optimize(nn.Linear(4, 4), (torch.randn(2, 4),), backend="auto", tune_seconds=5)
    assert fast.report.backend == "eager"
    assert "lies: not used: its outputs differ by 1.0e-04 from float64" in str(fast.report)
