"""The graph: an fx.Graph in normal form, its states, and the signature of the source model.

Normal form:
- every node is an input, a state (`get_attr`), or a call of an ATen overload (or of a Python
  function on symbolic sizes), and computes a new value: activations are never written in place;
- a write to a buffer or an input that the source model makes is a `copy_` at the end;
- a node's `meta` holds `val` (fake tensor), `where` (module path in the source model), `absorbed`
  (paths of other modules that it stands for) and, once a pass has made it, `made_by` (pass and
  match index).
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from functools import cache, cached_property
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node


class GraphError(RuntimeError):
    """The graph is not in normal form, or cannot do what was asked of it."""


@dataclasses.dataclass
class State:
    """A parameter, a buffer or a literal tensor of the model.

    `exact` gives the float64 value that `tensor` is the rounding of, where a pass computed one.
    """

    tensor: torch.Tensor
    kind: str  # "parameter", "buffer" or "constant"
    persistent: bool = True
    exact: Callable[[], torch.Tensor] | None = None

    @property
    def saved(self) -> bool:
        """Whether it belongs to the model's state_dict."""
        return self.kind == "parameter" or (self.kind == "buffer" and self.persistent)


@dataclasses.dataclass(frozen=True)
class Signature:
    """How the source model is called.

    `parameters` are forward's parameters as (name, kind, default), `inputs` the leaf values the model
    was captured with (None stands for a tensor), `in_spec` and `out_spec` the pytrees of
    (args, kwargs) and of the result.
    """

    in_spec: Any
    out_spec: Any
    inputs: tuple[Any, ...]
    parameters: tuple[tuple[str, int, Any], ...]
    names: tuple[str, ...]

    @cached_property
    def arity(self) -> tuple[int, list[str]]:
        """How many inputs are given by position, and the names of the others."""
        args, kwargs = self.in_spec.children()
        return args.num_children, list(kwargs.context)

    @cached_property
    def flat(self) -> bool:
        """Whether every input is a leaf given by position."""
        args, kwargs = self.in_spec.children()
        return not kwargs.context and all(one.is_leaf() for one in args.children())

    def __deepcopy__(self, memo: Any) -> Signature:
        return self  # immutable


REQUIRED = "<required>"


def parameters_of(forward: Callable[..., Any]) -> tuple[tuple[str, int, Any], ...]:
    """(name, kind, default) of a function's parameters; defaults that are not plain count as
    required."""
    found = []
    for one in inspect.signature(forward).parameters.values():
        plain = one.default is None or isinstance(one.default, (bool, int, float, str))
        found.append((one.name, int(one.kind), one.default if plain else REQUIRED))
    return tuple(found)


