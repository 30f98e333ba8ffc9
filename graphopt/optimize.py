"""optimize(): capture, rewrite, verify, lower."""

from __future__ import annotations

import dataclasses
import difflib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from graphopt.backends import auto, base as backends
from graphopt.ir import capture as capturing, ops
from graphopt.ir.builder import Builder
from graphopt.ir.capture import Captured
from graphopt.ir.cost import cost, target
from graphopt.ir.driver import Applications, Record, Session, Validator
from graphopt.ir.graph import Graph
from graphopt.ir.inputs import as_call, declared_inputs, telling
from graphopt.ir.interpret import is_getitem
from graphopt.ir.lint import lint
from graphopt.ir.process import alone
from graphopt.ir.source import CaptureError, clone_inputs, copy_module
from graphopt.laws import laws_of
from graphopt.memory import give_back
from graphopt.module import OptimizedModule, build
from graphopt.pipeline import Pipeline
from graphopt.progress import followed
from graphopt.regional import Seen, optimize_regions
from graphopt.report import Capture, Report, listing, modules_of
from graphopt.verify import SiteValidator, check_model
from graphopt.verify.truth import FACTOR, Truth

MODES = ("deploy", "tune")
PRECISIONS = {"bf16": "lower-precision{dtype=bf16}", "int8": "quantize"}  # the pass at the end
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Options:
    """What `optimize` was asked for.

    `validator` makes what checks the sites of one graph. Without `enforce`, a failed check of the
    whole model is reported and changes nothing. `tuning` is what backend "auto" may spend, on all regions
    together.
    """

    mode: str
    pipeline: Pipeline
    backend: str
    dynamic_shapes: Any = None
    progress: Progress | bool | None = None
    float64_limit: float = 1e-10
    capture: Callable[..., Captured] = capturing.capture
    validator: Callable[[Graph, Sequence[Any]], Validator | None] = SiteValidator
    enforce: bool = True
    bisect_limit: int | None = None
    applications: Applications = dataclasses.field(default_factory=Applications)
    tuning: auto.Tuning = dataclasses.field(default_factory=auto.Tuning)

    def report(self, source: nn.Module, capture: Capture) -> Report:
        """A report with nothing done yet."""
        return Report(
            type(source).__name__, self.mode, str(self.pipeline), self.backend, capture,
            bisect_limit=self.bisect_limit, modules=modules_of(source),
        )  # fmt: skip

    def say(self, what: str) -> None:
        if callable(self.progress):
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
    validate: bool = True,
    bisect_limit: int | None = None,
    progress: Progress | bool | None = None,
    tune_seconds: float = 60.0,
    tune_cache: bool = True,
    precision: str | None = None,
    data: Sequence[tuple[Any, Any]] = (),
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
        backend: "eager", "prepacked", "triton", "openvino", "onnxruntime", "inductor", or "auto", which
            measures those that can run here and keeps the fastest that is right; see docs/auto.md.
        dynamic_shapes: as for `torch.export.export`, in place of the dynamic first axis.
        validate: False applies rewrites unchecked and rolls nothing back, to study wrong ones; the
            report still has the error of the whole model.
        bisect_limit: apply this many rewrites at most; those with `Record.index` from here on are
            left out.
        progress: called with a line of text at each step; True shows a progress bar.
        tune_seconds: what backend "auto" may spend on building and measuring others than "prepacked"
            (else "eager"); 0 takes that one at once.
        tune_cache: False neither uses nor keeps choices of backend "auto".
        precision: "bf16" computes in bfloat16 what takes the time, where the outputs stay within 5% of
            the float64 ones; see docs/precision.md. "int8" computes convolutions and linear maps in
            bytes, within 10%; see docs/int8.md. None keeps the dtypes of the model.
        data: batches `(inputs, target)` that a precision is measured on, and int8's ranges are fitted
            to; inputs as for `args`, targets are not looked at. The example inputs, if there are none.

    Returns:
        An `OptimizedModule`; its `report` says what was done and why not more.

    Raises:
        TypeError, ValueError: for arguments of the wrong kind, unknown modes, passes, backends.
    """
    pipeline = at_precision(pipeline_of(mode, passes), precision, mode, data)
    if data and precision is None:
        raise ValueError("data: expected a precision that is measured on it, found none")
    if backend != "auto":
        backends.find(backend)
    if bisect_limit is not None and bisect_limit < 0:
        raise ValueError(f"bisect_limit: expected a number of rewrites, found {bisect_limit}")
    options = Options(
        mode, pipeline, backend, dynamic_shapes, progress, bisect_limit=bisect_limit,
        tuning=auto.Tuning(tune_seconds, tune_cache),
    )  # fmt: skip
    if not validate:
        options = dataclasses.replace(options, validator=unchecked, enforce=False)
    return optimize_as(model, args, kwargs, options)


def pipeline_of(mode: str, passes: str | Pipeline | Iterable[Any] | None) -> Pipeline:
    """`passes` as a pipeline, or the preset of `mode`."""
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; expected one of {', '.join(MODES)}")
    return passes if isinstance(passes, Pipeline) else Pipeline(mode if passes is None else passes)


def at_precision(
    pipeline: Pipeline, precision: str | None, mode: str, data: Sequence[tuple[Any, Any]] = ()
) -> Pipeline:
    """`pipeline`, then the pass for a precision, measured on `data`, if one is asked for."""
    if precision is None:
        return pipeline
    if precision not in PRECISIONS:
        near = difflib.get_close_matches(str(precision), PRECISIONS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        known = ", ".join(map(repr, PRECISIONS))
        raise ValueError(f"unknown precision {precision!r}{hint} (expected None or {known})")
    if mode == "tune":
        raise ValueError(
            f"precision={precision!r} rounds weights, expected mode='deploy', found mode='tune', "
            "which keeps them trainable"
        )
    lower = Pipeline(PRECISIONS[precision])
    with_data = (
        dataclasses.replace(one, run=dataclasses.replace(one.run, data=tuple(data)))  # type: ignore[call-arg]
        for one in lower.stages
    )
    lower.stages = (*pipeline.stages, *with_data)
    lower.text = f"{pipeline.text},{lower.text}"
    return lower


def unchecked(graph: Graph, inputs: Sequence[Any]) -> None:
    """The validator of `validate=False`: none."""


@alone()
def optimize_as(
    model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None, options: Options
) -> OptimizedModule:
    """`optimize`, with everything that can be chosen in `options`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, found {type(model).__name__}")
    args, kwargs = as_call(args, kwargs)
    if args is None:
        args, kwargs = declared_inputs(model)
    options.say(f"copying {type(model).__name__}")
    source = copy_module(model)
    if args is None:
        return _on_first_call(source, options)
    return _optimize(source, args, dict(kwargs or {}), options)


