"""What converters of other libraries are given: a module's computation as a program of `torch.export`.

The program takes the tensors that the graph reads and gives the tensors that it computes, each once, no
structure around them. Sizes that are dynamic in the graph stay dynamic.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.backends.base import BackendError
from graphopt.backends.frozen import state
from graphopt.ir.graph import is_random, written
from graphopt.ir.source import first_line


@dataclasses.dataclass(frozen=True)
class Exported:
    """A program, and how its tensors belong to the leaves of a call of the module.

    `reads` are the positions of the leaves that it takes. `results` says for every leaf of the module's
    result what it is: ("computed", index), ("input", position), ("state", name), ("constant", value).
    """

    program: Any
    reads: tuple[int, ...]
    results: tuple[tuple[str, Any], ...]
    states: tuple[str, ...]

    def given(self, leaves: list[Any]) -> list[Tensor]:
        """What the program takes, of the leaves of a call."""
        return [leaves[position] for position in self.reads]

    def assembled(
        self, module: fx.GraphModule, leaves: list[Any], computed: list[Tensor]
    ) -> list[Any]:
        """The leaves of the module's result."""
        if self._all_computed:
            return computed
        known: dict[str, Callable[[Any], Any]] = {
            "computed": computed.__getitem__,
            "input": leaves.__getitem__,
            "state": lambda name: state(module, name),
            "constant": lambda value: value,
        }
        return [known[kind](key) for kind, key in self.results]

    @cached_property
    def _all_computed(self) -> bool:
        return self.results == tuple(("computed", at) for at in range(len(self.results)))

    def fits(self, leaves: list[Any]) -> bool:
        """Whether the program takes tensors of these sizes and dtypes."""
        for (dtype, sizes), leaf in zip(self._accepted, self.given(leaves), strict=True):
            if leaf.dtype != dtype or not all(
                low <= size <= high for (low, high), size in zip(sizes, leaf.shape, strict=True)
            ):
                return False
        return True

    @cached_property
    def _accepted(self) -> list[tuple[torch.dtype, list[tuple[Any, Any]]]]:
        """Of every input: its dtype, and the least and the largest size of every axis."""
        return [
            (node.meta["val"].dtype, [self._range(size) for size in node.meta["val"].shape])
            for node in self.inputs
        ]

    def _range(self, size: Any) -> tuple[Any, Any]:
        if isinstance(size, int):
            return size, size
        limit = self.program.range_constraints.get(size.node.expr)
        if limit is None:
            return 1, math.inf
        low = int(limit.lower)
        # A trace takes every size for two at least, that of the graph did too.
        return (1 if low == 2 else low), (int(limit.upper) if limit.upper.is_Integer else math.inf)

    @cached_property
    def inputs(self) -> list[fx.Node]:
        """The inputs of the program that are tensors of a call."""
        names = set(self.program.graph_signature.user_inputs)
        return [node for node in self.program.graph.nodes if node.name in names]

    @property
    def outputs(self) -> list[Any]:
        """Fake tensors of what it computes."""
        (found,) = self.program.graph.output_node().args
        return [one.meta["val"] for one in found]

    @cached_property
    def names(self) -> list[str]:
        return [node.name for node in self.inputs]

    @property
    def shapes(self) -> dict[str, list[int | None]]:
        """Of every input by name; None for a size that may be any."""
        return {
            node.name: [size if isinstance(size, int) else None for size in node.meta["val"].shape]
            for node in self.inputs
        }


def exported(module: fx.GraphModule, leaves: list[Any]) -> Exported:
    """The program of `module` for inputs like `leaves`.

    Raises:
        BackendError: if the module writes to states or inputs, draws random numbers, has states on another
            device, or is not exported.
    """
    part, reads, results = computation(module)
    states = tuple(str(node.target) for node in part.graph.nodes if node.op == "get_attr")
    for name in states:
        if state(module, name).device.type != "cpu":
            raise BackendError(
                f"expected states on the CPU, {name} is on {state(module, name).device}"
            )
    tensors = [leaves[position] for position in reads]
    reason = ""
    for dynamic in (True, False):
        try:
            program = _export(part, tensors, dynamic)
        except Exception as error:
            reason = first_line(error)
            continue
        found = Exported(program, reads, results, states)
        if found.fits(leaves):
            return found
        reason = "it does not take the inputs it was made for"
    raise BackendError(f"torch.export: {reason}")