@dataclasses.dataclass
class Graph:
    """See the module docstring. `fx` may be read freely; edits go through a `Rewriter`."""

    fx: torch.fx.Graph
    states: dict[str, State]
    signature: Signature
    fake_mode: FakeTensorMode
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)  # tied name -> its twin

    def __post_init__(self) -> None:
        self._reads: dict[str, Node] = {
            str(node.target): node for node in self.fx.nodes if node.op == "get_attr"
        }
        self._source_order = {name: index for index, name in enumerate(self.states)}
        self._modules = {one for name in self.states for one in _prefixes(name)}
        self._first: Node | None = None
        self.mutated = frozenset(
            str(argument.target)
            for node in self.fx.nodes
            for argument in written(node)
            if argument.op == "get_attr"
        )
        self.held: frozenset[str] = frozenset()

    # -- reading ------------------------------------------------------------------------------

    @property
    def nodes(self) -> Iterator[Node]:
        return iter(self.fx.nodes)

    @property
    def output(self) -> Node:
        last: Node = next(iter(reversed(self.fx.nodes)))
        return last

    @property
    def inputs(self) -> list[Node]:
        return [node for node in self.fx.nodes if node.op == "placeholder"]

    @property
    def calls(self) -> list[Node]:
        return [node for node in self.fx.nodes if node.op == "call_function"]

    @property
    def device(self) -> str:
        """The kind of device that the graph runs on: that of its first tensor."""
        values = (node.meta.get("val") for node in self.fx.nodes)
        return next((one.device.type for one in values if isinstance(one, torch.Tensor)), "cpu")

    def where(self, node: Node) -> str:
        if node.op == "get_attr":
            return str(node.target)
        return str(node.meta.get("where", ""))

    def is_constant(self, node: Node) -> bool:
        """Whether a value depends on unwritten states and literals alone, without randomness."""
        known = node.meta.get("constant")
        if known is None:
            if node.op == "get_attr":
                name = str(node.target)
                known = name in self.states and name not in self.mutated | self.held
            elif node.op == "call_function":
                known = is_pure(node) and all(map(self.is_constant, node.all_input_nodes))
            else:
                known = False
            node.meta["constant"] = known
        return bool(known)

    def hold(self, names: Iterable[str]) -> None:
        """Keep states out of what depends on parameters alone, as if the model wrote to them."""
        self.held |= frozenset(names)
        for node in self.nodes:
            node.meta.pop("constant", None)

    # -- states -------------------------------------------------------------------------------

    def read(self, name: str, like: Node | None = None) -> Node:
        """The one node that reads state `name`, made on first use at the head of the graph. `like`
        has the same type, if that is known."""
        node = self._reads.get(name)
        if node is None or node._erased:
            state = self.states[name]
            with self.fx.inserting_before(self._head()):
                node = self.fx.get_attr(name)
            node.meta["val"] = (
                self.fake_mode.from_tensor(state.tensor, static_shapes=True)
                if like is None else like.meta["val"]
            )  # fmt: skip
            node.meta["where"] = name.rpartition(".")[0]
            self._reads[name] = node
        return node

    def add_input(self, name: str, dtype: torch.dtype, *shape: Any) -> Node:
        """Take another tensor, as the keyword input `name`; sizes may be those of other inputs."""
        args, kwargs = pytree.tree_unflatten(list(self.signature.inputs), self.signature.in_spec)
        known = [one for one, _, _ in self.signature.parameters]
        if name in known or name in kwargs:
            raise GraphError(f"there is an input {name} already")
        spec = pytree.tree_flatten((args, {**kwargs, name: None}))[1]
        self.signature = Signature(
            spec, self.signature.out_spec, (*self.signature.inputs, None),
            (*self.signature.parameters, (name, int(inspect.Parameter.KEYWORD_ONLY), REQUIRED)),
            (*self.signature.names, name),
        )  # fmt: skip
        with self.fx.inserting_after(self.inputs[-1]):
            node = self.fx.placeholder(name)
        with self.fake_mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype, device=self.device)
        return node

    def _head(self) -> Node:
        """The first node that is neither an input nor a state; states are read before it."""
        if self._first is None or self._first._erased:
            self._first = next(n for n in self.fx.nodes if n.op not in ("placeholder", "get_attr"))
        return self._first

    def add_state(self, name: str, state: State, like: Node | None = None) -> Node:
        """Store a new state under `name`, or under `name_1`, ... where that is taken; see `read`."""
        free = self._free(name)
        self.states[free] = state
        return self.read(free, like)

    def _free(self, name: str) -> str:
        free, count = name, 0
        while not self._is_free(free):
            count += 1
            free = f"{name}_{count}"
        self._modules.update(_prefixes(free))
        return free

    def _is_free(self, name: str) -> bool:
        """Whether a state may get this name: unused, no module has it or would, no tensor is on its
        path."""
        taken = name in self.states or name in self.aliases or name in self._modules
        taken = taken or hasattr(nn.Module, name.rpartition(".")[2])  # `to`, `training`, ...
        return not taken and not any(one in self.states for one in _prefixes(name))

    def rename_state(self, name: str, wish: str) -> str:
        """Rename a state, to `wish` or the nearest free name. Returns the new name."""
        state = self.states.pop(name)
        node = self._reads.pop(name, None)
        free = self._free(wish)
        self.states[free] = state
        if node is not None:
            node.target = free
            node._rename(free.replace(".", "_"))
            self._reads[free] = node
        return free

    def drop_unread_states(self) -> None:
        """Forget every state that no node reads, and tied names of such states."""
        read = {str(node.target) for node in self.fx.nodes if node.op == "get_attr"}
        self.states = {name: state for name, state in self.states.items() if name in read}
        self.aliases = {name: twin for name, twin in self.aliases.items() if twin in read}

    def in_source_order(self) -> dict[str, State]:
        """The states, ordered as in the source model; new ones after the last of their module."""

        def rank(name: str) -> tuple[float, str]:
            new = last.get(name.rpartition(".")[0], math.inf)
            return self._source_order.get(name, new), name

        last: dict[str, float] = {}
        for name, index in self._source_order.items():
            last[name.rpartition(".")[0]] = index + 0.5
        return {name: self.states[name] for name in sorted(self.states, key=rank)}

    def parameter_count(self) -> int:
        return sum(s.tensor.numel() for s in self.states.values() if s.kind == "parameter")

    # -- whole-graph edits --------------------------------------------------------------------

    def eliminate_dead_code(self) -> int:
        """Erase calls that nobody reads and that do nothing; returns how many."""
        erased = 0
        for node in reversed(self.fx.nodes):
            if node.op == "call_function" and not node.users and is_pure(node):
                self.fx.erase_node(node)
                erased += 1
        for node in [n for n in self.fx.nodes if n.op == "get_attr" and not n.users]:
            self._reads.pop(str(node.target), None)
            self.fx.erase_node(node)
        return erased

    def clone(self) -> Graph:
        """An independent graph over the same state tensors."""
        return self._copied(self.fx.nodes)[0]

    def become(self, other: Graph) -> None:
        """Take on the nodes and states of another graph, which is not to be used any more."""
        self.__dict__.update(other.__dict__)

    def constants(self) -> tuple[Graph, dict[Node, Node]]:
        """The nodes that depend on parameters alone, in a graph of their own without outputs, and
        which of its nodes stands for which of these."""
        return self._copied([node for node in self.fx.nodes if self.is_constant(node)])

    def _copied(self, nodes: Iterable[Node]) -> tuple[Graph, dict[Node, Node]]:
        copy = torch.fx.Graph()
        mapping: dict[Node, Node] = {}
        for node in nodes:
            twin = copy.node_copy(node, mapping.__getitem__)
            twin.meta = dict(node.meta)
            mapping[node] = twin
        states = {name: dataclasses.replace(state) for name, state in self.states.items()}
        twin_graph = Graph(copy, states, self.signature, self.fake_mode, dict(self.aliases))
        twin_graph._source_order = self._source_order
        twin_graph.held = self.held
        return twin_graph, mapping

    def __str__(self) -> str:
        from graphopt.ir.printer import text

        return text(self)


