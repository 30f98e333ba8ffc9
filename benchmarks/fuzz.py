"""Random models through the whole pipelines: is what comes out right?

    python -m benchmarks.fuzz --models 1000 --seed 0

Every model of `graphopt.testing.strategies.graphs()` is optimized in mode deploy or tune, and its
result compared with it in float64. None of the checks trusts the report or shares code with
graphopt's own:

- outputs: structure, dtypes, values; relative error <= 1e-9, or what the source itself answers to a
  change of its inputs and weights by 1e-15 (relative). Models that round to float32: 1e-5;
- what a call does besides: writes to inputs and buffers as the source's; outputs share memory with
  nothing that the source's do not share it with;
- again on fresh inputs of another batch size, wherever an axis is dynamic;
- tune: the gradients of a random functional, of all parameters and inputs;
- the source is as it was: values, modes, inputs.

A wrong model is shrunk by hypothesis to a minimal one, which is printed. Sites that were rolled
back are no wrong results, but findings: a rewrite was wrong there, or the check is too strict.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import functools
import json
import math
import multiprocessing
import os
import re
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import hypothesis
import hypothesis.strategies as st
import torch
import torch.utils._pytree as pytree
import typer
from torch import Tensor, nn

import graphopt
from graphopt.ir.driver import Session
from graphopt.passes.base import Pass
from graphopt.testing import strategies
from graphopt.testing.strategies import Network

RESULTS = Path(__file__).parent / "results"
MODES = ("deploy", "tune")
KINDS: dict[str, Callable[[], st.SearchStrategy[Network]]] = {
    "programs": strategies.programs,
    "networks": strategies.networks,
    "convolutional": strategies.convolutional,
    "residual": strategies.residual,
    "transformers": strategies.transformers,
    "spiking": strategies.spiking,
}
ROUND = ("programs", "networks", "programs", "convolutional", "programs", "residual", "programs",
         "transformers", "programs", "spiking")  # fmt: skip
CHUNK = 10  # models that one run of hypothesis draws, which are variations of each other
LIMIT, COARSE_LIMIT = 1e-9, 1e-5
NUDGE, NOISE_FACTOR = 1e-15, 10
SMALLEST = 1e-3  # values below count as this: outputs are of order one, and may cancel to zero
OTHER_ROWS = 4
SHRINK_SECONDS = 60.0


class Wrong(AssertionError):
    """An optimized model that is not its source; the message says how."""


@dataclasses.dataclass
class Row:
    """What is known of one model. `verdict`: right, wrong, invalid (the source does not run) or
    timeout. `error` is relative; `noise` the source's own answer to a change of 1e-15."""

    kind: str
    mode: str
    verdict: str = "right"
    reason: str = ""
    captured: str = ""
    refused: str = ""
    batch: str = ""
    gradients: str = ""
    error: float = 0.0
    noise: float = 0.0
    seconds: float = 0.0
    applied: list[str] = dataclasses.field(default_factory=list)
    rolled_back: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    ops: list[str] = dataclasses.field(default_factory=list)
    shown: str = ""


# -- observing a module -------------------------------------------------------------------------


@dataclasses.dataclass
class Observed:
    """One call: the leaves and structure of the result, the inputs and buffers after it, and which
    results share memory with what."""

    leaves: list[Any]
    structure: str
    inputs: list[Any]
    buffers: dict[str, Tensor]
    shared: set[tuple[Any, ...]]


def copied(value: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda one: one.detach().clone(), value)


@contextmanager
def put_back(module: nn.Module) -> Iterator[None]:
    """Afterwards, parameters and buffers have the values they had."""
    states = [*module.parameters(), *module.buffers()]
    kept = [one.detach().clone() for one in states]
    try:
        yield
    finally:
        with torch.no_grad():
            for state, value in zip(states, kept, strict=True):
                if not torch.equal(state, value):
                    state.copy_(value)


