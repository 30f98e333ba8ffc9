"""optimize(): capture, rewrite, verify, lower."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from graphopt.backends import base as backends
from graphopt.ir import capture as capturing
from graphopt.ir.capture import Captured, CaptureError
from graphopt.ir.cost import cost
from graphopt.ir.driver import Record, Session
from graphopt.ir.graph import Graph
from graphopt.ir.lint import lint
from graphopt.module import OptimizedModule, build
from graphopt.pipeline import Pipeline
from graphopt.regional import optimize_regions
from graphopt.report import Capture, Report
from graphopt.verify import SiteValidator, check_model
from graphopt.verify.model import relative_error

MODES = ("deploy", "tune")
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Options:
    """What `optimize` was asked for."""

    mode: str
    pipeline: Pipeline
    backend: str
    dynamic_shapes: Any = None
    progress: Progress | None = None
    float64_limit: float = 1e-10

    def say(self, what: str) -> None:
        if self.progress is not None:
            self.progress(what)


def optimize(
    model: nn.Module,
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    mode: str = "deploy",
    passes: str | Pipeline | Iterable[Any] | None = None,
    backend: str = "eager",
    dynamic_shapes: Any = None,
    progress: Progress | None = None,
) -> OptimizedModule:
    """An optimized copy of `model`; the model itself is not changed.

    The model is captured in its present mode: call `model.eval()` first, or its batch norms
    normalize with batch statistics and are refused.

    Args:
        model: any nn.Module that runs on the inputs.
        args: example inputs, a tuple (or one tensor). None takes those that the model declares
            (`example_input_array`, `dummy_inputs`, `pretrained_cfg`), or captures on the first
            call. The first axis of every tensor is dynamic where the model allows.
        kwargs: example keyword inputs.
        mode: "deploy" stores folded weights; "tune" keeps the original parameters trainable.
        passes: a pipeline text, a `Pipeline`, or a sequence of passes and rewrites, in place of
            the preset of `mode`.
        backend: "eager", "inductor", or "auto", which measures those installed.
        dynamic_shapes: as for `torch.export.export`, in place of the dynamic first axis.
        progress: called with a line of text at each step.

    Returns:
        An `OptimizedModule`; its `report` says what was done and why not more.

    Raises:
        TypeError, ValueError: for arguments of the wrong kind, unknown modes, passes, backends.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, found {type(model).__name__}")
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; expected one of {', '.join(MODES)}")
    pipeline = (
        passes if isinstance(passes, Pipeline) else Pipeline(mode if passes is None else passes)
    )
    if backend != "auto":
        backends.find(backend)
    options = Options(mode, pipeline, backend, dynamic_shapes, progress)
    args, kwargs = _inputs(model, args, kwargs)
    options.say(f"copying {type(model).__name__}")
    source = capturing.copy_module(model)
    if args is None:
        return _on_first_call(source, options)
    return _optimize(source, args, dict(kwargs or {}), options)


def _inputs(
    model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...] | None, Mapping[str, Any] | None]:
    if isinstance(args, torch.Tensor):
        return (args,), kwargs
    if isinstance(args, Mapping) and kwargs is None:
        return (), dict(args)
    if isinstance(args, (tuple, list)):
        return tuple(args), kwargs
    if args is not None:
        raise TypeError(
            f"args: expected a tuple of inputs or a tensor, found {type(args).__name__}"
        )
    if kwargs is not None:
        return (), kwargs
    return declared_inputs(model)


def declared_inputs(
    model: nn.Module,
) -> tuple[tuple[Any, ...] | None, Mapping[str, Any] | None]:
    """Example inputs that a model itself declares, as (args, kwargs); (None, None) if none."""
    declared = getattr(model, "example_input_array", None)
    if isinstance(declared, torch.Tensor):
        return (declared,), None
    if isinstance(declared, tuple):
        return declared, None
    for found in (declared, _attribute(model, "dummy_inputs")):
        if isinstance(found, Mapping):
            return (), dict(found)
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, Mapping) else None
    if size is not None:
        like = next(model.parameters(), torch.empty(0))
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(1, *size, generator=generator)
        return (image.to(like.device, like.dtype),), None
    return None, None


def _attribute(model: nn.Module, name: str) -> Any:
    """An attribute whose computation may fail (some models declare inputs they cannot take)."""
    try:
        return getattr(model, name, None)
    except Exception:  # a property of a third party: any failure means "not declared"
        return None


def _on_first_call(source: nn.Module, options: Options) -> OptimizedModule:
    report = Report(type(source).__name__, options.mode, str(options.pipeline), options.backend,
                    Capture("not yet", 0.0))  # fmt: skip
    module = OptimizedModule(source, None, report)
    module.__dict__["_pending"] = lambda inner, args, kwargs: _optimize(
        inner, args, kwargs, options
    )
    return module


def _optimize(
    source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options
) -> OptimizedModule:
    """Optimize a module that belongs to us: whole, or else by region."""
    start = time.perf_counter()
    try:
        return _optimize_whole(source, args, kwargs, options)
    except CaptureError as error:
        by_region = dataclasses.replace(options, dynamic_shapes=None)
        return optimize_regions(
            source, args, kwargs, error,
            lambda module, a, k: _optimize_whole(module, a, k, by_region),
            Report(type(source).__name__, options.mode, str(options.pipeline), options.backend,
                   Capture("regional", time.perf_counter() - start)),
        )  # fmt: skip


def _optimize_whole(
    source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options
) -> OptimizedModule:
    options.say(f"capturing {type(source).__name__}")
    start = time.perf_counter()
    captured = capturing.capture(source, args, kwargs, options.dynamic_shapes)
    return _rewrite(source, captured, args, kwargs, options, time.perf_counter() - start)