def computation(
    module: fx.GraphModule,
) -> tuple[fx.GraphModule, tuple[int, ...], tuple[tuple[str, Any], ...]]:
    """The module from the tensors it reads to a tuple of those it computes; see `Exported`."""
    refuse_effects(module.graph)
    graph = fx.Graph()
    found = graph.graph_copy(module.graph, {})
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    leaves = list(found) if isinstance(found, (list, tuple)) else [found]
    computed: list[fx.Node] = []
    results: list[tuple[str, Any]] = []
    for leaf in leaves:
        if not isinstance(leaf, fx.Node):
            results.append(("constant", leaf))
        elif leaf.op == "placeholder":
            results.append(("input", placeholders.index(leaf)))
        elif leaf.op == "get_attr":
            results.append(("state", str(leaf.target)))
        else:
            if leaf not in computed:
                computed.append(leaf)
            results.append(("computed", computed.index(leaf)))
    if not computed:
        raise BackendError("the model computes nothing: its results are its inputs and states")
    graph.output(tuple(computed))
    graph.eliminate_dead_code()
    reads = tuple(i for i, node in enumerate(placeholders) if node.users)
    for node in placeholders:
        if not node.users:
            graph.erase_node(node)
    part = fx.GraphModule(module, graph)
    for registry in ("_parameters", "_buffers", "_modules"):
        part.__dict__[registry] = module.__dict__[registry]
    return part, reads, tuple(results)


def refuse_effects(graph: fx.Graph) -> None:
    """
    Raises:
        BackendError: if a run of the graph changes anything but its outputs, or is not the same twice.
    """
    for node in graph.nodes:
        if node.op == "call_function" and is_random(node):
            raise BackendError(f"{label(node)} draws random numbers: no converter keeps the stream")
        for one in written(node):
            raise BackendError(
                f"{label(node)} writes to {one.target}: only pure models are converted"
            )


def _export(part: fx.GraphModule, tensors: list[Tensor], dynamic: bool) -> Any:
    values, dims = traced_inputs(part, tensors, dynamic)
    with quiet(), torch.inference_mode(False), torch.no_grad():
        return in_aten(torch.export.export(part, tuple(values), dynamic_shapes=tuple(dims)))


def traced_inputs(
    module: fx.GraphModule, leaves: list[Any], dynamic: bool
) -> tuple[list[Any], list[dict[int, Any]]]:
    """What to trace a module with for inputs like `leaves`, and their dynamic axes. Sizes of one are taken
    as two where they may be any, for export makes a constant of a one."""
    kinds = [node.meta.get("type") for node in module.graph.nodes if node.op == "placeholder"]
    values, dims = [], []
    for kind, leaf in zip(kinds, leaves, strict=True):
        dim: dict[int, Any] = {}
        if isinstance(leaf, Tensor):
            sizes = list(leaf.shape)
            for axis, size in enumerate(kind["shape"] if kind and dynamic else ()):
                if isinstance(size, str):
                    dim[axis] = torch.export.Dim.AUTO
                    if size.isidentifier():
                        sizes[axis] = max(2, sizes[axis])
            with torch.inference_mode(False):
                leaf = torch.zeros(sizes, dtype=leaf.dtype, device=leaf.device)
        values.append(leaf)
        dims.append(dim)
    return values, dims


def in_aten(program: Any) -> Any:
    """The program with operators of this package decomposed, so that nobody else needs to know them."""
    own = {
        node.target for node in program.graph.nodes
        if getattr(node.target, "namespace", None) == "graphopt"
    }  # fmt: skip
    if not own:
        return program
    known = torch.export.default_decompositions()
    return program.run_decompositions({operator: known[operator] for operator in own})


def label(node: fx.Node) -> str:
    """A call by the name of its operator and where the source model makes it."""
    schema = getattr(node.target, "_schema", None)
    name = schema.name.replace("::", ".") if schema is not None else str(node.target)
    where = node.meta.get("where")
    return f"{name} at {where}" if where else name


def culprits(module: fx.GraphModule, message: str) -> str:
    """The operators that a converter's message names, with the modules of the source that call them."""
    names = dict.fromkeys(re.findall(r"\b(?:aten|prims|graphopt|torchvision)(?:\.|::)\w+", message))
    found = []
    for name in names:
        bare = re.split(r"\.|::", name)[-1]
        calls = [
            label(node) for node in module.graph.nodes
            if node.op == "call_function" and bare.strip("_") in label(node).partition(" at ")[0]
        ]  # fmt: skip
        found += list(dict.fromkeys(calls)) or [name.replace("::", ".")]
    return ", ".join(dict.fromkeys(found))


def dtypes_of(module: fx.GraphModule, leaves: list[Any]) -> Mapping[torch.dtype, str]:
    """Every dtype of inputs, states and results of calls, and one place that has it."""
    found: dict[torch.dtype, str] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            found.setdefault(state(module, str(node.target)).dtype, str(node.target))
        elif (kind := node.meta.get("type")) is not None:
            found.setdefault(getattr(torch, kind["dtype"]), label(node))
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            found.setdefault(leaf.dtype, "an input")
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Converters print, warn and log about their own internals; their errors become reasons."""
    level = logging.root.manager.disable
    sink = io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(sink), redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