def _on_first_call(source: nn.Module, options: Options) -> OptimizedModule:
    report = options.report(source, Capture("not yet", 0.0))
    module = OptimizedModule(source, None, report)
    module.__dict__["_pending"] = lambda inner, args, kwargs: _optimize(
        inner, args, kwargs, options
    )
    return module


@alone()
def _optimize(
    source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options
) -> OptimizedModule:
    """Optimize a module that belongs to us: whole, or else by region."""
    start = time.perf_counter()
    limit = math.inf if options.bisect_limit is None else options.bisect_limit
    steps = len(options.pipeline.stages) + 2  # capture and check
    with followed(options.progress, steps) as say:
        options = dataclasses.replace(
            options, applications=Applications(limit), tuning=options.tuning.anew(), progress=say
        )
        try:
            return _optimize_whole(source, args, kwargs, options)
        except CaptureError as error:

            def region(module: nn.Module, a: Any, k: Any, seen: Seen) -> OptimizedModule:
                pipeline = options.pipeline.within(seen)
                part = dataclasses.replace(options, dynamic_shapes=None, pipeline=pipeline)
                return _optimize_whole(module, a, k, part)

            return optimize_regions(
                source, args, kwargs, error, region,
                options.report(source, Capture("regional", time.perf_counter() - start)),
                check=options.enforce,
            )  # fmt: skip


def _optimize_whole(
    source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options
) -> OptimizedModule:
    options.say(f"capturing {type(source).__name__}")
    start = time.perf_counter()
    captured = options.capture(source, args, kwargs, options.dynamic_shapes)
    return rewrite_captured(source, captured, args, kwargs, options, time.perf_counter() - start)


def rewrite_captured(
    source: nn.Module, captured: Captured, args: tuple[Any, ...], kwargs: dict[str, Any],
    options: Options, seconds: float,
) -> OptimizedModule:  # fmt: skip
    graph = captured.graph
    inputs = pytree.tree_leaves(clone_inputs(args, kwargs))
    report = options.report(source, Capture(captured.method, seconds, captured.notes))
    graph, truth = run_pipeline(graph, inputs, options, report)
    module = build(graph)
    module.train(source.training)
    run = _lower(module, truth, options, report)
    lower = backends.find(report.backend).lower_again(report)
    result = OptimizedModule(module, graph.signature, report, lower)
    result.__dict__["_run"] = run
    return result


