"""From the lowered module to a graph of primitive ops, in which every node has a `kind`.

The ops of the module run on fake tensors, batch and other dynamic sizes as symbols; what they
consist of is recorded. Ops of the tables (views, pointwise, reductions, products) are recorded as
they are; others by the formulas of `rules`, else by torch's own decompositions, until only
primitives are left or nothing says how, which makes an external node: the framework's kernel.

Copies and changes of memory format vanish, for the graph is about values. `region` tells what a
node's `meta` holds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, reduce
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt.backends.triton import kinds, rules, splits

aten = torch.ops.aten


def decompose(
    module: fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode
) -> tuple[fx.Graph, dict[fx.Node, str]]:
    """The primitive graph, and why nodes of it are external.

    Args:
        module: functional, over ATen ops; may copy into states and inputs at its end.
        inputs: what its placeholders get: fake tensors of `mode`, or constants.
    """
    recorder = _Recorder(module, mode)
    with torch.no_grad():
        return recorder.record(inputs), recorder.reasons


class _Recorder:
    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode) -> None:
        self.module = module
        self.mode = mode
        self.graph = fx.Graph()
        self.reasons: dict[fx.Node, str] = {}
        self._node: dict[int, fx.Node] = {}  # of a tensor, by identity
        self._alive: list[Any] = []  # so that no identity is used twice
        self._sizes: dict[Any, fx.Node] = {}
        self._where: dict[str, Any] = {}

    def record(self, inputs: Sequence[Any]) -> fx.Graph:
        values: dict[fx.Node, Any] = {}
        feed = iter(inputs)
        reads = [node for node in self.module.graph.nodes if node.op == "placeholder"]
        for node in reads:  # first, so that sizes can be read right after them
            values[node] = self._input(self.graph.placeholder(node.name), next(feed), "input")
        for node in reads:
            if isinstance(values[node], torch.Tensor):
                self._name_sizes(self._node[id(values[node])], values[node])
        for node in self.module.graph.nodes:
            if node.op == "get_attr":
                state = operator.attrgetter(str(node.target))(self.module)
                fake = self.mode.from_tensor(state.detach(), static_shapes=True)
                values[node] = self._input(self.graph.get_attr(str(node.target)), fake, "state")
            elif node.op == "call_function":
                self._where = {"where": str(node.meta.get("where", "")), "source": node.name}
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = self.run(node.target, args, kwargs)
            elif node.op == "output":
                results = fx.map_arg(node.args[0], values.__getitem__)
                self.graph.output(pytree.tree_map(self.argument, results))
        self.graph.eliminate_dead_code(
            lambda node: node.meta.get("kind") == "size" or is_impure(node)
        )
        return self.graph

    def _input(self, node: fx.Node, value: Any, kind: str) -> Any:
        node.meta.update(val=value, kind=kind, where=str(node.target).rpartition(".")[0])
        if kind == "input":
            node.meta["where"] = ""
        if isinstance(value, torch.Tensor):
            self._keep(value, node)
        return value

    def _keep(self, value: Any, node: fx.Node) -> None:
        self._alive.append(value)
        self._node[id(value)] = node

    # -- sizes --------------------------------------------------------------------------------

    def _name_sizes(self, node: fx.Node, value: torch.Tensor) -> None:
        """A node for every symbol that is a size of this tensor."""
        for axis, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt):
                symbol = size.node.expr
                if symbol.is_Symbol and symbol not in self._sizes:
                    self._sizes[symbol] = self._size(aten.sym_size.int, (node, axis), size)

    def _size(self, target: Any, args: tuple[Any, ...], value: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta.update(val=value, kind="size", where="", source="")
        return node

    def size(self, value: torch.SymInt) -> Any:
        """The node, or the number, of a symbolic size."""
        expression = value.node.expr
        if expression.is_Integer:
            return int(expression)
        if expression not in self._sizes:
            self._sizes[expression] = self._expression(expression, value)
        return self._sizes[expression]

    def _expression(self, expression: Any, like: torch.SymInt) -> fx.Node:
        environment = like.node.shape_env
        example = getattr(environment, "guarding_hint_or_throw", environment.size_hint)

        def value(one: Any) -> Any:
            return environment.create_symintnode(one, hint=int(example(one)))

        def part(one: Any) -> Any:
            return int(one) if one.is_Integer else self.size(value(one))

        functions = {"FloorDiv": operator.floordiv, "Mod": operator.mod,
                     "PythonMod": operator.mod, "CleanDiv": operator.floordiv}  # fmt: skip
        kind = type(expression).__name__
        if kind in ("Add", "Mul"):
            function: Any = operator.add if kind == "Add" else operator.mul
        elif kind == "Pow" and expression.args[1].is_Integer and expression.args[1] > 0:
            function = operator.pow
        elif kind in functions:
            function = functions[kind]
        else:
            raise NotImplementedError(f"the size {expression}")

        def step(a: Any, b: Any) -> Any:
            made = function(a[0], b[0])
            return made, self._size(function, (a[1], b[1]), made)

        pairs = [(int(one) if one.is_Integer else value(one), part(one)) for one in expression.args]
        node: fx.Node = reduce(step, pairs)[1]
        return node

    # -- calls --------------------------------------------------------------------------------

    def argument(self, value: Any) -> Any:
        """What stands for a value in the graph."""
        if isinstance(value, torch.Tensor):
            if id(value) not in self._node:  # a literal that torch's own code made
                self._constant(value)
            return self._node[id(value)]
        if isinstance(value, torch.SymInt):
            return self.size(value)
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            raise NotImplementedError(f"a symbolic {type(value).__name__}")
        return value

    def _constant(self, value: torch.Tensor) -> None:
        if value.numel() != 1 or isinstance(value, torch._subclasses.FakeTensor):
            raise NotImplementedError("a tensor from nowhere")
        self._emit(aten.full.default, ([*value.shape], value.item()), {"dtype": value.dtype},
                   self.mode.from_tensor(value))  # fmt: skip

    def run(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The value of a call on values, recorded."""
        if not isinstance(target, torch._ops.OpOverload):
            return self._python(target, args, kwargs)
        if target in kinds.SAME and kinds.SAME[target](*args, **kwargs):
            return args[0]
        failed = ""
        for formula in _formulas(target):
            found, failed = self._tried(formula, args, kwargs)
            if found is not NotImplemented:
                return found
        with self.mode:
            value = target(*args, **kwargs)
        return self._emit(target, args, kwargs, value, failed)

    def _tried(self, formula: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, str]:
        """What a formula gives: NotImplemented if it does not apply, with what went wrong if it
        failed. What it recorded until then is dead."""
        try:
            with _Recording(self):
                return formula(*args, **kwargs), ""
        except Exception as error:  # torch's own formulas are not for all arguments
            said = (str(error).strip().splitlines() or [""])[0]
            return NotImplemented, f"its formula fails: {type(error).__name__}: {said}"

    def _python(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = target(*args, **kwargs)
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            raise NotImplementedError(f"a symbolic {type(value).__name__}")
        return value

    def _emit(self, target: Any, args: Any, kwargs: Any, value: Any, failed: str = "") -> Any:
        """Record a call; `failed` says why it is not taken apart, if that was tried."""
        if isinstance(value, torch.SymInt):
            return value
        args, kwargs = pytree.tree_map(self.argument, (args, kwargs))
        name = target._schema.name.partition("::")[2].strip("_")
        spelled = kinds.SPELLED.get(target, target)
        node = self.graph.create_node("call_function", spelled, args, kwargs, name)
        kind, reason = kinds.classify(node, value)
        node.meta.update(val=value, kind=kind, **self._where)
        if reason:
            self.reasons[node] = failed or reason
        self._give(node, value)
        return value

    def _give(self, node: fx.Node, value: Any) -> None:
        """Let values of a call stand for it, or for its parts."""
        if isinstance(value, torch.Tensor):
            self._keep(value, node)
        elif isinstance(value, (tuple, list)):
            for index, one in enumerate(value):
                if isinstance(one, torch.Tensor):
                    part = self.graph.call_function(operator.getitem, (node, index))
                    part.meta.update(val=one, kind="external", **self._where)
                    self.reasons[part] = "one of several results"
                    self._keep(one, part)


class _Recording(TorchDispatchMode):
    """Records what torch's own code calls."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace != "aten":  # a question about the tensor: its device
            return func(*args, **(kwargs or {}))
        return self.recorder.run(func, args, dict(kwargs or {}))


def _formulas(target: Any) -> Iterator[Callable[..., Any]]:
    """Ours, then torch's own where the op is not kept whole."""
    if target in rules.RULES:
        yield rules.RULES[target]
    if target in splits.SPLITS:
        yield splits.SPLITS[target]
    if target not in kinds.KEPT:
        if target in _table():
            yield _table()[target]
        elif target._can_decompose():
            yield target.decompose


@cache
def _table() -> Mapping[Any, Callable[..., Any]]:
    found: Mapping[Any, Callable[..., Any]] = torch._decomp.core_aten_decompositions()
    return {op: rule for op, rule in found.items() if op not in kinds.WHOLE}


def is_impure(node: fx.Node) -> bool:
    """Whether a node stays though nobody reads it."""
    if node.op in ("placeholder", "output"):
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


# -- the inputs to decompose for ----------------------------------------------------------------


def fake_inputs(
    module: fx.GraphModule, mode: FakeTensorMode, given: Sequence[Any], fixed: bool = False
) -> list[Any]:
    """Fake tensors like `given`, the sizes that the module leaves open as symbols of `mode`, unless
    they are `fixed`.

    A symbol's example is the size given, or the next prime above it where a size of the module (or 0
    or 1) is the same by accident: above, since the module may index up to the size given.
    """
    nodes = [node for node in module.graph.nodes if node.op == "placeholder"]
    taken = {0, 1}
    for node in nodes:
        taken |= {
            size for size in node.meta.get("type", {}).get("shape", ()) if isinstance(size, int)
        }
    for one in (*module.parameters(), *module.buffers()):
        taken |= set(one.shape)
    symbols: dict[str, Any] = {}
    return [
        _fake(node, leaf, mode, symbols, taken, fixed)
        for node, leaf in zip(nodes, given, strict=True)
    ]


def _fake(
    node: fx.Node, leaf: Any, mode: FakeTensorMode, symbols: Any, taken: set[int], fixed: bool
) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    shape = []
    for name, size in zip(node.meta["type"]["shape"], leaf.shape, strict=True):
        if isinstance(name, int) or fixed:
            shape.append(size)
            continue
        if name not in symbols:
            example = size if size not in taken else _free(taken, max(size, 2))
            symbols[name] = _symbol(mode, len(symbols), example)
        shape.append(symbols[name])
    with mode:
        return torch.empty(shape, dtype=leaf.dtype, device=leaf.device)


def _symbol(mode: FakeTensorMode, index: int, example: int) -> Any:
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    source = ConstantSource(f"size{index}")
    environment = mode.shape_env
    assert environment is not None
    symbol = environment.create_symbol(
        example, source, DimDynamic.DYNAMIC, None, positive=None, do_not_specialize_zero_one=True
    )
    return environment.create_symintnode(symbol, hint=example, source=source)


def _free(taken: set[int], above: int) -> int:
    found = int(sympy.nextprime(above))
    while found in taken:
        found = int(sympy.nextprime(found))
    return found
