"""Running a graph node by node, in its own dtypes or lifted to float64."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.ir import process
from graphopt.ir.graph import Graph, is_overload, is_random, written

_LIFTED = {torch.complex64: torch.complex128, torch.complex32: torch.complex128}


def lift_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for any real floating dtype, complex128 for complex ones, others as they are."""
    return torch.float64 if dtype.is_floating_point else _LIFTED.get(dtype, dtype)


def lift(value: Any) -> Any:
    """A tensor (or a list of tensors) in its lifted dtype."""
    if isinstance(value, torch.Tensor):
        return value.to(lift_dtype(value.dtype))
    if isinstance(value, (tuple, list)):
        return type(value)(map(lift, value))
    return value


def like(value: Any, node: fx.Node) -> Any:
    """A value in the dtype that `node` has in the graph."""

    def cast(found: Any, fake: Any) -> Any:
        if isinstance(found, torch.Tensor) and isinstance(fake, torch.Tensor):
            return found.to(fake.dtype)
        if isinstance(found, (tuple, list)) and isinstance(fake, (tuple, list)):
            return type(found)(map(cast, found, fake))
        return found

    return cast(value, node.meta.get("val"))


class Interpreter:
    """Evaluates a graph on real inputs.

    With `lifted`, every floating value is float64: states enter as their exact values, casts
    between floating dtypes do nothing. With `writes=False`, writes to states and inputs are left
    out (a training batch norm then works on copies of its statistics).
    """

    def __init__(self, graph: Graph, lifted: bool = False, writes: bool = True) -> None:
        self.graph = graph
        self.lifted = lifted
        self.writes = writes

    def run(self, inputs: Sequence[Any], seed: int | None = 0) -> tuple[Any, ...]:
        """The flat outputs for flat inputs. Values are freed after their last use."""
        if seed is not None:
            with process.seeded(seed):
                return self.run(inputs, None)
        env: dict[fx.Node, Any] = {}
        last: dict[fx.Node, fx.Node] = {}
        for node in self.graph.fx.nodes:
            for used in node.all_input_nodes:
                last[used] = node
        feed = iter(inputs)
        for node in self.graph.fx.nodes:
            if node.op == "placeholder":
                value = next(feed)
                env[node] = lift(value) if self.lifted else value
            for used in node.all_input_nodes:
                if used not in env:  # a state: lifted when it is read first, and not earlier
                    env[used] = self.state(str(used.target))
            if node.op == "output":
                return tuple(fx.map_arg(node.args[0], lambda one: env[one]))
            if node.op == "call_function":
                env[node] = self.call(node, env)
            for used in node.all_input_nodes:
                if last[used] is node:
                    del env[used]
        raise AssertionError("a graph without an output")

    def state(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """The value of a state, or some of its rows."""
        state = self.graph.states[name]
        value = state.tensor
        if self.lifted:
            value = value.detach() if state.exact is None else state.exact()
        value = value if rows is None else value[rows]
        return lift(value) if self.lifted else value  # type: ignore[no-any-return]

    def call(self, node: fx.Node, env: Any) -> Any:
        """The value of one call, its inputs looked up in `env`."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda one: env[one])
        if not self.writes and (targets := written(node)):
            if node.target is torch.ops.aten.copy_.default:
                return args[0]
            copies = {one: env[one].clone() for one in targets}
            args, kwargs = fx.map_arg(
                (node.args, node.kwargs), lambda one: copies[one] if one in copies else env[one]
            )
        if not self.lifted or not is_overload(node.target):
            return node.target(*args, **kwargs)  # type: ignore[operator]
        try:
            return lift(node.target(*lift_dtypes(args), **lift_dtypes(kwargs)))  # type: ignore[operator]
        except (RuntimeError, AssertionError):
            # No float64 kernel (quantization, for one): the op runs in its own dtypes.
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda one: like(env[one], one))
            return lift(node.target(*args, **kwargs))  # type: ignore[operator]


def lift_dtypes(argument: Any) -> Any:
    """An argument with every floating dtype in it lifted."""
    if isinstance(argument, torch.dtype):
        return lift_dtype(argument)
    if isinstance(argument, (tuple, list)):
        return type(argument)(map(lift_dtypes, argument))
    if isinstance(argument, dict):
        return {key: lift_dtypes(value) for key, value in argument.items()}
    return argument


MEMORY_LIMIT = 1 << 26  # bytes of values kept; older ones are computed again when needed


class Kept:
    """Values of nodes, up to `limit` bytes: those that are `dear` longest, and those read last."""

    def __init__(self, limit: int, dear: Callable[[fx.Node], bool] = lambda node: True) -> None:
        self.limit = limit
        self._dear = dear
        self._stores: tuple[OrderedDict[fx.Node, Any], ...] = OrderedDict(), OrderedDict()
        self._bytes = 0

    def __contains__(self, node: fx.Node) -> bool:
        return any(node in store for store in self._stores)

    def get(self, node: fx.Node) -> Any:
        """The value of a node, or None."""
        for store in self._stores:
            if node in store:
                store.move_to_end(node)
                return store[node]
        return None

    def put(self, node: fx.Node, value: Any) -> None:
        """Keep a value; it stays at least until the next one."""
        self.forget([node])
        self._stores[self._dear(node)][node] = value
        self._bytes += nbytes(value)
        while self._bytes > self.limit and sum(map(len, self._stores)) > 1:
            store = next(one for one in self._stores if one)
            oldest = next(iter(store))
            if oldest is node:  # the only cheap one, among dear ones
                oldest = next(iter(self._stores[1]))
            self.forget([oldest])

    def forget(self, nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            for store in self._stores:
                if node in store:
                    self._bytes -= nbytes(store.pop(node))


class Evaluator:
    """Values of single nodes, computed on demand on given inputs and kept while memory lasts."""

    def __init__(
        self, graph: Graph, inputs: Sequence[Any] = (), lifted: bool = True,
        limit: int = MEMORY_LIMIT, dear: Callable[[fx.Node], bool] = lambda node: True,
    ) -> None:  # fmt: skip
        self.inputs = {
            node: lift(value) if lifted else value
            for node, value in zip(graph.inputs, inputs, strict=False)
        }
        self._interpreter = Interpreter(graph, lifted, writes=False)
        self._kept = Kept(limit, dear)
        self.keep, self.forget = self._kept.put, self._kept.forget

    @torch.no_grad()
    def evaluate(self, node: fx.Node) -> Any:
        """The value of a node. Random ops draw from one fixed seed each."""
        found = self.known(node)
        if found is not None:
            return found
        order, env = self._needed(node)
        last = {used: one for one in order for used in one.all_input_nodes}
        for one in order:
            for used in one.all_input_nodes:
                if used not in env:  # lifted when it is read, and not longer
                    env[used] = self.known(used)
            env[one] = seeded(self._interpreter, one, env)
            self.keep(one, env[one])
            for used in dict.fromkeys(one.all_input_nodes):
                if last[used] is one:
                    del env[used]
        return env[node]

    def _needed(self, node: fx.Node) -> tuple[list[fx.Node], dict[fx.Node, Any]]:
        """What has to be computed for a node, in the order of the graph, and the kept values for it."""
        needed, kept, stack = {node}, {}, [node]
        while stack:
            for one in stack.pop().all_input_nodes:
                if one in self._kept:
                    kept[one] = self._kept.get(one)
                elif one.op == "call_function" and one not in needed:
                    needed.add(one)
                    stack.append(one)
        return sorted(needed), kept

    def known(self, node: fx.Node) -> Any:
        """The value of a node that needs no computing, or None."""
        if node.op == "placeholder":
            return self.inputs[node]
        if node.op == "get_attr":
            return self._interpreter.state(str(node.target))
        return self._kept.get(node)


def seeded(interpreter: Interpreter, node: fx.Node, env: Any) -> Any:
    """One call, with a fixed seed if it is random."""
    if not is_random(node):
        return interpreter.call(node, env)
    with process.seeded(0):
        return interpreter.call(node, env)


def nbytes(value: Any) -> int:
    """The bytes of a tensor, or of those in a list; what is no tensor has none."""
    leaves = value if isinstance(value, (tuple, list)) else [value]
    return sum(one.numel() * one.element_size() for one in leaves if isinstance(one, torch.Tensor))


def is_getitem(node: fx.Node) -> bool:
    return node.target is operator.getitem