def _prefixes(name: str) -> list[str]:
    """The modules on the path of a dotted name."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


# -- facts about nodes ------------------------------------------------------------------------


def is_overload(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload)


def is_random(node: Node) -> bool:
    if not is_overload(node.target):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags:  # type: ignore[union-attr]
        return False
    # Dropout and its like draw nothing when they do not train.
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    for name in ("train", "training", "dropout_p"):
        if name in names:
            position = names.index(name)
            default = node.target._schema.arguments[position].default_value  # type: ignore[union-attr]
            given = (
                node.args[position] if position < len(node.args) else node.kwargs.get(name, default)
            )
            return bool(given)
    return True


def written(node: Node) -> list[Node]:
    """The arguments whose memory a node writes."""
    if node.op != "call_function" or not is_overload(node.target):
        return []
    found = [
        node.args[position] if position < len(node.args) else node.kwargs.get(name)
        for position, name in _written_arguments(node.target)
    ]
    if _updates_statistics(node):
        found += [node.args[3], node.args[4]]
    return [one for one in found if isinstance(one, Node)]


@cache
def _written_arguments(target: Any) -> list[tuple[int, str]]:
    return [
        (position, argument.name)
        for position, argument in enumerate(target._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _updates_statistics(node: Node) -> bool:
    """aten.batch_norm and instance_norm write their running statistics, whatever the schema says."""
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    return (
        name in ("aten::batch_norm", "aten::instance_norm")
        and len(node.args) > 5
        and bool(node.args[5])
    )


def is_pure(node: Node) -> bool:
    """Whether running a call has no effect but its result, which is a function of its inputs."""
    if node.op != "call_function":
        return node.op == "get_attr"
    if not is_overload(node.target):
        module = getattr(node.target, "__module__", "")
        return (
            module in ("_operator", "operator", "math", "torch") or node.target is operator.getitem
        )
    return not is_random(node) and not written(node)
