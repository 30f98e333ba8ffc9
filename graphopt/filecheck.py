"""Whether a written file computes what the optimized graph does: both are run and compared in float64."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from graphopt.backends.exported import Exported
from graphopt.ir.graph import is_random, written
from graphopt.ir.interpret import lift
from graphopt.ir.source import clone_inputs, first_line, untouched
from graphopt.module import OptimizedModule
from graphopt.verify.model import relative_error

# A file may be so many times further from the float64 outputs than the graph run by torch is, and so many
# roundings of the outputs' dtype.
FACTOR, FLOOR = 16.0, 64.0
RUNS = 3
ROUNDINGS = 2.0


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
    """The largest errors of the file and of the graph against the graph in float64.

    Raises:
        ExportError: if the file does not run, or is further off than other orders of summation explain.
    """
    wide = _in_float64(module)
    worst = own_worst = 0.0
    for args, kwargs in _trials(source):
        with untouched(source.module):
            expected = _leaves(source.module, args, kwargs)
        truth = expected if wide is None else wide(args, kwargs)
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
        error, own = (
            relative_error([one[index] for index in kept], [truth[index] for index in kept])
            for one in (found, expected)
        )
        eps = [torch.finfo(one).eps for one in types[0] if one.is_floating_point]
        limit = FACTOR * own + FLOOR * max(eps, default=0.0)
        if not error <= limit:  # behind comparisons one run tells little
            rough = [_Rough(source.module, seed).outputs(args, kwargs) for seed in range(RUNS)]
            right = [truth[index] for index in kept]
            limit = FACTOR * max(
                relative_error([one[index] for index in kept], right) for one in rough
            )
        if not error <= limit:
            raise ExportError(
                f"{format}: the written file computes something else: on inputs of "
                f"{_shapes(args, kwargs)} it is off by {error:.1e} from the float64 outputs, the "
                f"optimized module by {own:.1e}"
            )
        worst, own_worst = max(worst, error), max(own_worst, own)
    return worst, own_worst


class _Rough(fx.Interpreter):
    """Runs a graph in its own dtypes with every value off by a few roundings (Monte Carlo arithmetic: Parker,
    Pierce, Eggert, 2000)."""

    def __init__(self, module: fx.GraphModule, seed: int) -> None:
        super().__init__(module)
        self.generator = torch.Generator().manual_seed(seed)

    def outputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        leaves = pytree.tree_leaves(clone_inputs(args, kwargs))
        with untouched(self.module):
            found: list[Any] = pytree.tree_leaves(self.run(*leaves, enable_io_processing=False))
        return found

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        return found if n.op == "output" else pytree.tree_map_only(Tensor, self._off, found)

    def _off(self, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        noise = torch.randn(value.shape, generator=self.generator).to(value)
        return value * (1 + ROUNDINGS * torch.finfo(value.dtype).eps * noise)


def _in_float64(module: OptimizedModule) -> Loaded | None:
    """The graph in float64; None if it has no such run, as where it draws random numbers."""
    graph = module.graph_module
    if graph is None or any(map(is_random, graph.graph.nodes)):
        return None
    try:
        wide = copy.deepcopy(module).double()
        inner: Any = wide.graph_module
        lifted = pytree.tree_map(lift, module.example_inputs())
        with untouched(inner):
            inner(*lifted[0], **lifted[1])
    except Exception:
        return None

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        args, kwargs = pytree.tree_map(lift, (args, kwargs))
        with untouched(inner):
            return _leaves(inner, args, kwargs)

    return run


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
                other = 3 if leaf.shape[axis] != 3 else 4
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
