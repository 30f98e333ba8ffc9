"""What the importance of channel groups is judged from: parameters, and the caller's data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.utils._pytree as pytree
from numpy.typing import NDArray
from torch import Tensor, fx

from graphopt.ir.channels import Groups, Labels
from graphopt.ir.channels.labels import FIXED, Layers
from graphopt.ir.graph import Graph
from graphopt.ir.inputs import as_call
from graphopt.ir.interpret import Interpreter
from graphopt.ir.ops.base import hint
from graphopt.ir.tiles import BLOCK

Scores = NDArray[np.float64]  # one for every label
Loss = Callable[[Any, Any], Tensor]
Key = TypeVar("Key")
Operands = Mapping[fx.Node, Any]
Call = Callable[[Operands], Any]
Around = Callable[[fx.Node, dict[fx.Node, Any], Call], Any]


class EvidenceError(ValueError):
    """Data or a loss that is needed is missing, or of the wrong form."""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Parameters by channel group, and what the model does on the caller's data.

    `data` are batches, each `(inputs, target)`; inputs as for `graphopt.optimize`. `loss(output,
    target)` gives a scalar; output has the form that the model returns.
    """

    groups: Groups
    data: Sequence[tuple[Any, Any]] = ()
    loss: Loss | None = None
    seed: int = 0

    @property
    def graph(self) -> Graph:
        return self.groups.graph

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters that a group is part of, by name."""
        states = self.graph.states
        return {
            name: states[name].tensor.detach()
            for name, labels in self.groups.states.items()
            if states[name].kind == "parameter" and labels.axes
        }

    def leaves(self) -> dict[str, Tensor]:
        """Copies of `parameters` to differentiate with respect to."""
        return {name: one.clone().requires_grad_() for name, one in self.parameters.items()}

    def summed(self, measures: Mapping[str, Tensor]) -> Scores:
        """Measures of every element of parameters, summed over those of each group.

        An element of a weight counts for the group of its row and for that of its column.
        """
        scores = self.zeros()
        for name, sizes in measures.items():
            for axis, layers in self.groups.states[name].axes.items():
                add_along(scores, layers, sizes, axis)
        return scores

    def measured(self, measure: Callable[[Tensor], Tensor]) -> Scores:
        """`summed` of a measure of every element of the parameters in float64, taken in blocks of rows
        that stay in the cache."""
        scores = self.zeros()
        for name, one in self.parameters.items():
            axes = self.groups.states[name].axes
            totals = {axis: one.new_zeros(one.shape[axis], dtype=torch.float64) for axis in axes}
            rows = max(1, BLOCK * len(one) // max(one.numel(), 1))
            for start in range(0, len(one), rows):
                sizes = measure(one[start : start + rows].double())
                for axis, total in totals.items():
                    part = total if axis else total[start : start + rows]
                    part += _along(sizes, axis)
            for axis, layers in axes.items():
                add_along(scores, layers, totals[axis], 0)
        return scores

    def zeros(self) -> Scores:
        return np.zeros(self.groups.trace.coupling.count)

    def channels(self, node: fx.Node) -> dict[int, Layers]:
        """The axes of a value that groups have entries of, with the group of each entry, by layer."""
        found = self.groups.trace.labels.get(node)
        if not isinstance(found, Labels):
            return {}
        classes = self.groups.classes
        axes = {
            axis: tuple(classes[layer] for layer in layers) for axis, layers in found.axes.items()
        }
        return {
            axis: layers for axis, layers in axes.items()
            if any(bool((one != FIXED).any()) for one in layers)
        }  # fmt: skip

    def batches(self, needed_by: str) -> Iterator[tuple[list[Any], Any]]:
        return batches(self.graph, self.data, needed_by)

    def run(
        self, inputs: Sequence[Any], states: Mapping[str, Tensor] | None = None,
        see: Callable[[fx.Node, Any], Any] | None = None, around: Around | None = None,
    ) -> Any:  # fmt: skip
        """The output of the model, with some states in place of its own; `see` is shown the value of
        every call and says what goes on in its place; `around(node, operands, call)` makes every call,
        `call(operands)`, with operands of its own if it likes. Gradients flow."""
        flat = _Seen(self.graph, states or {}, see, around).run(inputs)
        return pytree.tree_unflatten(list(flat), self.graph.signature.out_spec)

    def gradients(self, needed_by: str) -> Iterator[dict[str, Tensor]]:
        """The gradient of the loss with respect to every parameter, batch by batch.

        Raises:
            EvidenceError: without data or loss.
        """
        for loss in self.losses(needed_by):
            with torch.enable_grad():
                leaves = self.leaves()
                found = gradients_of(loss(leaves), leaves)
            yield found

    def judge(self, needed_by: str) -> Loss:
        """The loss.

        Raises:
            EvidenceError: if there is none.
        """
        if self.loss is None:
            raise EvidenceError(f"{needed_by} needs a loss: loss(output, target)")
        return self.loss

    def losses(self, needed_by: str) -> Iterator[Callable[..., Tensor]]:
        """The loss on every batch, as a function of what `run` takes besides inputs.

        Raises:
            EvidenceError: without data or loss.
        """
        judge = self.judge(needed_by)

        def on(inputs: Any, target: Any) -> Callable[..., Tensor]:
            return lambda *args, **kwargs: judge(self.run(inputs, *args, **kwargs), target)

        for inputs, target in self.batches(needed_by):
            yield on(inputs, target)


def batches(
    graph: Graph, data: Sequence[tuple[Any, Any]], needed_by: str
) -> Iterator[tuple[list[Any], Any]]:
    """Flat inputs and target of every batch.

    Raises:
        EvidenceError: if there are none, or one is not called as the model is.
    """
    if not data:
        raise EvidenceError(f"{needed_by} needs data: a sequence of (inputs, target)")
    for number, pair in enumerate(data):
        if reason := misfit(graph, pair):
            raise EvidenceError(f"data[{number}]: {reason}")
        inputs, target = pair
        yield _flat(inputs)[0], target


def misfit(graph: Graph, pair: Any) -> str:
    """Why a batch is none of the model, as (inputs, target); empty if it is."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        return f"expected (inputs, target), found a {type(pair).__name__}"
    leaves, spec = _flat(pair[0])
    expected = graph.signature.in_spec
    if spec != expected:
        return f"expected inputs of the form {expected}, found {spec}"
    for node, leaf in zip(graph.inputs, leaves, strict=True):
        if reason := _mistyped(node.meta.get("val"), leaf):
            return f"input {node.name}: {reason}"
    return ""