def observe(module: nn.Module, args: Any, kwargs: Any) -> Observed:
    args, kwargs = copied((args, kwargs))
    with torch.no_grad(), put_back(module):
        result = module(*args, **kwargs)
        leaves, spec = pytree.tree_flatten(result)
        inputs = pytree.tree_leaves((args, kwargs))
        shared = set(_shared(leaves, inputs, [*module.parameters(), *module.buffers()]))
        buffers = {name: one.clone() for name, one in module.named_buffers()}
        return Observed(copied(leaves), str(spec), copied(inputs), buffers, shared)


def _shared(leaves: list[Any], inputs: list[Any], states: list[Any]) -> Iterator[tuple[Any, ...]]:
    def memory(one: Any) -> Any:
        return one.untyped_storage().data_ptr() if isinstance(one, Tensor) else None

    owned = {memory(one) for one in states}
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            continue
        if memory(leaf) in owned:
            yield i, "a state"
        yield from ((i, "input", j) for j, one in enumerate(inputs) if memory(one) == memory(leaf))
        yield from ((i, "output", j) for j in range(i) if memory(leaves[j]) == memory(leaf))


def distance(found: list[Any], truth: list[Any], what: str) -> float:
    """The largest difference over the largest value, the worst over pairs.

    Raises:
        Wrong: where shapes, dtypes, integers, or the places of inf and nan differ.
    """
    if len(found) != len(truth):
        raise Wrong(f"{what}: {len(found)}, expected {len(truth)}")
    worst = 0.0
    for i, (a, b) in enumerate(zip(found, truth, strict=True)):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if type(a) is not type(b) or a != b:
                raise Wrong(f"{what} {i}: {a!r}, expected {b!r}")
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            raise Wrong(
                f"{what} {i}: {a.dtype} {list(a.shape)}, expected {b.dtype} {list(b.shape)}"
            )
        if not b.is_floating_point():
            if not torch.equal(a, b):
                raise Wrong(f"{what} {i}: integers differ")
            continue
        same = (a == b) | (a.isnan() & b.isnan())
        difference = torch.where(same, 0.0, a.double() - b.double()).abs()
        if not bool(difference.isfinite().all()):
            raise Wrong(f"{what} {i}: inf or nan where the source has none, or the reverse")
        if b.numel():
            largest = float(torch.where(b.isfinite(), b, 0.0).abs().max())
            worst = max(worst, float(difference.max()) / max(largest, SMALLEST))
    return worst


# -- checking one model -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Probe(Pass):
    """Notes the ops and dtypes of a graph as it was captured; changes nothing."""

    ops: Any = dataclasses.field(default_factory=set)
    dtypes: Any = dataclasses.field(default_factory=set)

    def run(self, session: Session) -> None:
        for node in session.graph.calls:
            name = getattr(getattr(node.target, "_schema", None), "name", "")
            if name.startswith("aten::"):
                self.ops.add(name.removeprefix("aten::"))
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                self.dtypes.add(value.dtype)

    @property
    def coarse(self) -> bool:
        """Whether something rounds to less than float64."""
        return any(one.is_floating_point and one is not torch.float64 for one in self.dtypes)


def check(kind: str, network: Network, mode: str) -> Row:
    """Optimize one network and compare. Never raises but for a timeout."""
    row = Row(kind, mode)
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check(row, network)
    except Wrong as error:
        row.verdict, row.reason = "wrong", str(error)
    finally:
        torch._dynamo.reset()
    row.seconds = time.perf_counter() - start
    if row.verdict == "wrong" or row.rolled_back:
        row.shown = repr(network)
    return row


