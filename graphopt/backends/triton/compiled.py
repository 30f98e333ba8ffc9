"""The lowered module: generated kernels and the framework's, in one FX module per device and dtype."""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from functools import cached_property
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from graphopt.backends.base import BackendError
from graphopt.backends.triton import interpreting, kinds, operators
from graphopt.backends.triton.decompose import decompose, fake_inputs, is_impure
from graphopt.backends.triton.graphs import Graphs, may_capture
from graphopt.backends.triton.partition import partition
from graphopt.backends.triton.region import Region
from graphopt.ir.ops.gradient import TARGET as WITH_GRADIENT

MOST_PROGRAMS = 8
MOST_REASONS = 12  # that a report tells
SHOWN = 3  # modules named for each of them


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What is told about a generated kernel. `bytes` and `flops` are for the example's sizes;
    `nodes` counts the primitive ops that it computes."""

    name: str
    kind: str
    origins: tuple[str, ...]
    nodes: int
    bytes: int
    flops: int
    source: str


_GRADIENTS = {torch.ops.aten.detach.default, WITH_GRADIENT}


class Program:
    """A module compiled for the devices and dtypes of some inputs; for their very sizes if `fixed`.

    Attributes:
        regions: the generated kernels.
        outside: the framework's ops, and for each how many and why; views are not counted.
        coverage: how many pointwise ops and reductions there are, and how many are in kernels.
        notes: what should have become a kernel and failed to.
    """

    def __init__(self, module: fx.GraphModule, leaves: list[Any], fixed: bool = False) -> None:
        if reason := _unsupported(module, leaves):
            raise BackendError(reason)
        environment = ShapeEnv(specialize_zero_one=False, duck_shape=False)
        mode = FakeTensorMode(shape_env=environment)
        inputs = fake_inputs(module, mode, leaves, fixed)
        graph, reasons = decompose(module, inputs, mode)
        self.notes: list[str] = []
        self.regions = partition(graph, reasons, self.notes)
        self.outside, self.coverage = _told(graph, self.regions, reasons)
        self.module = _assembled(module, graph, self.regions, by_operators=False)
        self.graphs = Graphs(self.module)
        self.writes = any(is_impure(n) for n in graph.nodes if n.op == "call_function")
        self._source = module, graph
        self._environment = environment
        self._symbols = _symbols(inputs)
        self._known: dict[tuple[int, ...], bool] = {}

    @cached_property
    def operators(self) -> fx.GraphModule:
        """The module with every kernel as a custom operator, for autograd and tracing."""
        return _assembled(*self._source, self.regions, by_operators=True)

    def told_outside(self) -> list[str]:
        """`outside` by reason, the most frequent ones first, with the modules of some."""
        modules = {node.name: str(node.meta.get("where", "")) for node in self._source[1].nodes}
        places: dict[str, list[str]] = {}
        for name, reason in self.outside.items():
            places.setdefault(reason, []).append(modules.get(name) or name)
        lines = []
        for reason, found in sorted(places.items(), key=lambda one: -len(one[1])):
            some = list(dict.fromkeys(found))
            shown = ", ".join([*some[:SHOWN], *(["..."] if len(some) > SHOWN else [])])
            lines.append(f"the framework's: {len(found)} x {reason} ({shown})")
        if len(lines) > MOST_REASONS:
            lines[MOST_REASONS:] = [f"the framework's: {len(lines) - MOST_REASONS} more reasons"]
        return lines

    def empty(self, leaves: list[Any]) -> bool:
        """Whether a dynamic size is 0."""
        return any(leaves[k].shape[axis] == 0 for k, axis in self._symbols.values())

    def holds(self, leaves: list[Any]) -> bool:
        """Whether what was assumed of the sizes is true of these inputs."""
        sizes = tuple(leaves[k].shape[axis] for k, axis in self._symbols.values())
        if sizes not in self._known:
            self._known[sizes] = self._check(dict(zip(self._symbols, sizes, strict=True)))
        return self._known[sizes]

    def _check(self, sizes: dict[sympy.Symbol, int]) -> bool:
        for symbol, size in sizes.items():
            known = self._environment.replacements.get(symbol, symbol)
            if known != symbol and known.subs(sizes) != size:
                return False
        if min(sizes.values(), default=2) < 2:
            return True  # assumed to be larger only to tell broadcasting, which capture settled
        return all(guard.expr.subs(sizes) != sympy.false for guard in self._environment.guards)


class Compiled:
    """A callable with the module's signature.

    Calls that need gradients go through the kernels' operators (`operators`); where the source cuts or
    replaces a gradient (`detach`, a custom backward), which primitive ops no longer show, through the
    framework's.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.programs: dict[Any, Program] = {}
        self._calls: Counter[str] = Counter()
        self._settled: set[Any] = set()
        self._own_gradients = any(node.target in _GRADIENTS for node in module.graph.nodes)
        in_spec: Any = module._in_spec
        self._out_spec: Any = module._out_spec
        args_spec, kwargs_spec = in_spec.children()
        self._flat = not kwargs_spec.context and all(one.is_leaf() for one in args_spec.children())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = list(args) if self._flat else pytree.tree_leaves((args, kwargs))
        program = self.program(leaves)
        if program is None:  # torch knows what a softmax of nothing is
            return self.module(*args, **kwargs)
        if torch.is_grad_enabled() and self._needs_gradients(leaves):
            if self._own_gradients:
                self._calls["gradients that the source sets itself: the framework's kernels"] += 1
                return self.module(*args, **kwargs)
            found = program.operators(*leaves)
        elif may_capture(leaves, program.writes):
            found = program.graphs(leaves)
        else:
            found = program.module(*leaves)
        return pytree.tree_unflatten(found, self._out_spec)

    def program(self, leaves: list[Any]) -> Program | None:
        """The program for some inputs; None if there is none, and the framework's ops must do.

        An op that needs to know a size makes a program for one size alone, or for some: others
        get programs of their own, up to a number of them.
        """
        key: Any = tuple(
            (one.dtype, one.device) if isinstance(one, torch.Tensor) else one for one in leaves
        )
        if key not in self.programs and key not in self._settled:
            made = Program(self.module, leaves)
            if made.empty(leaves) or made.holds(leaves):
                self.programs[key] = made
            else:
                self._settled.add(
                    key
                )  # for another size than the given one, at which it was traced
        program = self.programs.get(key)
        if program.empty(leaves) if program else any(0 in s for s in _shapes(leaves)):
            return None
        if program is not None and program.holds(leaves):
            return program
        shapes = _shapes(leaves)
        if (key, shapes) not in self.programs:
            if len(self.programs) >= MOST_PROGRAMS:
                self._calls["more sizes than programs for them: the framework's kernels"] += 1
                return None
            self.programs[key, shapes] = Program(self.module, leaves, fixed=True)
        return self.programs[key, shapes]

    def _needs_gradients(self, leaves: list[Any]) -> bool:
        tensors = [one for one in leaves if isinstance(one, torch.Tensor)]
        return any(one.requires_grad for one in (*tensors, *self.module.parameters()))

    @property
    def notes(self) -> Counter[str]:
        """What was not as it should be, and how often: regions that failed to become a kernel, or
        to run, and calls with sizes that were not compiled for."""
        found = self._calls.copy()
        for program in self.programs.values():
            found.update(program.notes)
            for region in program.regions:
                found.update(region.notes)
        return found

    @property
    def remarks(self) -> list[str]:
        """For a report: how much is in kernels, what is not and why, and the notes. Nothing before
        the first call."""
        found = []
        for program in self.programs.values():
            total, inside = program.coverage
            count = len(program.regions)
            found.append(f"{count} kernel{'s' * (count != 1)} with {inside} of {total} pointwise ops "
                         "and reductions")  # fmt: skip
            found += program.told_outside()
            break
        return [*found, *(f"{note} (x{count})" for note, count in self.notes.items())]

    @property
    def outside(self) -> dict[str, str]:
        """The framework's ops of the program that was compiled first, each with the reason."""
        return next((program.outside for program in self.programs.values()), {})

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The kernels of the program that was compiled first; none before the first call."""
        for program in self.programs.values():
            return tuple(
                Kernel(one.name, one.kind, one.origins, len(one.nodes), one.bytes, one.flops, one.source)
                for one in program.regions
            )  # fmt: skip
        return ()


def _shapes(leaves: list[Any]) -> tuple[torch.Size, ...]:
    return tuple(one.shape for one in leaves if isinstance(one, torch.Tensor))


def _unsupported(module: fx.GraphModule, leaves: list[Any]) -> str:
    """Why kernels cannot run where these tensors are."""
    tensors = [one for one in leaves if isinstance(one, torch.Tensor) and one.ndim]
    places = {
        one.device.type for one in (*tensors, *module.parameters(), *module.buffers()) if one.ndim
    }
    if not interpreting() and places - {"cuda"}:
        where = ", ".join(sorted(places))
        return f"the tensors are on {where}; Triton's kernels need them on a GPU"
    return ""


def _symbols(inputs: list[Any]) -> dict[sympy.Symbol, tuple[int, int]]:
    """Which input's which axis each symbol is the size of."""
    found: dict[sympy.Symbol, tuple[int, int]] = {}
    for number, one in enumerate(inputs):
        if isinstance(one, torch.Tensor):
            for axis, size in enumerate(one.shape):
                if isinstance(size, torch.SymInt):
                    found.setdefault(size.node._expr, (number, axis))
    return found


