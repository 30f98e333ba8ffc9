"""Evaluate every parameter-only part of the graph once and store the result.

    f(parameters)  ->  one parameter: f evaluated in float64, rounded once to its dtype

This is the step from Tune to Deploy mode. Afterwards states that nothing reads are dropped.
Where the model itself computes in a narrower dtype than the result's, or rounds on the way (fake
quantization), the part is evaluated in its own dtypes instead, bit for bit as the model would. What is
made of integer codes stays as it is, or becomes codes again where `requantize` allowed it. Tables that read
nothing of an input but its dtype or its fixed size are parameter-only too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx

from graphopt.ir import ops
from graphopt.ir.builder import Builder
from graphopt.ir.coded import compressed
from graphopt.ir.contracts import Algebraic, Exact
from graphopt.ir.driver import Session
from graphopt.ir.graph import Graph, State
from graphopt.ir.interpret import Evaluator, lift
from graphopt.ir.rewrite import Rewrite, Rewriter, rewrite
from graphopt.ir.tiles import Tiles, layout
from graphopt.ir.value import Value
from graphopt.passes.base import Pass
from graphopt.passes.requantize import round_again

KEPT = 1 << 25  # bytes of values kept while they are computed from each other
_VIEWS = (ops.Reshape, ops.Permute, ops.Expand, ops.Slice, ops.Select, ops.Detach, ops.Copy)
_ROUNDING = {"aten::round", "aten::floor", "aten::ceil", "aten::trunc", "aten::sign",
             "aten::fake_quantize_per_tensor_affine", "aten::fake_quantize_per_channel_affine"}  # fmt: skip


@rewrite(
    contract=Exact(),
    unproved="it changes the spelling of a call, which index notation does not see; every site is "
    "compared bit for bit",
)
def spell_out_type(op: ops.Full | ops.Cast, rw: Rewriter) -> Value:
    """zeros_like(x) = zeros(shape, dtype), c.type_as(x) = c.to(dtype): x is not read any more."""
    read = rw.root.all_input_nodes
    if isinstance(op, ops.Cast):
        rw.match(len(read) > 1 and op.input.is_constant)
    else:
        rw.match(read and all(isinstance(size, int) for size in op.size))
    return rw.emit_like(op)


@dataclasses.dataclass(frozen=True)
class Materialize(Pass):
    """Parameter-only expressions become stored parameters, in float64 with one rounding."""

    name = "materialize"
    limit: int = 1 << 22  # elements a result may have beyond the states it is computed from
    dequantize: bool = False  # store in full what is stored in a byte or less per element

    def run(self, session: Session) -> None:
        graph = session.graph
        if session.run(self.all_rewrites()):
            for node in graph.nodes:
                node.meta.pop("constant", None)  # what reads them may be constant now
        # What the results are made of, for those who ask for them in float64.
        before, twin = graph.constants()
        lifted, plain = Evaluator(before, limit=KEPT), Evaluator(before, lifted=False)
        tiles = Tiles(before, lifted)
        made: list[tuple[str, str]] = []
        for node in frontier(graph):
            cone = cone_of(node)
            if not self.worthwhile(graph, node, cone):
                continue
            own = rounds_inside(graph, node, cone)
            exact = partial(lifted.evaluate, twin[node])
            if own:
                value = plain.evaluate(twin[node])
            elif (value := tiles.rounded(twin[node])) is None:
                value = exact()
            state = stored(graph, value, node, cone)
            state.exact = exact if own else partial(rounding_of, exact, state.tensor)
            wish = role(graph, node)
            alike = state.tensor.stride() == node.meta["val"].stride()
            name = f"materialized_{len(made)}"
            read = graph.add_state(name, state, like=node if alike else None)
            contract = Exact() if own else Algebraic()
            if session.replace("materialize", contract, node, read, [read]):
                made.append((str(read.target), wish))
        graph.eliminate_dead_code()
        graph.drop_unread_states()
        for name, wish in made:
            if name in graph.states:
                graph.rename_state(name, wish)
        round_again(session)

    @classmethod
    def all_rewrites(cls) -> tuple[Rewrite, ...]:
        return (spell_out_type,)

    def worthwhile(self, graph: Graph, node: fx.Node, cone: list[fx.Node]) -> bool:
        """Whether a value is better stored than computed at every run; `cone`: all it is made of."""
        states = [one for one in cone if one.op == "get_attr"]
        size = node.meta["val"].numel()
        if size > sum(one.meta["val"].numel() for one in states) + self.limit:
            return False
        if not self.dequantize and compressed(node) is not None:
            return False
        builder = Builder(graph, node)
        if all(one.op == "get_attr" or isinstance(builder.view(one), _VIEWS) for one in cone):
            # A mere view: storing it pays only if the original goes away.
            inside = set(cone)
            return (
                size <= states[0].meta["val"].numel()
                and all(set(one.users) <= inside for one in states)
                if states
                else False
            )
        return True


def frontier(graph: Graph) -> list[fx.Node]:
    """The parameter-only tensors that something else reads."""
    return [
        node
        for node in graph.calls
        if graph.is_constant(node)
        and isinstance(node.meta.get("val"), torch.Tensor)
        and any(not graph.is_constant(user) for user in node.users)
    ]


def cone_of(node: fx.Node) -> list[fx.Node]:
    """`node` and everything it is computed from."""
    seen, stack = {node: None}, [node]
    while stack:
        for one in stack.pop().all_input_nodes:
            if one not in seen:
                seen[one] = None
                stack.append(one)
    return list(seen)


def rounds_inside(graph: Graph, node: fx.Node, cone: list[fx.Node]) -> bool:
    """Whether the model itself computes part of `node` in a narrower dtype, or rounds on the way."""
    builder = Builder(graph, node)
    result = node.meta["val"].dtype
    for one in cone:
        if one.op != "call_function" or "made_by" in one.meta:
            continue
        name = getattr(getattr(one.target, "_schema", None), "name", "")
        found = one.meta.get("val")
        narrow = isinstance(found, torch.Tensor) and _narrower(found.dtype, result)
        if name in _ROUNDING or (narrow and not isinstance(builder.view(one), _VIEWS)):
            return True
    return False


def _narrower(to: torch.dtype, of: torch.dtype) -> bool:
    floating = to.is_floating_point and of.is_floating_point
    return floating and torch.promote_types(to, of) != to


def stored(graph: Graph, value: torch.Tensor, node: fx.Node, cone: list[fx.Node]) -> State:
    """The state for an evaluated cone: a parameter if it comes from one."""
    sources = [graph.states[str(one.target)] for one in cone if one.op == "get_attr"]
    dtype: torch.dtype = node.meta["val"].dtype
    tensor = value.to(dtype)
    tensor = tensor.contiguous(memory_format=layout(tensor))
    if any(_shares(tensor, one.tensor) for one in sources):
        tensor = tensor.clone()
    if dtype.is_floating_point or dtype.is_complex:
        if any(one.kind == "parameter" for one in sources):
            grad = any(one.tensor.requires_grad for one in sources)
            return State(torch.nn.Parameter(tensor, requires_grad=grad), "parameter")
    return State(tensor, "buffer" if any(one.kind == "buffer" for one in sources) else "constant")


def rounding_of(exact: Callable[[], torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    """The exact value of which `tensor` is the rounding.

    Raises:
        ArithmeticError: if it is not.
    """
    value = exact()
    if torch.equal(value.to(tensor.dtype), tensor.detach()):
        return value
    if tensor.is_floating_point() and tensor.numel():
        found, limits = lift(tensor.detach()), torch.finfo(tensor.dtype)
        allowed = limits.eps * value.abs() + 1e-12 * value.abs().max() + limits.tiny
        if bool(((found - value).abs() > allowed).logical_and(found.isfinite()).any()):
            raise ArithmeticError("what is stored is not what the expression evaluates to")
    return value


def _shares(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def role(graph: Graph, node: fx.Node) -> str:
    """The name for a materialized value: the module and field that read it."""
    builder = Builder(graph, node)
    for user in node.users:
        op: Any = builder.view(user)
        if op is None:
            continue
        for field in ("weight", "bias"):
            value = getattr(op, field, None)
            if value is not None and value.node is node:
                return f"{graph.where(user)}.{field}".lstrip(".")
    return f"{graph.where(node)}.{node.name}".lstrip(".")