def _check(row: Row, network: Network) -> None:
    module, args, kwargs = network.module, network.inputs, network.kwargs
    try:
        truth = observe(module, args, kwargs)
    except Exception as error:
        row.verdict, row.reason = "invalid", _first_line(error)
        return
    before = _state_of(module, args, kwargs)
    probe = Probe()
    try:
        fast = graphopt.optimize(module, args, kwargs, mode=row.mode, passes=[probe, row.mode])
    except TimeoutError:
        raise
    except Exception as error:
        raise Wrong(f"optimize raised {_place(error)}") from error
    report = fast.report
    row.captured, row.ops = report.capture.method, sorted(probe.ops)
    row.applied = [one.rewrite for one in report.applied]
    row.rolled_back = [(one.rewrite, one.reason) for one in report.rolled_back]
    if row.captured == "regional":
        row.refused = next(iter(report.capture.left_out.values()), "unknown")
    _assert_same_state(before, _state_of(module, args, kwargs))
    limit = COARSE_LIMIT if probe.coarse else LIMIT
    _compare(row, module, fast, args, kwargs, limit, truth)
    for rows, fresh in _fresh_inputs(fast, args, kwargs):
        try:
            expected = observe(module, *fresh)
        except Exception:  # the source counts on its batch size after all
            row.batch = "the source does not take it"
            continue
        _compare(row, module, fast, *fresh, limit, expected, f"batch {rows}: ")
        row.batch = "right"
    if row.mode == "tune":
        _compare_gradients(row, module, fast, args, kwargs, limit)


def _compare(
    row: Row, module: nn.Module, fast: nn.Module, args: Any, kwargs: Any, limit: float,
    truth: Observed, prefix: str = "",
) -> None:  # fmt: skip
    try:
        found = observe(fast, args, kwargs)
    except TimeoutError:
        raise
    except Exception as error:
        raise Wrong(f"{prefix}the optimized model raises {_place(error)}") from error
    if found.structure != truth.structure:
        raise Wrong(f"{prefix}the result is {found.structure}, expected {truth.structure}")
    common = sorted(set(found.buffers) & set(truth.buffers))
    pairs = {
        "output": (found.leaves, truth.leaves),
        "input after the call": (found.inputs, truth.inputs),
        "buffer after the call": (
            [found.buffers[name] for name in common], [truth.buffers[name] for name in common],
        ),
    }  # fmt: skip
    for what, (a, b) in pairs.items():
        error = distance(a, b, prefix + what)
        if error > limit:
            noise = _noise(module, lambda: observe(module, *nudged((args, kwargs))).leaves, b)
            row.noise = max(row.noise, noise)
            if what != "output" or error > NOISE_FACTOR * noise:
                raise Wrong(f"{prefix}{what} is off by {error:.1e} (noise {noise:.1e})")
        row.error = max(row.error, error)
    if extra := found.shared - truth.shared:
        raise Wrong(f"{prefix}output shares memory with another value: {sorted(map(str, extra))}")


def _fresh_inputs(
    fast: graphopt.OptimizedModule, args: Any, kwargs: Any
) -> Iterator[tuple[int, tuple[Any, Any]]]:
    """Random inputs of another batch size, if the graph says that a size is dynamic."""
    if fast.graph_module is None:
        return
    leaves, spec = pytree.tree_flatten((args, kwargs))
    nodes = [node for node in fast.graph_module.graph.nodes if node.op == "placeholder"]
    generator = torch.Generator().manual_seed(1)
    dynamic = False
    for i, (node, leaf) in enumerate(zip(nodes, leaves, strict=True)):
        kind = node.meta.get("type")
        if not isinstance(leaf, Tensor) or kind is None:
            continue
        shape = [one if isinstance(one, int) else OTHER_ROWS for one in kind["shape"]]
        dynamic = dynamic or shape != list(leaf.shape)
        if leaf.is_floating_point():
            leaves[i] = torch.randn(shape, generator=generator, dtype=leaf.dtype)
        else:
            picked = torch.randint(leaf.numel(), shape, generator=generator)
            leaves[i] = leaf.flatten()[picked]
    if dynamic:
        yield OTHER_ROWS, pytree.tree_unflatten(leaves, spec)


# -- rounding -----------------------------------------------------------------------------------