def _flat(inputs: Any) -> tuple[list[Any], Any]:
    args, kwargs = as_call(inputs, None)
    return pytree.tree_flatten((args, dict(kwargs or {})))


def _mistyped(known: Any, found: Any) -> str:
    """Why `found` cannot be given where a graph was traced with `known`; empty if it can."""
    if not isinstance(known, Tensor):
        return ""
    if not isinstance(found, Tensor):
        return f"expected a tensor, found {found!r:.40}"
    sizes = [str(one) if isinstance(one, int) else "?" for one in known.shape]
    fits = found.ndim == known.ndim and all(
        size in ("?", str(other)) for size, other in zip(sizes, found.shape, strict=True)
    )
    if fits and found.dtype == known.dtype:
        return ""
    return (f"expected {known.dtype} [{', '.join(sizes)}], "
            f"found {found.dtype} {list(found.shape)}")  # fmt: skip


class _Seen(Interpreter):
    def __init__(
        self, graph: Graph, states: Mapping[str, Tensor],
        see: Callable[[fx.Node, Any], Any] | None, around: Around | None,
    ) -> None:  # fmt: skip
        super().__init__(graph, writes=False)
        self._states, self._see, self._around = states, see, around

    def state(self, name: str, rows: slice | None = None) -> Tensor:
        if name not in self._states:
            return super().state(name, rows)
        return self._states[name] if rows is None else self._states[name][rows]

    def call(self, node: fx.Node, env: Any) -> Any:
        if self._around is None:
            value = super().call(node, env)
        else:
            operands = {one: env[one] for one in node.all_input_nodes}
            value = self._around(node, operands, partial(super().call, node))
        return value if self._see is None else self._see(node, value)


def gradients_of(
    value: Tensor, leaves: Mapping[Key, Tensor], create_graph: bool = False, keep: bool = False
) -> dict[Key, Tensor]:
    """The gradient of a scalar with respect to each leaf, zeros for those it does not depend on.
    `keep` what is needed to do it again."""
    if not value.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(
        value, list(leaves.values()), retain_graph=keep or create_graph, create_graph=create_graph,
        materialize_grads=True,
    )  # fmt: skip
    return dict(zip(leaves, found, strict=True))


def add_along(scores: Scores, layers: Layers, sizes: Tensor, axis: int) -> None:
    """Add measures of every element of a tensor to the scores of the groups along an axis."""
    along = _along(sizes.detach().double(), axis).cpu().numpy()
    for layer in layers:
        np.add.at(scores, layer, along)


def _along(sizes: Tensor, axis: int) -> Tensor:
    """The sums for every entry of an axis."""
    others = [one for one in range(sizes.ndim) if one != axis]
    return sizes.sum(others) if others else sizes


def mean_of(found: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of tensors by name."""
    total: dict[str, Tensor] = {}
    count = 0
    for one in found:
        count += 1
        for name, value in one.items():
            total[name] = total[name] + value if name in total else value
    return {name: value / count for name, value in total.items()}


def example(graph: Graph) -> list[Any]:
    """Inputs of the sizes that the graph was traced with: normal numbers, or zeros for integers."""
    generator, found = torch.Generator().manual_seed(0), []
    for node, constant in zip(graph.inputs, graph.signature.inputs, strict=True):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            shape = [hint(size) for size in value.shape]
            drawn = torch.randn(shape, generator=generator) * value.dtype.is_floating_point
            found.append(drawn.to(value.device, value.dtype))
        else:
            found.append(constant)
    return found
