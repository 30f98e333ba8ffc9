"""The checks of one model: it is optimized, and whatever can be seen of it compared."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import graphopt
from benchmarks.fuzz.gradients import compare_gradients
from benchmarks.fuzz.observe import Observed, distance, observe
from benchmarks.fuzz.rounding import NOISE_FACTOR, noise_of, nudged
from benchmarks.fuzz.row import Row, Wrong, first_line, place
from benchmarks.fuzz.source import assert_same_state, state_of
from graphopt.ir.driver import Session
from graphopt.passes.base import Pass
from graphopt.testing.strategies import Network

LIMIT, COARSE_LIMIT = 1e-9, 1e-5
OTHER_ROWS = 4


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
        row.verdict, row.reason = "invalid", first_line(error)
        return
    before = state_of(module, args, kwargs)
    probe = Probe()
    try:
        fast = graphopt.optimize(module, args, kwargs, mode=row.mode, passes=[probe, row.mode])
    except Exception as error:
        raise Wrong(f"optimize raised {place(error)}") from error
    report = fast.report
    row.captured, row.ops = report.capture.method, sorted(probe.ops)
    row.applied = [one.rewrite for one in report.applied]
    row.rolled_back = [(one.rewrite, one.reason) for one in report.rolled_back]
    if row.captured == "regional":
        row.refused = next(iter(report.capture.left_out.values()), "unknown")
    assert_same_state(before, state_of(module, args, kwargs))
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
        compare_gradients(row, module, fast, args, kwargs, limit)


def _compare(
    row: Row, module: nn.Module, fast: nn.Module, args: Any, kwargs: Any, limit: float,
    truth: Observed, prefix: str = "",
) -> None:  # fmt: skip
    try:
        found = observe(fast, args, kwargs)
    except Exception as error:
        raise Wrong(f"{prefix}the optimized model raises {place(error)}") from error
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
            noise = noise_of(module, lambda: observe(module, *nudged((args, kwargs))).leaves, b)
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