def _told(
    graph: fx.Graph, regions: list[Region], reasons: dict[fx.Node, str]
) -> tuple[dict[str, str], tuple[int, int]]:
    inside = {node for region in regions for node in region.nodes}
    outside: dict[str, str] = {}
    total = covered = 0
    for node in graph.nodes:
        fusible = kinds.fusible(node)
        total += fusible
        covered += fusible and node in inside
        if node not in inside and node.meta.get("kind") in ("external", "product"):
            if node in reasons:
                outside[node.name] = reasons[node]
    return outside, (total, covered)


def _assembled(
    module: fx.GraphModule, graph: fx.Graph, regions: list[Region], by_operators: bool = False
) -> fx.GraphModule:
    """The graph with every region as one call, of which `meta["region"]` tells; writes to states and
    inputs come last."""
    owner = {node: region for region in regions for node in region.nodes}
    twin = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}

    def ensure(node: fx.Node) -> fx.Node:
        if node not in made:
            region = owner.get(node)
            if region is None:
                for one in node.all_input_nodes:
                    ensure(one)
                made[node] = twin.node_copy(node, made.__getitem__)
            else:
                target = operators.operator(region) if by_operators else region.launcher()
                call = twin.call_function(
                    target, tuple(map(ensure, (*region.inputs, *region.sizes)))
                )
                call.meta["region"] = region
                single = by_operators and len(region.outputs) == 1  # as an operator has it
                for position, one in enumerate(region.outputs):
                    made[one] = call if single else twin.call_function(
                        operator.getitem, (call, position)
                    )  # fmt: skip
        return made[node]

    late = []
    for node in graph.nodes:
        if node.op == "placeholder":
            ensure(node)
        elif node.op == "call_function" and is_impure(node):
            late.append(node)
    results = graph.output_node()
    for node in results.all_input_nodes:
        ensure(node)
    for node in late:
        ensure(node)
    twin.output(fx.map_arg(results.args[0], made.__getitem__))
    result = fx.GraphModule(module, twin, "TritonGraph")
    for registry in ("_parameters", "_buffers", "_modules"):  # also what is replaced later
        result.__dict__[registry] = module.__dict__[registry]
    return result
