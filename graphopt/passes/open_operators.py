"""Operators of libraries that are Python code over ATen become that code.

    mylib::leaky(x, v, 0.9)  ->  mul(v, 0.9), add(.., x), ..

What `torch.library` registered in Python (`custom_op`, `triton_op`, `Library.impl` for the CPU) is traced on
the types of its operands; what is compiled code, writes, or has several overloads stays. The gradient that a
library registers with an operator is lost, so this is for graphs that do not train.

The contract is `Exact`: the operator and its code are run on the example inputs, in their own dtypes, and
must agree bit for bit. Such an operator may compute in float32 whatever it is given; from here on its code,
in float64, is what the result is to equal.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx
from torch._C import DispatchKey, DispatchKeySet
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt.ir import ops
from graphopt.ir.affine import same
from graphopt.ir.builder import Builder
from graphopt.ir.contracts import Exact
from graphopt.ir.driver import Record, Session
from graphopt.ir.graph import Graph, is_overload, is_pure
from graphopt.ir.rewrite import Rewriter, rewrite
from graphopt.ir.value import Value
from graphopt.passes.base import RewritePass

NAME = "open-operators"
_PICKED = (
    "index notation has no entry of a fixed place; compared bit for bit at every site, and for all places "
    "in tests/passes/test_open_operators.py"
)
_OWN = {"aten", "prims", "prim", "graphopt", "higher_order"}
_PYTHON = ("CPU", "CompositeExplicitAutograd")


@rewrite(contract=Exact(), unproved=_PICKED)
def pick_stacked(select: ops.Select, rw: Rewriter) -> Value:
    """select(stack(x, y, ..), dim, i) is the i-th of them."""
    stack = rw.producer(select.input, ops.Stack)
    ndim = stack.out.ndim
    rw.match(stack.dim % ndim == select.dim % ndim)
    return stack.tensors[select.index]


@rewrite(contract=Exact(), unproved=_PICKED)
def pick_only(select: ops.Select, rw: Rewriter) -> Value:
    """select(unsqueeze(x, dim), dim, 0) = x."""
    inner = rw.producer(select.input, ops.Reshape).input
    dim = select.dim % select.input.ndim
    rw.match(same(select.input.shape[dim], 1) and select.index in (0, -1))
    rw.match(inner.ndim == select.out.ndim)
    rw.match(all(map(same, inner.shape, select.out.shape)))
    return inner


@dataclasses.dataclass(frozen=True)
class OpenOperators(RewritePass):
    """Operators of other libraries that are Python code become that code, where nothing trains."""

    name = NAME
    rewrites = (pick_stacked, pick_only)
    always: bool = False  # put entries of stacks in their place even if nothing was opened

    def run(self, session: Session) -> None:
        before = len(session.applied)
        queue = [node for node in session.graph.calls if is_open(node)]
        while queue:
            node = queue.pop()
            if not node._erased:
                queue += [one for one in _open(session, node) if is_open(one)]
        if len(session.applied) > before:
            session.graph.eliminate_dead_code()
            session.source = session.graph.clone()
            _spell_out(session)
        elif not self.always:
            return
        session.run(self.rewrites)


def is_open(node: fx.Node) -> bool:
    """Whether a call is of an operator that Python code computes."""
    if node.op != "call_function" or not is_overload(node.target) or not is_pure(node):
        return False
    schema = node.target._schema  # type: ignore[union-attr]
    space, _, name = schema.name.partition("::")
    if space in _OWN or schema.overload_name:
        return False
    impls: set[str] = getattr(torch.library, "_impls", set())
    return any(f"{space}/{name}/{key}" in impls for key in _PYTHON)


def _open(session: Session, node: fx.Node) -> list[fx.Node]:
    """Put the code of an operator in its place; what was emitted."""
    graph = session.graph
    try:
        results, made = _emitted(graph, node)
    except Exception as error:
        session.refused[NAME, node] = Record(
            NAME, graph.where(node), str(Exact()),
            f"the code of {node.target} cannot be traced: {type(error).__name__}: {error}",
            node=node.name,
        )  # fmt: skip
        return []
    pairs = [(node, results[0])]
    if isinstance(node.meta["val"], (list, tuple)):
        pairs = [(user, results[user.args[1]]) for user in node.users]  # type: ignore[index]
    done = False
    if pairs and all(isinstance(new, fx.Node) for _, new in pairs):
        (old, new), *others = pairs
        done = session.replace(NAME, Exact(), old, new, made, others)
    if done:
        session.erase_dead([*(old for old, _ in pairs), node, *reversed(made)])
    else:
        for one in reversed(made):
            graph.fx.erase_node(one)
        return []
    return [one for one in made if not one._erased]


def _emitted(graph: Graph, node: fx.Node) -> tuple[list[Any], list[fx.Node]]:
    """(results, all nodes) of an operator's code, in front of its call."""
    target: Any = node.target
    reads = node.all_input_nodes
    if not all(isinstance(one.meta["val"], torch.Tensor) for one in reads):
        raise TypeError("it takes other values than tensors")
    keys = DispatchKeySet(DispatchKey.CPU)

    def code(*tensors: Any) -> Any:
        given = dict(zip(reads, tensors, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), given.__getitem__)
        return target.redispatch(keys, *args, **kwargs)

    with torch.no_grad():
        traced = make_fx(code)(*(one.meta["val"] for one in reads))
    twins: dict[fx.Node, fx.Node] = {}
    feed, made = iter(reads), []
    for one in traced.graph.nodes:
        if one.op == "placeholder":
            twins[one] = next(feed)
        elif one.op == "call_function":
            with graph.fx.inserting_before(node):
                twin = twins[one] = graph.fx.node_copy(one, twins.__getitem__)
            twin.meta = {key: node.meta[key] for key in ("where", "absorbed") if key in node.meta}
            twin.meta["val"] = one.meta["val"]
            made.append(twin)
        elif one.op == "output":
            found = one.args[0]
            listed = found if isinstance(found, (list, tuple)) else [found]
            return [fx.map_arg(item, twins.__getitem__) for item in listed], made
        else:
            raise TypeError(f"a {one.op}, not a call")
    raise AssertionError("a graph without an output")


def _spell_out(session: Session) -> None:
    """unbind(x, dim)[i] is written select(x, dim, i)."""
    graph = session.graph
    for node in graph.calls:
        source = node.args[0] if node.target is operator.getitem else None
        if isinstance(source, fx.Node) and source.target is torch.ops.aten.unbind.int:
            builder = Builder(graph, node)
            dim = source.args[1] if len(source.args) > 1 else source.kwargs.get("dim", 0)
            assert isinstance(dim, int) and isinstance(node.args[1], int)
            value = builder.emit(
                ops.Select(builder.value(source.args[0]), dim, node.args[1])  # type: ignore[arg-type]
            )
            session.replace("spell-out-unbind", Exact(), node, value.node, builder.made)
            session.erase_dead([node, source, *builder.made])


__all__ = ["OpenOperators", "is_open"]
