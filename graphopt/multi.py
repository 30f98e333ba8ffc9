"""multi(): one model that computes every row of a batch with the adapter of that row."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from graphopt.backends import base as backends
from graphopt.ir.capture import Captured, capture
from graphopt.ir.cost import target
from graphopt.ir.distance import relative_error
from graphopt.ir.driver import Session
from graphopt.ir.graph import Graph
from graphopt.ir.inputs import as_call
from graphopt.ir.interpret import Interpreter
from graphopt.ir.lint import lint
from graphopt.ir.source import clone_inputs, copy_module
from graphopt.ir.variants import NotAVariant, combine
from graphopt.module import OptimizedModule
from graphopt.optimize import Options, Progress, rewrite_captured
from graphopt.pipeline import Pipeline

IDS = "adapter_ids"
REST = "canonicalize,stack-siblings,materialize,canonicalize"


def multi(
    base: nn.Module,
    adapted: Sequence[nn.Module],
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    backend: str = "eager",
    progress: Progress | None = None,
    float64_limit: float = 1e-10,
) -> OptimizedModule:
    """One model for a batch whose rows want different adapters.

        fast = graphopt.multi(base, [french, german], (x,))
        y = fast(x, adapter_ids=torch.tensor([0, 1, 1, -1]))  # -1: the base

    What the models share is computed once for all rows; scales, biases and products of low rank are
    looked up by row (graphopt.ir.variants). Any adapter goes that can be merged: it is what changes
    a parameter, whatever computes it. To serve one adapter alone, `graphopt.optimize` merges it,
    which is faster.

    Args:
        base: the model without adapters, in eval mode.
        adapted: models that are `base` with an adapter each. They may share tensors with `base`.
            None is changed.
        args, kwargs: example inputs; the first axis of the first tensor is that of the rows.
        backend: as for `optimize`.
        progress: called with a line of text at each step.
        float64_limit: the largest relative difference from each model, in float64, per row.

    Returns:
        An `OptimizedModule` with one more keyword input, `adapter_ids`: int64 `[rows]`, from -1 to
        `len(adapted) - 1`; anything else raises an IndexError of torch's.

    Raises:
        NotAVariant: if a model differs from `base` in more than parameters, or in one that rows cannot
            choose; it says where.
        CaptureError: if a model cannot be captured as one graph.
        ValueError: without adapted models, or if a row differs from its model by more than the limit.
    """
    if not adapted:
        raise ValueError("adapted: expected at least one model; use optimize for the base alone")
    args, kwargs = as_call(args, kwargs)
    if args is None:
        raise ValueError("args: expected example inputs")
    kwargs = dict(kwargs or {})
    if backend != "auto":
        backends.find(backend)
    options = Options("deploy", Pipeline(REST), backend, None, progress, float64_limit)
    start = time.perf_counter()
    sources, merged = [], []
    notes: list[str] = []
    for number, model in enumerate([base, *adapted], -1):
        options.say(f"capturing {'the base' if number < 0 else f'adapter {number}'}")
        # The base's tensors go into the result: these are ours.
        own = copy_module(model) if number < 0 else _sharing(model)
        captured = capture(own, args, kwargs)
        sources.append(captured.graph.clone())
        # What an adapter changes is compared with the base, not stored: nothing is stored twice.
        merged.append(_merged(captured.graph, "tune" if number < 0 else "untie,tune", options))
        notes += [one for one in captured.notes if one not in notes]
    options.say("combining")
    graph = merged[0]
    try:
        combine(graph, merged[1:], target(backend, graph.device), IDS)
    except NotAVariant as error:
        raise NotAVariant(f"{type(base).__name__}: {error}") from None
    lint(graph, "multi")
    inputs = pytree.tree_leaves(clone_inputs(args, kwargs))
    options.say("checking every adapter in float64")
    _check(graph, sources, inputs, float64_limit)
    rows = next(one.shape[0] for one in inputs if isinstance(one, torch.Tensor) and one.ndim)
    ids = torch.arange(rows, device=graph.device) % (len(adapted) + 1) - 1
    return rewrite_captured(
        base, Captured(graph, "multi", notes), args, {**kwargs, IDS: ids}, options,
        time.perf_counter() - start,
    )  # fmt: skip


def _sharing(model: nn.Module) -> nn.Module:
    """A copy of the modules over the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(one): one for one in tensors})


def _merged(graph: Graph, passes: str, options: Options) -> Graph:
    """The graph with its adapters in the weights; unchecked, since all is checked in the end."""
    Pipeline(passes).run(Session(graph, target=target(options.backend, graph.device)))
    return graph


@torch.no_grad()
def _check(graph: Graph, sources: Sequence[Graph], inputs: Sequence[Any], limit: float) -> None:
    """Every row of every adapter, alone and mixed, against its own model, in float64.

    Raises:
        ValueError: naming the adapter.
    """
    count = next(one.shape[0] for one in inputs if isinstance(one, torch.Tensor) and one.ndim)
    device = graph.device

    def run(one: Graph, *more: Any) -> tuple[Any, ...]:
        return Interpreter(one, lifted=True, writes=False).run([*inputs, *more])

    truths = [run(source) for source in sources]
    for number, truth in enumerate(truths, -1):
        found = run(graph, torch.full((count,), number, device=device))
        if not (error := relative_error(found, truth)) <= limit:
            name = "the base" if number < 0 else f"adapter {number}"
            raise ValueError(
                f"{name}: float64 outputs differ by {error:.1e}, more than {limit:.0e}"
            )
    for first in range(0, len(truths), max(count, 1)):
        ids = (torch.arange(count) + first) % len(truths)
        mixed = run(graph, ids.to(device) - 1)
        expected = [
            torch.stack([truths[int(i)][k][row] for row, i in enumerate(ids)])
            if isinstance(one, torch.Tensor) and one.ndim and one.shape[0] == count else one
            for k, one in enumerate(mixed)
        ]  # fmt: skip
        if not (error := relative_error(mixed, expected)) <= limit:
            raise ValueError(
                f"adapters {sorted({int(i) - 1 for i in ids})} in one batch: float64 outputs differ "
                f"by {error:.1e}, more than {limit:.0e}"
            )