def run_pipeline(
    graph: Graph, inputs: list[Any], options: Options, report: Report
) -> tuple[Graph, Truth]:
    """Run the passes on `graph`, checking every site and the whole; fills in the report.

    Returns the rewritten graph, or the graph as captured if the whole model fails its check, and what
    it computes on the inputs.
    """
    source = graph.clone()
    report.before, report.ops_before = cost(graph, inputs), listing(graph, inputs)
    full, inputs = inputs, _sample(graph, inputs)
    session = Session(
        graph, options.validator(graph, inputs), options.applications,
        target(options.backend, graph.device),
    )  # fmt: skip
    session.examples = _telling(full)
    session.drawn = any(one is not given for one, given in zip(session.examples, full, strict=True))
    lint(graph, "capture")
    report.passes = options.pipeline.run(session, options.say)
    report.applied = session.applied
    report.rolled_back = session.rolled_back
    report.refused = session.remaining_refusals()
    records = (*report.applied, *report.rolled_back, *report.refused)
    report.laws = laws_of(options.pipeline, [one.rewrite for one in records])
    session.validator = None  # its values are not needed again, and large
    session.examples = ()
    start = time.perf_counter()
    options.say("verifying the whole model in float64")
    truth = Truth(session.source or source, inputs)
    report.check = check_model(
        truth.graph, graph, inputs, options.float64_limit, lambda: truth.outputs
    )
    report.validation_seconds = session.validation_seconds + time.perf_counter() - start
    if not report.check.ok and options.enforce:
        report.rolled_back = [
            *session.rolled_back,
            *(dataclasses.replace(one, index=-1, reason=f"the whole model failed its check: "
              f"{report.check.reason}") for one in session.applied),
        ]  # fmt: skip
        report.applied = []
        graph = source
    report.after, report.ops_after = cost(graph, full), listing(graph, full)
    for state in graph.states.values():
        state.exact = None
    give_back()
    same = report.check.float64_error <= options.float64_limit and not truth.random
    # What rounds more than the source is judged by its own rounding from here on.
    coarser = report.check.error > FACTOR * report.check.source_error
    if not same or coarser or not all(map(_as_large, inputs, full)):
        truth = Truth(graph, _telling(full))
    return graph, truth


def _as_large(sample: Any, given: Any) -> bool:
    return not isinstance(given, torch.Tensor) or sample.shape == given.shape


def _telling(inputs: list[Any]) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [telling(one, generator) for one in inputs]


def _sample(graph: Graph, inputs: list[Any]) -> list[Any]:
    """What to check on: the example inputs, cut to two rows (or what the model needs at least) where
    the batch is dynamic, which is enough to decide meaning."""
    batches = [_batch(node) for node in graph.inputs]
    symbols = {str(batch) for batch in batches if batch is not None}
    one_batch = len(symbols) == 1 and not _moves(graph, *symbols)
    sample = []
    for batch, given in zip(batches, inputs, strict=True):
        if isinstance(given, torch.Tensor) and batch is not None and one_batch:
            given = given[: max(2, least(batch))]
        sample.append(given)
    return _telling(sample)


def least(size: Any) -> int:
    """The smallest value that tracing left possible for a dynamic size."""
    environment = size.node.shape_env
    bounds = environment.var_to_range.get(size.node.expr) if environment is not None else None
    return int(bounds.lower) if bounds is not None and bounds.lower.is_Integer else 0


def _moves(graph: Graph, symbol: str) -> bool:
    """Whether something computes along a size as that of another axis than the first, where two rows
    may not do; to carry it there and back (the heads of attention) is no computation."""
    return any(
        symbol in {str(one) for size in tensor.shape[1:] for one in _symbols(size)}
        for node in graph.calls if not _carries(graph, node)
        for value in (node, *node.all_input_nodes) for tensor in _tensors(value.meta.get("val"))
    )  # fmt: skip


def _carries(graph: Graph, node: fx.Node) -> bool:
    op = Builder(graph, node).view(node)
    return is_getitem(node) or isinstance(op, (ops.Permute, ops.Reshape, ops.Select, ops.Split))


def _symbols(size: Any) -> Any:
    return () if isinstance(size, int) else size.node.expr.free_symbols


def _tensors(value: Any) -> list[torch.Tensor]:
    leaves = value if isinstance(value, (tuple, list)) else [value]
    return [one for one in leaves if isinstance(one, torch.Tensor)]


def _batch(node: Any) -> Any:
    """The dynamic size of an input's first axis, None if it has none."""
    value = node.meta.get("val")
    dynamic = isinstance(value, torch.Tensor) and value.ndim > 0
    return value.shape[0] if dynamic and not isinstance(value.shape[0], int) else None


def _lower(module: fx.GraphModule, truth: Truth, options: Options, report: Report) -> Any:
    """The callable of the backend asked for, checked on the inputs; eager, with a note, if none is good."""
    if options.backend == "eager":
        return module
    in_spec: Any = module._in_spec
    args, kwargs = pytree.tree_unflatten(truth.inputs, in_spec)
    trainable = options.mode != "deploy"
    task = auto.Task(module, args, kwargs, trainable, truth.judge, options.say)
    if options.backend == "auto":
        choice = auto.choose(task, backends.candidates(), options.tuning)
    else:
        choice = auto.build(task, backends.find(options.backend))
    report.backend = choice.backend
    report.backend_table = [row.data() for row in choice.rows]
    report.backend_notes += choice.notes
    if truth.reason:
        report.backend_notes.append(
            f"checked against a run in its own dtypes, not float64: {truth.reason}"
        )
    return choice.run


__all__ = ["MODES", "Record", "declared_inputs", "optimize"]