def nudged(value: Any) -> Any:
    """Floating tensors changed by 1e-15, relative, up or down at random."""

    def nudge(one: Tensor) -> Tensor:
        if not one.is_floating_point():
            return one
        signs = 2 * torch.randint(0, 2, one.shape, dtype=one.dtype) - 1
        return one * (1 + NUDGE * signs)

    return pytree.tree_map_only(torch.Tensor, nudge, value)


def _noise(module: nn.Module, run: Callable[[], list[Any]], truth: list[Any]) -> float:
    """How far the source itself moves when its weights, (by `run`) its inputs and what its modules
    compute do: where maxima are tied, a gradient goes one way or the other."""
    hooks = [
        one.register_forward_hook(lambda _, inputs, output: nudged(output))
        for one in module.modules()
        if not list(one.children())
    ]
    try:
        return _moved(module, run, truth)
    finally:
        for hook in hooks:
            hook.remove()


def _moved(module: nn.Module, run: Callable[[], list[Any]], truth: list[Any]) -> float:
    worst = 0.0
    with torch.random.fork_rng(devices=[]):
        for seed in range(3):
            torch.manual_seed(seed)
            with put_back(module):
                with torch.no_grad():
                    for state in [*module.parameters(), *module.buffers()]:
                        state.copy_(nudged(state))
                try:
                    worst = max(worst, distance(run(), truth, "nudged"))
                except Wrong:
                    return math.inf
    return worst


# -- gradients ----------------------------------------------------------------------------------


def gradients(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Tensor]:
    """Of a fixed random functional of the outputs, by parameter name and input; zero for none."""
    leaves, spec = pytree.tree_flatten(copied((args, kwargs)))
    inputs = {
        f"input {i}": one.requires_grad_()
        for i, one in enumerate(leaves)
        if isinstance(one, Tensor) and one.is_floating_point()
    }
    own = [one.clone() if f"input {i}" in inputs else one for i, one in enumerate(leaves)]
    args, kwargs = pytree.tree_unflatten(own, spec)
    generator = torch.Generator().manual_seed(7)
    with put_back(module):
        total = torch.zeros((), dtype=torch.float64)
        for one in pytree.tree_leaves(module(*args, **kwargs)):
            if isinstance(one, Tensor) and one.is_floating_point():
                weights = torch.randn(one.shape, generator=generator, dtype=torch.float64)
                total = total + (one.double() * weights).sum()
        wanted = {**dict(module.named_parameters()), **inputs}
        if not total.requires_grad:
            return {name: torch.zeros_like(one) for name, one in wanted.items()}
        found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return {
        name: torch.zeros_like(one) if gradient is None else gradient
        for (name, one), gradient in zip(wanted.items(), found, strict=True)
    }


def _nudged_gradient(module: nn.Module, args: Any, kwargs: Any, name: str) -> Tensor:
    return gradients(module, *nudged((args, kwargs)))[name]


def _compare_gradients(
    row: Row, module: nn.Module, fast: nn.Module, args: Any, kwargs: Any, limit: float
) -> None:
    try:
        truth = gradients(module, args, kwargs)
    except Exception:  # written in place what the backward pass needs
        row.gradients = "the source has none"
        return
    try:
        found = gradients(fast, args, kwargs)
    except TimeoutError:
        raise
    except Exception as error:
        raise Wrong(f"the backward pass raises {_place(error)}") from error
    # Gradients are compared at the scale of the largest: smaller ones are rounding of zeros.
    floor = max((float(one.abs().max()) for one in truth.values() if one.numel()), default=0.0)
    unit = torch.full((1,), 1e-4 * floor, dtype=torch.float64)

    def beside(gradient: Tensor) -> list[Any]:
        return [torch.cat([gradient.flatten().double(), unit])]

    for name, expected in truth.items():
        if name not in found:
            if bool(expected.any()):
                raise Wrong(f"the parameter {name} is lost, and has a gradient")
            continue
        error = distance(beside(found[name]), beside(expected), f"gradient of {name}")
        if error > limit:
            run = functools.partial(_nudged_gradient, module, args, kwargs, name)
            noise = _noise(module, lambda run=run: beside(run()), beside(expected))  # type: ignore[misc]
            row.noise = max(row.noise, noise)
            if error > NOISE_FACTOR * noise:
                raise Wrong(f"gradient of {name} is off by {error:.1e} (noise {noise:.1e})")
    row.gradients = "right"


