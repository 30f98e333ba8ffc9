"""Capture: from an nn.Module and example inputs to a Graph.

The ladder: `torch.export` non-strict with a dynamic batch, the same with static shapes, strict
export, export of the `torch.fx.symbolic_trace` of the module. Every rung's graph is run against the
module before it is accepted. What no rung captures is left to `graphopt.optimize`, which then
captures the largest submodules that do (regional capture).
"""

from __future__ import annotations

import dataclasses
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from graphopt.ir import gradients
from graphopt.ir.backwards import settle
from graphopt.ir.functional import Normalizer
from graphopt.ir.graph import Graph, Signature, State, parameters_of
from graphopt.ir.interpret import Interpreter
from graphopt.ir.process import reseed, seeded
from graphopt.ir.source import (
    CaptureError,
    _identical,
    attributes_kept,
    clone_inputs,
    copy_module,
    first_line,
    reference_run,
    restored,
    source_notes,
)


@dataclasses.dataclass
class Captured:
    """A graph, the rung that gave it, and what the user should know about it."""

    graph: Graph
    method: str
    notes: list[str]


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> Captured:
    """Capture `model` as it would run on `args` and `kwargs`, in its present mode.

    The graph takes over the parameters and buffers of `model` (same tensors): hand in a copy if
    the original must live on independently.

    Raises:
        CaptureError: if no rung of the ladder gives a graph that computes what the module does.
    """
    kwargs = dict(kwargs or {})
    with gradients.counted() as called:
        expected, deterministic = reference_run(model, args, kwargs)
    states = [] if dynamic_shapes is not None else states_of_rows(model, args, kwargs)
    attempts: dict[str, str] = {}
    for name, rung, custom in _ladder(model, args, kwargs, dynamic_shapes):
        for keep in (True, False) if custom and called.count else (False,):
            try:
                graph, calls = _traced(model, args, kwargs, rung, keep)
                difference = misfit(graph, args, kwargs)
                if deterministic and not difference:
                    difference = disagreement(graph, args, kwargs, expected)
                if deterministic and not difference and graph.mutated:
                    difference = drift(graph, model, args, kwargs)
            except Exception as error:
                attempts[name] = first_line(error)
                continue
            if difference:
                attempts[name] = f"the graph computes something else: {difference}"
                continue
            notes = source_notes(model) + gradients.notes(called, calls)
            notes += _fixed_rows(graph, states)
            if not deterministic:
                notes.append(
                    "two runs of the model differ; the captured graph could not be compared with it"
                )
            return Captured(graph, name, notes)
    raise CaptureError(type(model).__name__, attempts)


def _traced(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rung: Callable[[], Any],
    keep: bool,
) -> tuple[Graph, gradients.Calls]:
    """The graph that a rung gives, with custom gradients if they are to be kept."""
    # A trace may run parts of the module for real. Gradients are on, or export would not see where
    # the model turns them off.
    with (
        _quiet(),
        restored(model),
        attributes_kept(model),
        torch.enable_grad(),
        _DataDetached(),
        gradients.kept(keep) as calls,
    ):
        program = rung()
    with _quiet():
        settle(program.graph_module, calls)
    return from_exported(program, model, args, kwargs), calls


# Its name, what it does, and whether custom gradients can be kept while it does.
Rung = tuple[str, Callable[[], Any], bool]


