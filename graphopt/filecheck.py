"""Whether a written file computes what the optimized graph does: both are run and compared in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.backends.exported import Exported
from graphopt.backends.frozen import state
from graphopt.ir.graph import Graph, State, written
from graphopt.ir.source import clone_inputs, first_line, untouched
from graphopt.module import OptimizedModule
from graphopt.verify.truth import Truth


class ExportError(ValueError):
    """A model that a format cannot express, or a file that does not compute what the model does."""


@dataclasses.dataclass(frozen=True)
class Source:
    """What is exported: the graph, the inputs that are tried first, and the names of both ends."""

    module: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def spec(self) -> Any:
        return pytree.tree_structure((self.args, self.kwargs))

    @property
    def leaves(self) -> list[Any]:
        return pytree.tree_leaves((self.args, self.kwargs))

    def flat(self, part: Exported) -> tuple[list[str], list[str], list[str]]:
        """The names of what a program takes and gives, and of what is left out."""
        given = [self.inputs[position] for position in part.reads]
        computed: dict[int, str] = {}
        left = [
            name for name, leaf in zip(self.inputs, self.leaves, strict=True)
            if isinstance(leaf, Tensor) and name not in given
        ]  # fmt: skip
        for name, (kind, key) in zip(self.outputs, part.results, strict=True):
            if kind == "computed" and key not in computed:
                computed[key] = name
            else:
                left.append(name)
        return given, [computed[index] for index in range(len(computed))], left


# A loaded file as a function of (args, kwargs) that gives the leaves of the result, None where it has none.
Loaded = Callable[[tuple[Any, ...], dict[str, Any]], Sequence[Any]]


def compared(
    module: OptimizedModule, source: Source, loaded: Loaded, format: str
) -> tuple[float, float]:
    """The largest errors of the file and of the graph against the graph in float64; see `Truth`.

    Raises:
        ExportError: if the file does not run, or is further off than other orders of summation explain.
    """
    graph = _graph(module, source.module)
    worst = own_worst = 0.0
    for args, kwargs in _trials(source):
        with untouched(source.module):
            expected = _leaves(source.module, args, kwargs)
        try:
            with untouched(source.module):
                found = loaded(*clone_inputs(args, kwargs))
        except Exception as failure:
            raise ExportError(
                f"{format}: the written file does not run on inputs of {_shapes(args, kwargs)}: "
                f"{first_line(failure)}"
            ) from failure
        kept = [index for index, one in enumerate(found) if isinstance(one, Tensor)]
        types = [[one[index].dtype for index in kept] for one in (found, expected)]
        if types[0] != types[1]:
            raise ExportError(f"{format}: the written file gives {types[0]}, expected {types[1]}")
        truth = Truth(graph, pytree.tree_leaves((args, kwargs)))
        whole = list(truth.outputs)
        for index in kept:
            whole[index] = found[index]
        error, limit = truth.judge(whole)
        if not error <= limit:
            raise ExportError(
                f"{format}: the written file computes something else: on inputs of "
                f"{_shapes(args, kwargs)} it is off by {error:.1e} from the float64 outputs, the "
                f"optimized module by {truth.own_error:.1e}"
            )
        worst, own_worst = max(worst, error), max(own_worst, truth.own_error)
    return worst, own_worst


def _graph(module: OptimizedModule, code: fx.GraphModule) -> Graph:
    """The graph of a module with its present states, to be run."""
    names = {str(node.target) for node in code.graph.nodes if node.op == "get_attr"}
    states = {name: State(state(code, name), "constant") for name in names}
    return Graph(code.graph, states, module._signature, FakeTensorMode())


def _leaves(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    args, kwargs = clone_inputs(args, kwargs)
    return pytree.tree_leaves(module(*args, **kwargs))


def _trials(source: Source) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The inputs as given; the same with another size where axes are dynamic, if the graph takes it."""
    yield source.args, source.kwargs
    nodes = source.module.graph.nodes
    if any(written(node) for node in nodes):  # the file would start from another state
        return
    kinds = [node.meta.get("type") for node in nodes if node.op == "placeholder"]
    sizes = {str(size) for kind in kinds if kind for size in kind["shape"] if isinstance(size, str)}
    if not sizes or not all(size.isidentifier() for size in sizes):
        return
    leaves = []
    for leaf, kind in zip(source.leaves, kinds, strict=True):
        for axis, size in enumerate(kind["shape"] if kind and isinstance(leaf, Tensor) else ()):
            if isinstance(size, str):
                other = leaf.shape[axis] + 1
                leaf = leaf.index_select(
                    axis, torch.arange(other, device=leaf.device) % leaf.shape[axis]
                )
        leaves.append(leaf)
    args, kwargs = pytree.tree_unflatten(leaves, source.spec)
    try:
        with untouched(source.module):
            source.module(*args, **kwargs)
    except Exception:
        return
    yield args, kwargs


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    leaves = pytree.tree_leaves((args, kwargs))
    return ", ".join(str(list(one.shape)) for one in leaves if isinstance(one, Tensor))