# -- the source stays as it was -----------------------------------------------------------------


def _state_of(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    seen: dict[str, Any] = {f"mode of {name}": one.training for name, one in module.named_modules()}
    named = [*module.named_parameters(remove_duplicate=False)]
    named += module.named_buffers(remove_duplicate=False)
    for name, one in named:
        seen[name] = (id(one), one.requires_grad, one.detach().clone())
    for i, one in enumerate(pytree.tree_leaves((args, kwargs))):
        seen[f"input {i}"] = (id(one), None, copied(one))
    return seen


def _assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    if list(before) != list(after):
        raise Wrong("optimize changed the names of the source's states")
    for name, old in before.items():
        new = after[name]
        if isinstance(old, bool):
            same = old == new
        else:
            values = isinstance(old[2], Tensor)
            same = old[:2] == new[:2] and (
                torch.equal(old[2].nan_to_num(), new[2].nan_to_num()) if values else True
            )
        if not same:
            raise Wrong(f"optimize changed {name} of the source")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [one for one in frames if "graphopt" in one.filename and "fuzz" not in one.filename]
    where = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    return _first_line(error) + where


# -- many models, and the minimal wrong ones ----------------------------------------------------


class _Enough(BaseException):
    """Shrinking has had its time."""


@dataclasses.dataclass
class Failure:
    """The smallest model found for one way of being wrong, and how to find it again."""

    row: Row
    seed: int


_known: set[str] = set()  # reasons that this process has shrunk already


def _signature(row: Row) -> str:
    return re.sub(r"[-+.\d]+(e[-+]?\d+)?|'.*?'", "#", row.reason)[:160]


def draw_models(
    kind: str, mode: str, seed: int, count: int, timeout: float, strict: bool = False
) -> tuple[list[Row], list[Failure]]:
    """`count` models of one kind. A wrong one ends a run of hypothesis, so there may be several.

    `strict` counts a site that was rolled back as wrong too, so that it is shrunk.
    """
    rows: list[Row] = []
    failures: list[Failure] = []
    for attempt in range(count):
        if len(rows) >= count:
            break
        failure = _run(kind, mode, seed + attempt, count - len(rows), timeout, strict, rows)
        if failure is not None:
            failures.append(failure)
    return rows, failures


def _run(
    kind: str, mode: str, seed: int, count: int, timeout: float, strict: bool, rows: list[Row]
) -> Failure | None:
    smallest: list[Row] = []
    deadline = [0.0]

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=max(count, 2), database=None, deadline=None, report_multiple_bugs=False,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink), print_blob=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(KINDS[kind]())
    def one(network: Network) -> None:
        if smallest and time.perf_counter() > deadline[0]:
            raise _Enough
        with _alarm(timeout):
            row = check(kind, network, mode)
        if strict and row.rolled_back and row.verdict == "right":
            row.verdict, row.reason = "wrong", f"rolled back: {row.rolled_back[0]}"
        if not smallest:
            rows.append(row)
        if row.verdict != "wrong" or (not smallest and _signature(row) in _known):
            return
        if not smallest or _signature(row) == _signature(smallest[0]):
            if not smallest:
                deadline[0] = time.perf_counter() + SHRINK_SECONDS
            if not smallest or len(row.shown) <= len(smallest[0].shown):
                smallest[:] = [row]
            raise Wrong(_signature(row))

    try:
        one()
    except (Wrong, _Enough):
        pass
    except hypothesis.errors.Flaky:
        smallest[0].reason += " (not every time)"
    except TimeoutError:
        rows.append(Row(kind, mode, "timeout", f"more than {timeout:.0f} s", seconds=timeout))
    if not smallest:
        return None
    _known.add(_signature(smallest[0]))
    return Failure(smallest[0], seed)


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread after some seconds."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _start() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