def _ladder(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> Iterator[Rung]:
    def export(
        module: nn.Module, inputs: tuple[Any, dict[str, Any]], shapes: Any, strict: bool
    ) -> Any:
        return torch.export.export(
            module, inputs[0], inputs[1], dynamic_shapes=shapes, strict=strict
        )

    if dynamic_shapes is not None:
        yield "export", lambda: export(model, (args, kwargs), dynamic_shapes, False), True
        yield "export strict", lambda: export(model, (args, kwargs), dynamic_shapes, True), False
        return
    for more in (1, 0) if states_of_rows(model, args, kwargs) else (0,):
        if (found := with_dynamic_batch(args, kwargs, more)) is not None:
            yield "export", partial(export, model, found[:2], found[2], False), True
    yield "export static", lambda: export(model, (args, kwargs), None, False), True
    yield "export strict", lambda: export(model, (args, kwargs), None, True), False

    def traced() -> Any:
        return export(fx.symbolic_trace(model), (args, kwargs), None, False)

    yield "symbolic trace", traced, False


def with_dynamic_batch(args: tuple[Any, ...], kwargs: dict[str, Any], more: int = 0) -> Any:
    """Inputs with at least two rows and their dynamic shapes, or None without a tensor input.

    The batch is the first axis of the first tensor, and of every tensor with as many rows. Export
    specializes sizes of one, so single-row inputs are doubled for tracing. `more` rows are added.
    """
    rows = _rows(args, kwargs)
    if rows == 0:
        return None
    added = more + (rows == 1)

    def grown(leaf: Any) -> Any:
        if added and _has_rows(leaf) and leaf.shape[0] == rows:
            return torch.cat([leaf, *[leaf[:1]] * added])
        return leaf

    args, kwargs = pytree.tree_map(grown, (args, kwargs))
    shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for leaf in filter(_has_rows, pytree.tree_leaves((args, kwargs))):
        if leaf.shape[0] == rows + added:
            shapes[leaf] = {0: torch.export.Dim.AUTO}
    return args, kwargs, shapes


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 0


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    leaves = pytree.tree_leaves((args, kwargs))
    return next((int(leaf.shape[0]) for leaf in leaves if _has_rows(leaf)), 0)


def states_of_rows(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """The buffers with as many rows as are traced: states that a run of this batch size left, from
    which a trace would conclude that there is no other."""
    rows = max(_rows(args, kwargs), 2)
    return [
        name for name, one in model.named_buffers() if one.ndim > 1 and one.shape[0] == rows
    ]  # fmt: skip


def _fixed_rows(graph: Graph, states: list[str]) -> list[str]:
    """That the batch became a constant, where states of its size may be why."""
    first = next((one.meta["val"] for one in graph.inputs if _has_rows(one.meta["val"])), None)
    if not states or first is None or not isinstance(first.shape[0], int):
        return []
    return [
        f"the batch is fixed to {first.shape[0]}: the states {', '.join(states)} are of this size"
    ]


def misfit(graph: Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Which example input the graph does not take (tracing may have specialized a size)."""
    for node, leaf in zip(graph.inputs, pytree.tree_leaves((args, kwargs)), strict=True):
        if isinstance(leaf, torch.Tensor):
            for axis, (size, found) in enumerate(
                zip(node.meta["val"].shape, leaf.shape, strict=True)
            ):
                if isinstance(size, int) and size != found:
                    return f"axis {axis} of {node.name} became the constant {size}"
    return ""


# -- from torch.export to Graph -----------------------------------------------------------------


def from_exported(
    program: Any,
    model: nn.Module | None = None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Graph:
    """The normal form of a `torch.export.ExportedProgram`; states are taken from `model` if given.

    Raises:
        Unsupported: if the program has control flow, or writes that normal form cannot express.
    """
    signature = program.graph_signature
    states, aliases = _states(program, model)
    fake_mode = next(
        value.fake_mode
        for node in program.graph.nodes
        if hasattr(value := node.meta.get("val"), "fake_mode")
    )
    graph = fx.Graph()
    normal = Normalizer(graph, fake_mode)
    targets = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    used = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    user_inputs = [node for name, node in used.items() if name not in targets]
    for source in user_inputs:
        normal.add_external(source, graph.placeholder(source.name))
    reads: dict[str, fx.Node] = {}
    for name, source in used.items():
        if name in targets:
            state = aliases.get(targets[name], targets[name])
            if state not in reads:
                reads[state] = graph.get_attr(state)
                reads[state].meta["where"] = state.rpartition(".")[0]
            normal.add_external(source, reads[state])
    normal.run(program.graph_module)
    normal.finish()
    outputs = _outputs(program, normal)
    graph.output(tuple(outputs))
    result = Graph(graph, states, _signature(program, model, args, kwargs), fake_mode, aliases)
    result.eliminate_dead_code()
    return result


def _states(program: Any, model: nn.Module | None) -> tuple[dict[str, State], dict[str, str]]:
    states: dict[str, State] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    transient = set(program.graph_signature.non_persistent_buffers)
    parameters = dict(program.named_parameters())
    pool: list[tuple[str, Any, str]] = [
        (name, tensor, "parameter" if name in parameters else "buffer")
        for name, tensor in program.state_dict.items()
    ]
    pool += [
        (name, tensor, "buffer" if name in transient else "constant")
        for name, tensor in program.constants.items()
        if isinstance(tensor, torch.Tensor)
    ]
    if model is not None:
        # The module's own objects, tied names included, also those the graph does not read.
        own: list[tuple[str, Any, str]] = [
            (n, t, "parameter") for n, t in model.named_parameters(remove_duplicate=False)
        ]
        own += [(n, t, "buffer") for n, t in model.named_buffers(remove_duplicate=False)]
        known = {name for name, _, _ in own}
        pool = own + [item for item in pool if item[0] not in known]
        for prefix, module in model.named_modules():
            transient |= {
                f"{prefix}.{name}".lstrip(".") for name in module._non_persistent_buffers_set
            }
    for name, tensor, kind in pool:
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        states[name] = State(tensor, kind, kind == "parameter" or name not in transient)
    return states, aliases


def _outputs(program: Any, normal: Normalizer) -> list[Any]:
    signature = program.graph_signature
    results = next(iter(reversed(program.graph.nodes))).args[0]
    kept = []
    for spec, result in zip(signature.output_specs, results, strict=True):
        if spec.kind.name == "USER_OUTPUT":
            kept.append(normal.read(result))
        elif spec.kind.name not in ("BUFFER_MUTATION", "USER_INPUT_MUTATION"):
            raise ValueError(f"an output of kind {spec.kind.name}")
        elif isinstance(result, fx.Node):
            raise ValueError("a program that was already functionalized writes to its states")
    return kept


def _signature(
    program: Any, model: nn.Module | None, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
) -> Signature:
    example = (tuple(args), dict(kwargs or {})) if model is not None else program.example_inputs
    paths = pytree.tree_flatten_with_path(example)[0]
    parameters = parameters_of(model.forward) if model is not None else ()
    leaves = tuple(None if isinstance(leaf, torch.Tensor) else leaf for _, leaf in paths)
    spec = program.call_spec
    names = tuple(_input_name(path, parameters) for path, _ in paths)
    return Signature(spec.in_spec, spec.out_spec, leaves, parameters, names)


def _input_name(path: Any, parameters: tuple[tuple[str, int, Any], ...]) -> str:
    """`(0, 1, "k")` inside (args, kwargs) -> the name a user knows: `x["k"]`."""
    head, index, *rest = path
    if head.idx == 0:
        positional = [name for name, kind, _ in parameters if kind <= 1]
        name = positional[index.idx] if index.idx < len(positional) else f"args[{index.idx}]"
    else:
        name = str(index.key)
    return name + pytree.keystr(rest)


# -- faithful to the module ---------------------------------------------------------------------


def disagreement(
    graph: Graph, args: tuple[Any, ...], kwargs: dict[str, Any], expected: list[Any]
) -> str:
    """How the graph's outputs differ from `expected` beyond rounding; empty if they agree."""
    inputs = pytree.tree_leaves(clone_inputs(args, kwargs))
    with torch.no_grad():
        found = Interpreter(graph, writes=False).run(inputs)
    if len(found) != len(expected):
        return f"{len(found)} outputs, expected {len(expected)}"
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            if a is not b and a != b:
                return f"output {index} is {a!r}, expected {b!r}"
        elif a.shape != b.shape or a.dtype != b.dtype:
            return (
                f"output {index} is {a.dtype} {list(a.shape)}, expected {b.dtype} {list(b.shape)}"
            )
        elif not _identical(a, b):
            # The same kernels in the same order: differences come from memory formats alone.
            wide = torch.complex128 if a.is_complex() else torch.float64
            a, b = a.to(wide), b.to(wide)
            error = float(torch.nan_to_num(a - b).norm() / b.nan_to_num().norm().clamp(min=1e-30))
            limit = 1e3 * (torch.finfo(expected[index].dtype).eps if b.dtype == wide and
                           expected[index].dtype.is_floating_point else 0.0)  # fmt: skip
            if not error <= limit:
                return f"output {index} is off by {error:.1e} (relative)"
    return ""


def drift(graph: Graph, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """How the buffers that the graph writes differ from the module's after a few calls of each: a
    trace may have baked a counter in. Empty if they agree."""
    twin, own = copy_module(model), graph.clone()
    for state in own.states.values():
        state.tensor = state.tensor.detach().clone()
    run = Interpreter(own)
    with seeded(0), torch.no_grad():
        for step in range(3):
            inputs = clone_inputs(args, kwargs)
            reseed(step)
            twin(*inputs[0], **inputs[1])
            run.run(pytree.tree_leaves(clone_inputs(args, kwargs)), seed=step)
    buffers = dict(twin.named_buffers())
    for name in sorted(own.mutated):
        if name in buffers and not torch.allclose(
            own.states[name].tensor, buffers[name], rtol=1e-3
        ):
            return f"after three calls the buffer {name} is not the module's"
    return ""


class _DataDetached(TorchFunctionMode):
    """`x.data` is `x.detach()`, which a trace sees; the former leaves a constant behind."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()
        return func(*args, **(kwargs or {}))


@contextmanager
def _quiet() -> Iterator[None]:
    """Export warns, logs and prints about its own internals; its errors become reasons."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._export", "torch.fx",
               "torch.fx.experimental.symbolic_shapes", "torch._dynamo")]  # fmt: skip
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        sink = io.StringIO()
        with warnings.catch_warnings(), redirect_stdout(sink), redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
