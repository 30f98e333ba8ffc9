"""One step at a time: a rolled model as a module that takes the input of one step and keeps its states.

    live = graphopt.streaming(fast)         fast: [T, N, ...] -> [T, N, ...]
    for t in range(T):
        y[t] = live(x[t])                   [N, ...] -> [N, ...]
    live.reset()

It is built on the graph, in which loops over time are scans (`graphopt.passes.roll_steps`): each of them
becomes one step, and what is done to all steps at once becomes what is done to one
(`graphopt.ir.recurrence.one_step`). What mixes steps is refused, naming it, unless it is a sum or a mean
over time that leads to the output alone, which is left off: then the step returns what is summed.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from graphopt.ir.graph import Signature
from graphopt.ir.recurrence.one_step import NONE, SAME, OneStep, Place, StreamingError
from graphopt.ir.recurrence.operator import SCAN
from graphopt.module import OptimizedModule, _place, random_input, retarget

LIMIT = 1e-10  # relative, in float64, of a step against the same step of the whole


def streaming(module: OptimizedModule, axis: int | str | None = "auto") -> Streaming:
    """A module that computes one step of `module` per call, in the same way and with the same parameters.

    Args:
        module: optimized, its loops over time rolled (`roll-steps`, in the preset deploy).
        axis: of time in the inputs; None where every step gets the same input; "auto" finds out.

    A model with parameters of its own for every step reads those of the step that it is at, and has no
    more steps than these, until `reset`.

    Raises:
        StreamingError: naming the operation that needs more than one step, or what else is missing.
    """
    graph = module.graph_module
    if graph is None:
        raise StreamingError("the model was captured by region: no graph has all of it")
    if not module._signature.flat:
        raise StreamingError("the model takes other inputs than tensors given by position")
    counts = {node.args[1] for node in graph.graph.nodes if node.target is SCAN}
    if len(counts) != 1:
        found = f"loops of {sorted(counts)} steps" if counts else "no rolled loop over time"
        raise StreamingError(f"expected loops of one length, found {found}")
    (steps,) = counts
    reasons = []
    for repeated, places in itertools.product((False, True), _placements(graph, steps, axis)):
        try:
            start, step, count, results, numbered = OneStep(graph, steps, places, repeated).build()
            limit = steps if numbered else None
            live = Streaming(graph, start, step, count, results, module._signature, limit)
            _check(module, graph, steps, places, live)
            return live
        except StreamingError as reason:
            reasons.append(str(reason))
    if not reasons:
        raise StreamingError(f"no input has an axis of {steps} steps; expected one, or axis=None")
    raise StreamingError(next((one for one in reasons if SAME not in one), reasons[0]))


class Streaming(nn.Module):
    """One step of a model per call; see `streaming`.

    States are buffers, moved and copied with the module and no part of its state_dict; gradients flow
    through them from step to step. `states` is None until the first call. `limit` is the number of steps
    of a model that has parameters of its own for each of them, else None; `time` is the number of the
    next step.
    """

    def __init__(
        self, source: fx.GraphModule, start: fx.Graph, step: fx.Graph, count: int,
        places: Sequence[Place], signature: Signature, limit: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.limit, self.time = limit, 0
        self.start = fx.GraphModule(source, start)
        self.step = fx.GraphModule(source, step)
        self.places, self.signature = tuple(places), signature
        self.names = [f"state_{i}" for i in range(count)]
        for name in self.names:
            self.register_buffer(name, None, persistent=False)

    @property
    def states(self) -> list[Tensor] | None:
        held = [getattr(self, name) for name in self.names]
        return None if any(one is None for one in held) else held

    def _apply(self, fn: Any, recurse: bool = True) -> Streaming:
        before = _place(self)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = _place(self)
        if before is not None and after is not None and before != after:
            for one in (self.start, self.step):
                retarget(one.graph, dict(zip(before, after, strict=True)))
                one.recompile()
        return self

    def reset(self) -> None:
        """Start anew: the next call is the first step, of any batch size."""
        for name in self.names:
            setattr(self, name, None)
        self.time = 0

    def forward(self, *inputs: Tensor) -> Any:
        if self.limit is not None and self.time >= self.limit:
            raise StreamingError(
                f"expected at most {self.limit} steps, for each of which the model has parameters of its "
                f"own, found step {self.time + 1}; call reset() to start anew"
            )
        given: tuple[Any, ...] = inputs if self.limit is None else (*inputs, self.time)
        held = self.states
        if held is None:
            held = list(self.start(*given))
        results, held = self.step(*given, *held)
        self.time += 1
        for name, value in zip(self.names, held, strict=True):
            setattr(self, name, value)
        return pytree.tree_unflatten(list(results), self.signature.out_spec)


def _placements(graph: fx.GraphModule, steps: int, axis: int | str | None) -> Iterator[list[Place]]:
    """Where time may be in the inputs, the likely first."""
    options = []
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            shape = node.meta.get("type", {}).get("shape", [])
            fit = [Place("stacked", i) for i, size in enumerate(shape) if size == steps]
            if isinstance(axis, int):
                fit = [one for one in fit if one.axis == axis % max(len(shape), 1)]
            options.append(
                [NONE] if axis is None else [*fit, NONE] if axis == "auto" else fit or [NONE]
            )
    yield from (list(one) for one in itertools.product(*options))


def _check(
    module: OptimizedModule, graph: fx.GraphModule, steps: int, inputs: list[Place], live: Streaming
) -> None:
    """Compare every step with the whole, in float64."""
    whole, twin = copy.deepcopy(module).double(), copy.deepcopy(live).double()
    generator = torch.Generator().manual_seed(0)
    given = []
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            value = random_input(node.meta["type"], generator)
            given.append(2 * value.double() if value.is_floating_point() else value)
    with torch.no_grad():
        truth = pytree.tree_leaves(whole.graph_module(*given))  # type: ignore[misc]
        for t in range(steps):
            now = [
                x.select(p.axis, t) if p.kind == "stacked" else x
                for x, p in zip(given, inputs, strict=True)
            ]
            for found, place, one in zip(
                pytree.tree_leaves(twin(*now)), live.places, truth, strict=True
            ):
                if place.kind == "stacked":
                    expected = one.select(place.axis, t)
                elif place.kind == "flat":
                    expected = one.unflatten(0, (steps, -1))[t]
                elif place.kind == "step" and t == steps - 1:
                    expected = one
                else:
                    continue
                error = float((found - expected).abs().max()) if found.numel() else 0.0
                if found.shape != expected.shape or not error <= LIMIT * max(
                    1.0, float(expected.abs().max())
                ):
                    raise StreamingError(f"step {t} would differ from the whole by {error:.1e}")


__all__ = ["Place", "Streaming", "StreamingError", "streaming"]