# -- the report ---------------------------------------------------------------------------------


def summary(rows: list[Row]) -> list[dict[str, Any]]:
    """One record per kind, and one for all."""
    table = []
    for kind in [*KINDS, "all"]:
        own = [row for row in rows if kind in (row.kind, "all")]
        if not own:
            continue
        verdicts = Counter(row.verdict for row in own)
        table.append({
            "kind": kind, "models": len(own), "right": verdicts["right"],
            "wrong": verdicts["wrong"], "timeout": verdicts["timeout"],
            "invalid": verdicts["invalid"],
            "refused capture": sum(bool(row.refused) for row in own),
            "other batch": sum(row.batch == "right" for row in own),
            "gradients": sum(row.gradients == "right" for row in own),
            "noisy": sum(row.noise > 0 for row in own),
            "applied": sum(len(row.applied) for row in own),
            "rolled back": sum(len(row.rolled_back) for row in own),
            "ops": len({op for row in own for op in row.ops}),
            "s per model": round(sum(row.seconds for row in own) / len(own), 2),
        })  # fmt: skip
    return table


def write_results(folder: Path, rows: list[Row], failures: list[Failure], about: Any) -> None:
    """fuzz.json and fuzz.md."""
    table = summary(rows)
    rewrites = Counter(name for row in rows for name in row.applied)
    back = _rolled_back(rows)
    refusals = Counter(re.sub(r"\d+", "#", row.refused)[:120] for row in rows if row.refused)
    ops = sorted({op for row in rows for op in row.ops})
    data = {
        "about": about, "summary": table, "rewrites": dict(rewrites.most_common()),
        "wrong": [dataclasses.asdict(one) for one in failures],
        "rolled back": back, "refused": dict(refusals.most_common()), "ops": ops,
        "worst error": max((row.error for row in rows), default=0.0),
    }  # fmt: skip
    (folder / "fuzz.json").write_text(json.dumps(data, indent=1) + "\n")
    total = table[-1]
    lines = [
        f"# fuzz: {total['wrong']} wrong of {total['models']}", "",
        ", ".join(f"{key} {value}" for key, value in about.items()) + ".", "",
        "right: outputs, side effects, other batch sizes and (tune) gradients are the source's in",
        "float64. refused capture: optimized by region or left eager, and right. noisy: beyond",
        "1e-9, but within what the source makes of a last-bit change. Worst error of the right ones: "
        f"{data['worst error']:.1e}.", "",
        "| " + " | ".join(total) + " |", "|" + " --- |" * len(total),
        *("| " + " | ".join(str(value) for value in one.values()) + " |" for one in table), "",
        "Rewrites applied: " + ", ".join(f"{k} {v}" for k, v in rewrites.most_common()) + ".", "",
        f"{len(ops)} distinct ATen ops in captured graphs: " + ", ".join(ops) + ".",
    ]  # fmt: skip
    lines += ["", "## Refused by capture", ""] if refusals else []
    lines += [f"- {count} x {reason}" for reason, count in refusals.most_common()]
    lines += ["", "## Rolled back", ""] if back else []
    for one in back:
        lines += [f"- {one['count']} x {one['rewrite']}: {one['reason']}", "", *_code(one["shown"])]
    lines += ["", "## Wrong", ""] if failures else []
    for failure in failures:
        row = failure.row
        lines += [f"- {row.kind}, {row.mode}, seed {failure.seed}: {row.reason}", "",
                  *_code(row.shown)]  # fmt: skip
    (folder / "fuzz.md").write_text("\n".join(lines) + "\n")