def _rewrite(
    source: nn.Module, captured: Captured, args: tuple[Any, ...], kwargs: dict[str, Any],
    options: Options, seconds: float,
) -> OptimizedModule:  # fmt: skip
    graph = captured.graph
    inputs = pytree.tree_leaves(capturing.clone_inputs(args, kwargs))
    report = Report(
        type(source).__name__, options.mode, str(options.pipeline), options.backend,
        Capture(captured.method, seconds, captured.notes),
    )  # fmt: skip
    graph = run_pipeline(graph, inputs, options, report)
    module = build(graph)
    module.train(source.training)
    run = _lower(module, args, kwargs, options, report)
    lower = backends.find(report.backend).lower_again(report)
    result = OptimizedModule(module, graph.signature, report, lower)
    result.__dict__["_run"] = run
    return result


def run_pipeline(graph: Graph, inputs: list[Any], options: Options, report: Report) -> Graph:
    """Run the passes on `graph`, checking every site and the whole; fills in the report.

    Returns the rewritten graph, or the graph as captured if the whole model fails its check.
    """
    source = graph.clone()
    report.before = cost(graph, inputs)
    full, inputs = inputs, _sample(graph, inputs)
    session = Session(graph, SiteValidator(graph, inputs))
    lint(graph, "capture")
    report.passes = options.pipeline.run(session, options.say)
    report.applied = session.applied
    report.rolled_back = session.rolled_back
    report.refused = session.remaining_refusals()
    session.validator = None  # its values are not needed again, and large
    start = time.perf_counter()
    options.say("verifying the whole model in float64")
    report.check = check_model(source, graph, inputs, options.float64_limit)
    report.validation_seconds = session.validation_seconds + time.perf_counter() - start
    if not report.check.ok:
        report.rolled_back = [
            *session.rolled_back,
            *(dataclasses.replace(one, reason=f"the whole model failed its check: "
              f"{report.check.reason}") for one in session.applied),
        ]  # fmt: skip
        report.applied = []
        graph = source
    report.after = cost(graph, full)
    for state in graph.states.values():
        state.exact = None
    return graph


def _sample(graph: Graph, inputs: list[Any]) -> list[Any]:
    """What to check on: the example inputs, cut to two rows where the batch is dynamic, which is
    enough to decide meaning. Blank floating inputs (zeros, ones) would hide every error in a
    weight: they become normal draws."""
    generator = torch.Generator().manual_seed(0)
    batches = [_batch(node) for node in graph.inputs]
    one_batch = len({str(batch) for batch in batches if batch is not None}) == 1
    sample = []
    for batch, given in zip(batches, inputs, strict=True):
        if isinstance(given, torch.Tensor):
            if batch is not None and one_batch:
                given = given[:2]
            blank = given.numel() > 1 and bool((given == given.flatten()[0]).all())
            if given.is_floating_point() and blank:
                given = torch.randn(given.shape, generator=generator).to(given)
        sample.append(given)
    return sample


def _batch(node: Any) -> Any:
    """The dynamic size of an input's first axis, None if it has none."""
    value = node.meta.get("val")
    dynamic = isinstance(value, torch.Tensor) and value.ndim > 0
    return value.shape[0] if dynamic and not isinstance(value.shape[0], int) else None


def _lower(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options, report: Report
) -> Any:
    """The callable of the backend asked for, checked on the inputs; eager, with a note, if none is
    good."""
    if options.backend == "eager":
        return module
    names = backends.candidates() if options.backend == "auto" else [backends.find(options.backend)]
    trainable = options.mode != "deploy"

    def call(run: Any) -> list[Any]:
        inputs = capturing.clone_inputs(args, kwargs)
        return pytree.tree_leaves(run(*inputs[0], **inputs[1]))

    with capturing.untouched(module):
        reference = call(module)
    good = []
    for backend in names:
        options.say(f"compiling with {backend.name}")
        start = time.perf_counter()
        try:
            run = backend.lower(module, trainable)
            with capturing.untouched(module):
                error = relative_error(call(run), reference)
        except Exception as failure:
            reason = capturing.first_line(failure)
            report.backend_notes.append(f"{backend.name}: failed: {reason}")
            continue
        seconds = time.perf_counter() - start
        limit = _backend_limit(reference)
        if not error <= limit:
            report.backend_notes.append(
                f"{backend.name}: not used: its outputs differ by {error:.1e} (limit {limit:.0e})"
            )
            continue
        good.append((backend, run))
        report.backend_table.append(
            {"backend": backend.name, "compile s": round(seconds, 2), "difference": f"{error:.1e}"}
        )
    if not good:
        report.backend = "eager"
        report.backend_notes.append("running eager")
        return module
    if options.backend == "auto":
        ranked = backends.choose(good, call)
        for row in report.backend_table:
            row["ms"] = next(
                round(1e3 * seconds, 3) for one, seconds in ranked if one.name == row["backend"]
            )
        report.backend = ranked[0][0].name
    return next(run for backend, run in good if backend.name == report.backend)


def _backend_limit(outputs: list[Any]) -> float:
    """A compiled model reorders sums: allow a generous multiple of the dtype's rounding."""
    eps = [torch.finfo(one.dtype).eps for one in outputs
           if isinstance(one, torch.Tensor) and one.dtype.is_floating_point]  # fmt: skip
    return 1e4 * max(eps, default=0.0)


__all__ = ["MODES", "Record", "declared_inputs", "optimize"]
