"""From an exported program to normal form: no writes to activations, no nested graphs, no views
that depend on strides.

Every memory cell (a fresh tensor, a state, an input) has current contents; every source node is a
path of views into a cell. A write computes new contents and scatters them back through the path; a
read goes through the path again if the cell has changed since. That is how torch functionalizes,
done here on the training-level ops so that they stay whole and keep their gradients.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx

from graphopt.ir.builder import infer
from graphopt.ir.graph import GraphError, _updates_statistics
from graphopt.ir.ops.gradient import TARGET, straight
from graphopt.ir.sizes import same_shape

aten = torch.ops.aten

_DROPPED = {
    "aten::_assert_tensor_metadata", "aten::_assert_scalar", "aten::_assert_async",
    "aten::sym_constrain_range", "aten::sym_constrain_range_for_size",
}  # fmt: skip
# In-place overloads whose functional twin has another name.
_TWINS = {
    "aten::bernoulli_.float": "bernoulli.p",
    "aten::pow_.Scalar": "pow.Tensor_Scalar",
    "aten::pow_.Tensor": "pow.Tensor_Tensor",
    "aten::normal_": "normal_functional.default",
    "aten::detach_": "detach.default",
    "aten::t_": "t.default",
}
# Nested graphs that only set a mode, and at which argument the graph stands.
_REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
_SAME_ORDER = {
    "aten::view", "aten::reshape", "aten::_unsafe_view", "aten::flatten", "aten::unflatten",
    "aten::unsqueeze", "aten::squeeze", "aten::view_as", "aten::reshape_as",
}  # fmt: skip
_SAME_VALUE = {
    "aten::detach", "aten::alias", "aten::contiguous", "aten::to", "aten::lift_fresh",
    "aten::dropout", "aten::feature_dropout", "aten::alpha_dropout", "aten::feature_alpha_dropout",
    "aten::type_as", "aten::positive", "aten::expand", "aten::expand_as", "aten::broadcast_to",
}  # fmt: skip
_TRANSPOSES = {"aten::permute", "aten::transpose", "aten::t", "aten::numpy_T", "aten::mT",
               "aten::swapaxes", "aten::swapdims", "aten::movedim"}  # fmt: skip


class Unsupported(GraphError):
    """The program does something that normal form cannot express."""


@dataclasses.dataclass(eq=False)
class Cell:
    """A piece of memory: its current contents and how often it was written."""

    contents: fx.Node
    version: int = 0


@dataclasses.dataclass
class Place:
    """Where the value of a source node lives: a cell, and the views that lead to it."""

    cell: Cell
    path: tuple[tuple[fx.Node, int | None], ...] = ()  # (source view node, index into its list)
    cached: tuple[int, Any] = (-1, None)


class Normalizer:
    """Copies the nodes of an exported program into `graph`, in normal form."""

    def __init__(self, graph: fx.Graph, fake_mode: Any) -> None:
        self.graph = graph
        self.fake_mode = fake_mode
        self.places: dict[fx.Node, Place] = {}
        self.plain: dict[fx.Node, Any] = {}  # sizes, lists of fresh tensors, ...
        self.lists: dict[fx.Node, int] = {}  # lists of views: the version of what they show
        self.origin: dict[fx.Node, fx.Node] = {}  # inputs and states: what reads their memory
        self.writes = False  # whether the program writes in place at all

    # -- inputs and outputs -------------------------------------------------------------------

    def add_external(self, source: fx.Node, node: fx.Node) -> None:
        node.meta["val"] = settled(source.meta.get("val"), self.fake_mode)
        self.origin[source] = node
        if isinstance(node.meta["val"], torch.Tensor):
            self.places[source] = Place(Cell(node), (), (0, node))
        else:
            self.plain[source] = node

    def finish(self) -> None:
        """Emit the writes that must reach states and inputs; drop lists read as their pieces."""
        for node in map(self.plain.__getitem__, self.lists):
            if not node.users:
                self.graph.erase_node(node)
        for source, node in self.origin.items():
            cell = self.places[source].cell if source in self.places else None
            if cell is not None and cell.version:
                self._emit(aten.copy_.default, (node, cell.contents), {}, source)

    # -- reading ------------------------------------------------------------------------------

    def read(self, source: Any) -> Any:
        """The new node for the present value of a source node."""
        if not isinstance(source, fx.Node):
            return source
        if source in self.plain:
            return self.plain[source]
        place = self.places[source]
        version, node = place.cached
        if version != place.cell.version:
            node = place.cell.contents
            for view, index in place.path:
                node = self._view(view, node, index)
            place.cached = (place.cell.version, node)
        return node

    def _view(self, view: fx.Node, base: fx.Node, index: int | None) -> fx.Node:
        """Apply one source view to new contents."""
        first = view.args[0]
        args = tuple(base if a is first else fx.map_arg(a, self.read) for a in view.args)
        node = self._emit(view.target, args, fx.map_arg(view.kwargs, self.read), view)
        if index is not None:
            node = self._emit(operator.getitem, (node, index), {}, view)
        return node

    # -- copying ------------------------------------------------------------------------------

    def run(self, module: fx.GraphModule, prefix: str = "") -> None:
        """Copy the calls of a graph module whose placeholders are already known."""
        self.writes = self.writes or _writes(module)
        for source in module.graph.nodes:
            if source.op == "call_function":
                self._call(source, module)
            elif source.op not in ("placeholder", "get_attr", "output"):
                raise Unsupported(f"{source.op} {source.target} in an exported graph")

    def _call(self, source: fx.Node, module: fx.GraphModule) -> None:
        target = source.target
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._nested(source, module)
        if not isinstance(target, torch._ops.OpOverload):
            return self._python(source)
        schema = target._schema
        if schema.name in _DROPPED:
            return None
        if _updates_statistics(source):
            self._statistics(source)
            return None
        if any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments):
            return self._write(source)
        args, kwargs = self._arguments(source)
        returns = schema.returns
        view = len(returns) == 1 and returns[0].alias_info is not None and self._aliases(source)
        if view or self._passes_on(source):
            base = self.places.get(source.args[0])  # type: ignore[arg-type]
            if base is not None:
                node = self._emit(target, args, kwargs, source)
                if isinstance(source.meta.get("val"), torch.Tensor):
                    path = (*base.path, (source, None))
                    self.places[source] = Place(base.cell, path, (base.cell.version, node))
                else:
                    self.plain[source] = node  # a list of views: places are made by getitem
                    self.lists[source] = base.cell.version
                return None
        self._define(source, self._emit(target, args, kwargs, source))
        return None

    def _define(self, source: fx.Node, node: fx.Node) -> None:
        if isinstance(source.meta.get("val"), torch.Tensor):
            self.places[source] = Place(Cell(node), (), (0, node))
        else:
            self.plain[source] = node

    def _arguments(self, source: fx.Node) -> tuple[Any, Any]:
        return fx.map_arg((source.args, source.kwargs), self.read)

    def _python(self, source: fx.Node) -> None:
        if source in self.places or source in self.plain:
            return  # an output of a nested graph
        container = source.args[0] if source.args else None
        if source.target is operator.getitem and container in self.lists:
            assert isinstance(container, fx.Node)
            base = self.places[container.args[0]]  # type: ignore[index]
            place = Place(base.cell, (*base.path, (container, source.args[1])))  # type: ignore[arg-type]
            if self.lists[container] == base.cell.version:
                node = self._emit(source.target, (self.read(container), source.args[1]), {}, source)
                place.cached = (base.cell.version, node)
            self.places[source] = place
            return
        args, kwargs = self._arguments(source)
        self._define(source, self._emit(source.target, args, kwargs, source))

    def _aliases(self, source: fx.Node) -> bool:
        """Whether an op that may return a view does so on this input."""
        base, out = source.args[0].meta.get("val"), source.meta.get("val")  # type: ignore[union-attr]
        name = source.target._schema.name  # type: ignore[union-attr]
        if not isinstance(base, torch.Tensor) or not isinstance(out, torch.Tensor):
            return True
        if name in ("aten::to", "aten::type_as"):
            return base.dtype == out.dtype and base.device == out.device
        if name == "aten::contiguous":
            return out.stride() == base.stride()
        if name in ("aten::reshape", "aten::flatten", "aten::reshape_as"):
            try:
                with self.fake_mode:
                    base.view(out.shape)
            except (RuntimeError, ValueError):
                return False
        return True

    def _passes_on(self, source: fx.Node) -> bool:
        """Whether an op whose schema says nothing of it hands back its first argument (or a view of
        it) all the same, as a dropout does that does not train. It matters to writes alone."""
        target: Any = source.target
        base: Any = source.args[0] if source.args else None
        out = source.meta.get("val")
        if not self.writes or not isinstance(out, torch.Tensor) or not isinstance(base, fx.Node):
            return False
        if target._schema.returns[0].alias_info is not None or base not in self.places:
            return False
        if base.meta["val"].dtype != out.dtype or not target.has_kernel_for_dispatch_key(
            torch._C.DispatchKey.CompositeImplicitAutograd
        ):
            return False
        given: Any = fx.map_arg((source.args, source.kwargs), lambda one: one.meta["val"])
        environment = self.fake_mode.shape_env
        quiet = nullcontext() if environment is None else environment.suppress_guards()
        with self.fake_mode, torch.no_grad(), quiet:
            found = target(*given[0], **given[1])
        return bool(found.untyped_storage()._cdata == given[0][0].untyped_storage()._cdata)

    # -- writing ------------------------------------------------------------------------------

    def _statistics(self, source: fx.Node) -> None:
        """A training batch norm updates its running statistics itself: it must see the states."""
        for position in (3, 4):
            place = self.places.get(source.args[position])  # type: ignore[arg-type]
            if place is not None and (place.path or place.cell.version):
                raise Unsupported("running statistics of a batch norm are also written elsewhere")
        args, kwargs = self._arguments(source)
        self._define(source, self._emit(source.target, args, kwargs, source))

    def _write(self, source: fx.Node) -> None:
        target: Any = source.target
        schema = target._schema
        writes = [a for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        if len(writes) != 1:
            raise Unsupported(f"{target} writes to {len(writes)} arguments")
        args, kwargs = self._arguments(source)
        if writes[0].name == "out":
            destination: Any = source.kwargs["out"]
            node = self._out(source, args, {k: v for k, v in kwargs.items() if k != "out"})
        elif writes[0] is schema.arguments[0] and schema.name.endswith("_"):
            destination = source.args[0]
            node = self._functional(source, args, kwargs)
        else:
            raise Unsupported(f"{target} writes to its argument {writes[0].name}")
        if destination not in self.places:
            raise Unsupported(f"{target} writes to a value that is not a tensor")
        place = self.places[destination]
        if schema.name in ("aten::detach_", "aten::t_"):
            self._define(source, node)
            self.places[destination] = self.places[source]
            return
        self._scatter(place, node, source)
        place.cached = (place.cell.version, node)
        self.places[source] = place

    def _out(self, source: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        """The value that an `out=` overload writes, from the overload without it."""
        target: Any = source.target
        wanted = [(a.name, str(a.type)) for a in target._schema.arguments if a.name != "out"]
        packet = target.overloadpacket
        for name in packet.overloads():
            twin = getattr(packet, name)
            if [(a.name, str(a.type)) for a in twin._schema.arguments] == wanted:
                node = self._emit(twin, args, kwargs, source)
                like = source.meta["val"]
                if node.meta["val"].dtype != like.dtype:
                    node = self._emit(aten.to.dtype, (node, like.dtype), {}, source)
                return node
        raise Unsupported(f"{target} has no functional form")

    def _functional(self, source: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        """The value that an in-place op leaves in its first argument."""
        target: Any = source.target
        name, kind = target._schema.name, target._schema.overload_name
        current = args[0]
        like = current.meta["val"]
        if name == "aten::copy_":
            node = args[1]
            if node.meta["val"].dtype != like.dtype:
                node = self._emit(aten.to.dtype, (node, like.dtype), {}, source)
            if not same_shape(node.meta["val"].shape, like.shape):
                node = self._emit(aten.expand_as.default, (node, current), {}, source)
            return node  # type: ignore[no-any-return]
        if name == "aten::zero_":
            return self._emit(aten.zeros_like.default, (current,), {}, source)
        twin = _TWINS.get(f"{name}.{kind}" if kind else name)
        packet, _, overload = (twin or f"{name[6:-1]}.{kind or 'default'}").partition(".")
        try:
            functional = getattr(getattr(aten, packet), overload)
        except AttributeError:
            raise Unsupported(f"{target} has no functional form") from None
        node = self._emit(functional, args, kwargs, source)
        if node.meta["val"].dtype != like.dtype:
            node = self._emit(aten.to.dtype, (node, like.dtype), {}, source)
        return node

    def _scatter(self, place: Place, node: fx.Node, source: fx.Node) -> None:
        """Put new contents of a view back into its cell."""
        bases = [place.cell.contents]
        for view, index in place.path[:-1]:
            bases.append(self._view(view, bases[-1], index))
        for (view, index), base in reversed(list(zip(place.path, bases, strict=False))):
            node = self._put(view, index, base, node, source)
        old, place.cell.contents = place.cell.contents, node
        place.cell.version += 1
        if any(view.target is aten.detach.default for view, _ in place.path):
            self._unseen(place.cell, old, source)

    def _unseen(self, cell: Cell, old: fx.Node, source: fx.Node) -> None:
        """A write that autograd did not see: what is read from now on has the gradient of `old`."""
        node = cell.contents
        value = node.meta["val"]
        if self._is_buffer(cell) or not (value.is_floating_point() or value.is_complex()):
            cell.contents = self._emit(aten.detach.default, (node,), {}, source)
        else:
            given: Any = (straight(value), [node], [old], [])
            marked = self._emit(TARGET, given, {}, source)
            cell.contents = self._emit(operator.getitem, (marked, 0), {}, source)
        cell.version += 1

    def _is_buffer(self, cell: Cell) -> bool:
        return any(
            node.op == "get_attr" and not node.meta["val"].requires_grad
            for source, node in self.origin.items()
            if source in self.places and self.places[source].cell is cell
        )

    def _put(
        self, view: fx.Node, index: int | None, base: fx.Node, node: fx.Node, source: fx.Node
    ) -> fx.Node:
        """`base` with the part that `view` shows replaced by `node`."""
        name = view.target._schema.name  # type: ignore[union-attr]
        emit: Callable[..., fx.Node] = lambda target, *args: self._emit(target, args, {}, source)  # noqa: E731
        rest: Any = fx.map_arg(view.args[1:], self.read)
        if name == "aten::select":
            return emit(aten.select_scatter.default, base, node, *rest)
        if name == "aten::slice":
            return emit(aten.slice_scatter.default, base, node, *rest)
        if name == "aten::narrow" and isinstance(rest[1], int) and rest[1] >= 0:
            dim, start, length = rest
            return emit(aten.slice_scatter.default, base, node, dim, start, start + length)
        if name == "aten::diagonal":
            return emit(aten.diagonal_scatter.default, base, node, *rest)
        if name in _SAME_VALUE and same_shape(node.meta["val"].shape, base.meta["val"].shape):
            return node
        if name in _SAME_ORDER:
            return emit(aten.reshape_as.default, node, base)
        if name in _TRANSPOSES:
            dims = _permutation(view)
            inverse = [dims.index(axis) for axis in range(len(dims))]
            return emit(aten.permute.default, node, inverse)
        if index is not None and name in ("aten::split", "aten::split_with_sizes", "aten::chunk"):
            dim = rest[1] if len(rest) > 1 else 0
            sizes = [one.shape[dim] for one in view.meta["val"]]
            start = sum(sizes[:index])
            return emit(aten.slice_scatter.default, base, node, dim, start, start + sizes[index])
        if index is not None and name == "aten::unbind":
            return emit(aten.select_scatter.default, base, node, rest[0] if rest else 0, index)
        raise Unsupported(f"a write through a view made by {view.target}")

    # -- nested graphs ------------------------------------------------------------------------

    def _nested(self, source: fx.Node, module: fx.GraphModule) -> None:
        region: Any = source.target
        inner_index = _REGIONS.get(region.__name__, -1)
        if inner_index < 0:
            raise Unsupported(f"control flow by {region}")
        if region.__name__ == "wrap_with_autocast" and source.args[2]:
            raise Unsupported("an autocast region")
        inner = getattr(module, str(source.args[inner_index].target))  # type: ignore[union-attr]
        operands = source.args[inner_index + 1 :]
        silent = region.__name__ == "wrap_with_set_grad_enabled" and not source.args[0]
        before = {
            place.cell: (place.cell.contents, place.cell.version) for place in self.places.values()
        } if silent and _writes(inner) else {}  # fmt: skip
        placeholders = [node for node in inner.graph.nodes if node.op == "placeholder"]
        for inside, outside in zip(placeholders, operands, strict=True):
            if outside in self.places:
                self.places[inside] = self.places[outside]  # type: ignore[index]
            else:
                self.plain[inside] = self.read(outside)
        self.run(inner)
        written = {cell: old for cell, (old, version) in before.items() if cell.version > version}
        for cell, old in written.items():
            self._unseen(cell, old, source)
        results = next(iter(reversed(inner.graph.nodes))).args[0]
        values = [self.read(result) for result in results]
        if silent:
            # What a no_grad region computes carries no gradient; what it writes to has that it had.
            values = [
                self._emit(aten.detach.default, (value,), {}, source)
                if result in self.places and self.places[result].cell not in written else value
                for result, value in zip(results, values, strict=True)
            ]  # fmt: skip
        for user in list(source.users):
            value = values[user.args[1]]  # type: ignore[index]
            if isinstance(user.meta.get("val"), torch.Tensor):
                self.places[user] = Place(Cell(value), (), (0, value))
            else:
                self.plain[user] = value

    # -- emitting -----------------------------------------------------------------------------

    def _emit(self, target: Any, args: Any, kwargs: Any, source: fx.Node) -> fx.Node:
        if target is operator.getitem:
            target, args = _piece(*args)
        if getattr(target, "_schema", None) is not None:
            target, args, kwargs = _spelled(target, args, kwargs)
        name = source.name.rstrip("_") if target is not aten.copy_.default else None
        node = self.graph.create_node("call_function", target, tuple(args), dict(kwargs), name=name)
        node.meta["where"] = module_path(source)
        if target is source.target and "val" in source.meta:
            node.meta["val"] = settled(source.meta["val"], self.fake_mode)
        else:
            value = infer(self, target, node.args, node.kwargs)  # type: ignore[arg-type]
            node.meta["val"] = settled(value, self.fake_mode)
        return node


def settled(value: Any, fake_mode: Any) -> Any:
    """A fake value in which sizes that tracing found to be constants are plain integers.

    Tracing goes on with a symbol after something (a loop over an axis) has fixed its value; whoever
    asks whether a size is dynamic must not see one.
    """
    if isinstance(value, (list, tuple)):
        return type(value)(settled(one, fake_mode) for one in value)
    if isinstance(value, torch.SymInt):
        known = value.node.maybe_as_int()
        return value if known is None else known
    if not isinstance(value, torch.Tensor) or not value.layout == torch.strided:
        return value
    if not any(_is_settled(one) for one in (*value.shape, *value.stride())):
        return value
    sizes, strides = settled(tuple(value.shape), None), settled(value.stride(), None)
    with fake_mode:
        return torch.empty_strided(
            sizes, strides, dtype=value.dtype, device=value.device,
            requires_grad=value.requires_grad,
        )  # fmt: skip


def _is_settled(size: Any) -> bool:
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is not None


def _writes(module: fx.GraphModule) -> bool:
    """Whether a graph, or one nested in it, writes to anything."""
    return any(
        argument.alias_info is not None and argument.alias_info.is_write
        for inner in module.modules()
        if isinstance(inner, fx.GraphModule)
        for node in inner.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        for argument in node.target._schema.arguments
    )


def _spelled(target: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """Schema order, keywords made positional; `view` becomes `reshape`, which asks no strides."""
    if target in (aten.view.default, aten._unsafe_view.default):
        target = aten.reshape.default
        kwargs = {"shape" if key == "size" else key: value for key, value in kwargs.items()}
    args, kwargs = list(args), dict(kwargs)
    for argument in target._schema.arguments[len(args) :]:
        if argument.kwarg_only or argument.name not in kwargs:
            break
        args.append(kwargs.pop(argument.name))
    return target, args, kwargs


_PIECES = {"aten::split", "aten::split_with_sizes", "aten::chunk", "aten::unbind"}


def _piece(container: Any, index: Any) -> tuple[Any, tuple[Any, ...]]:
    """An item of a list of views, as the slice or the entry that it is."""
    schema = getattr(getattr(container, "target", None), "_schema", None)
    if schema is None or schema.name not in _PIECES or container.kwargs:
        return operator.getitem, (container, index)
    base, rest = container.args[0], container.args[1:]
    if schema.name == "aten::unbind":
        return aten.select.int, (base, rest[0] if rest else 0, index)
    dim = rest[1] if len(rest) > 1 else 0
    sizes = [one.shape[dim] for one in container.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        return operator.getitem, (container, index)
    start = sum(sizes[:index])
    return aten.slice.Tensor, (base, dim, start, start + sizes[index])


def _permutation(view: fx.Node) -> list[int]:
    """The axis order of a transposing view, found by running it on labelled axes."""
    base = view.args[0].meta["val"]  # type: ignore[union-attr]
    probe = torch.empty([i + 2 for i in range(base.ndim)], device="meta")
    seen = view.target(probe, *view.args[1:], **view.kwargs)  # type: ignore[operator]
    return [size - 2 for size in seen.shape]


def module_path(source: fx.Node) -> str:
    """The module of the source model that a node was traced in, as a dotted path."""
    # torch.export gives what was traced in no module one of this name.
    stack = [
        path for path, _ in (source.meta.get("nn_module_stack") or {}).values()
        if path != "_empty_nn_module_stack_from_metadata_hook"
    ]  # fmt: skip
    if not stack:
        return ""
    path = stack[-1]
    return str(path).removeprefix("L['self']").removeprefix("self").strip(".").split("@")[0]