def _rolled_back(rows: list[Row]) -> list[dict[str, Any]]:
    """Every way of being rolled back: how often, and the smallest model it happened in."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        for rewrite, reason in row.rolled_back:
            key = rewrite, re.sub(r"[\d.]+(e[-+]?\d+)?", "#", reason)[:100]
            new = {"rewrite": rewrite, "reason": reason, "count": 0, "shown": row.shown}
            one = found.setdefault(key, new)
            one["count"] += 1
            if len(row.shown) < len(one["shown"]):
                one["shown"], one["reason"] = row.shown, reason
    return sorted(found.values(), key=lambda one: -one["count"])


def _code(text: str) -> list[str]:
    return [*(f"      {line}" for line in text.splitlines()), ""]


# -- the command --------------------------------------------------------------------------------


def main(
    models: Annotated[int, typer.Option(help="how many models")] = 1000,
    seed: Annotated[int, typer.Option(help="other seeds draw other models")] = 0,
    kind: Annotated[list[str] | None, typer.Option(help=f"only {', '.join(KINDS)}")] = None,
    mode: Annotated[str, typer.Option(help="deploy, tune or both, in turns")] = "both",
    workers: Annotated[int, typer.Option(help="processes, each with one thread")] = 2,
    timeout: Annotated[float, typer.Option(help="seconds for one model")] = 60.0,
    minutes: Annotated[float, typer.Option(help="start nothing new after so long")] = 30.0,
    strict: Annotated[bool, typer.Option(help="shrink what was rolled back, too")] = False,
    out: Annotated[Path | None, typer.Option(help="folder of the results")] = None,
) -> None:
    """Fuzz the pipelines; exits with 1 if anything was wrong."""
    if mode not in (*MODES, "both") or set(kind or ()) - set(KINDS):
        raise typer.BadParameter(
            f"expected --mode deploy, tune, both; --kind of {', '.join(KINDS)}"
        )
    folder = out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    turns = list(kind or ROUND)
    jobs = [
        (turns[i % len(turns)], mode if mode in MODES else MODES[(i + i // len(turns)) % 2],
         1_000_000 * seed + 1000 * i, min(CHUNK, models - i * CHUNK), timeout, strict)
        for i in range(-(-models // CHUNK))
    ]  # fmt: skip
    rows: list[Row] = []
    failures: dict[str, Failure] = {}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start) as pool:
        running = {pool.submit(draw_models, *job): job for job in jobs[: 2 * workers]}
        waiting = iter(jobs[2 * workers :])
        while running:
            done, _ = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
            for future in done:
                job = running.pop(future)
                drawn, wrong = future.result()
                rows += drawn
                for one in wrong:
                    best = failures.setdefault(_signature(one.row), one)
                    if len(one.row.shown) < len(best.row.shown):
                        failures[_signature(one.row)] = one
                spent = time.perf_counter() - start
                bad = sum(row.verdict == "wrong" for row in drawn)
                print(f"{spent:5.0f} s  {len(rows):5d} models  {job[0]}, {job[1]}: {bad} wrong of "
                      f"{len(drawn)}", flush=True)  # fmt: skip
                if spent < 60 * minutes and (job := next(waiting, None)) is not None:
                    running[pool.submit(draw_models, *job)] = job
    about = {
        "date": datetime.date.today().isoformat(), "torch": torch.__version__,
        "hypothesis": hypothesis.__version__, "cpus": os.cpu_count(), "workers": workers,
        "seed": seed, "mode": mode, "minutes": round((time.perf_counter() - start) / 60, 1),
    }  # fmt: skip
    write_results(folder, rows, list(failures.values()), about)
    for one in failures.values():
        print(f"\nWRONG ({one.row.kind}, {one.row.mode}, seed {one.seed}): {one.row.reason}")
        print(one.row.shown)
    for entry in summary(rows):
        print(", ".join(f"{key} {value}" for key, value in entry.items()))
    raise typer.Exit(1 if any(row.verdict == "wrong" for row in rows) else 0)


if __name__ == "__main__":
    typer.run(main)
