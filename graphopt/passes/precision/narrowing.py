"""A graph in a narrower dtype where that pays: which of its values are, and what they are made of.

The walk goes in graph order. `HEAVY` ops are where the time goes: they read and write the narrow dtype.
`FOLLOWING` ops do where anything they read is narrow. Everything else reads what it read before.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterator
from functools import cached_property, partial

import torch
from torch import Tensor, fx, nn

from graphopt.ir import ops
from graphopt.ir.builder import Builder, infer
from graphopt.ir.coded import compressed
from graphopt.ir.graph import Graph, State, is_overload
from graphopt.ir.interpret import Evaluator, lift
from graphopt.ir.sizes import same_shape
from graphopt.ir.tiles import layout
from graphopt.ir.value import Value
from graphopt.passes.base import PassError
from graphopt.passes.materialize import cone_of, role, rounds_inside

WIDE = torch.float32

HEAVY = (ops.Conv, ops.Linear, ops.Addmm, ops.Matmul, ops.Einsum, ops.Attention)
_MOVING = (
    ops.Reshape, ops.Permute, ops.Expand, ops.RepeatInterleave, ops.Repeat, ops.Slice, ops.Select,
    ops.Split, ops.Cat, ops.Stack, ops.Pad, ops.PixelShuffle, ops.PixelUnshuffle, ops.ChannelShuffle,
    ops.Roll, ops.Flip, ops.IndexSelect, ops.Gather, ops.Index, ops.Copy, ops.Detach,
)  # fmt: skip
_ARITHMETIC = (ops.Add, ops.Sub, ops.Mul, ops.Div, ops.Neg, ops.Where)
# All of these are float32 inside and round once, measured in docs/precision.md.
_LIMITED = (
    ops.Relu, ops.LeakyRelu, ops.PRelu, ops.Clamp, ops.Gelu, ops.Silu, ops.Sigmoid, ops.Tanh,
    ops.Hardswish, ops.Hardsigmoid, ops.Elu, ops.Mish, ops.Softplus, ops.Abs, ops.Erf, ops.Dropout,
    ops.MaxPool, ops.AvgPool, ops.AdaptiveAvgPool, ops.Upsample, ops.Mean, ops.Sum, ops.Softmax,
)  # fmt: skip
_NORMS = (ops.LayerNorm, ops.GroupNorm, ops.BatchNorm)
FOLLOWING = (*_MOVING, *_ARITHMETIC, *_LIMITED, *_NORMS)
_NAMED = {"aten::unbind", "aten::masked_fill"}  # which follow, too
_OWN = frozenset({"weight", "bias", "running_mean", "running_var"})  # what norms read in float32
_MASK = frozenset({"attn_mask"})
_STEPS = {"aten::round", "aten::floor", "aten::ceil", "aten::trunc", "aten::frac", "aten::sign",
          "aten::sgn", "aten::heaviside", "aten::remainder", "aten::fmod", "aten::floor_divide",
          "aten::fake_quantize_per_tensor_affine", "aten::fake_quantize_per_channel_affine"}  # fmt: skip


def rounded(value: Tensor) -> Tensor:
    """float64 to bfloat16, to nearest and ties to even, in one rounding.

    By way of float32, as the cast of the framework goes, a value just beside the middle of two neighbours
    would first become the middle; it is put back to its side.
    """
    single = value.to(WIDE)
    up = value > single
    middle = (single.view(torch.int32) & 0xFFFF) == 0x8000
    off = middle & (single.double() != value)
    toward = torch.where(up, math.inf, -math.inf).to(WIDE)
    return torch.where(off, torch.nextafter(single, toward), single).to(torch.bfloat16)


def tensors_of(node: fx.Node) -> Iterator[Tensor]:
    value = node.meta.get("val")
    for one in value if isinstance(value, (tuple, list)) else [value]:
        if isinstance(one, Tensor):
            yield one


def _wide(node: fx.Node) -> bool:
    """Whether a value is float32, or a list of such."""
    found = list(tensors_of(node))
    return bool(found) and all(one.dtype == WIDE for one in found)


class Narrowing:
    """One walk over a copy of a graph, in its order.

    `huge` are values of `source` that are finite, but not in `dtype`.
    """

    def __init__(
        self, source: Graph, dtype: torch.dtype, residual: str, embeddings: bool,
        huge: Collection[fx.Node] = (),
    ) -> None:  # fmt: skip
        self.source, self.dtype = source, dtype
        self.graph = source.clone()
        self.aliases = dict(self.graph.aliases)
        self.origin = dict(zip(self.graph.nodes, source.nodes, strict=True))
        self.wide = {node for node in self.graph.nodes if _wide(node)}  # in the source
        self.heavy = (*HEAVY, ops.Embedding) if embeddings else HEAVY
        self.residual = residual
        self.narrowed = 0
        self.refused: dict[fx.Node, str] = {}  # nodes of the source
        self._cast: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        self._stored: dict[fx.Node, fx.Node] = {}
        self._names: list[tuple[str, str]] = []
        self._huge = {node for node, origin in self.origin.items() if origin in huge}

    @property
    def casts(self) -> int:
        return len(self._cast)

    def result(self) -> Graph:
        graph = self.graph
        for node in list(graph.nodes):
            if node.op == "output" or (node.op == "call_function" and not graph.is_constant(node)):
                self._visit(node)
        graph.eliminate_dead_code()
        graph.drop_unread_states()
        for name, wish in self._names:
            if name in graph.states and wish not in graph.states:
                graph.rename_state(name, wish)
        graph.aliases = {a: twin for a, twin in self.aliases.items() if twin in graph.states}
        return graph

    # -- which ----------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        op = Builder(self.graph, node).view(node)
        wide = node in self.wide
        if wide and _may_follow(node, op) and self._beyond(node):
            self._huge.add(node)
        heavy = wide and isinstance(op, self.heavy)
        if heavy and (reason := self._kept(node)):
            self.refused[self.origin[node]] = reason
            heavy = False
        if heavy:
            self.narrowed += 1
            self._read(node, self.dtype, _MASK)
        elif wide and self._follows(node, op):
            if self._is_residual(op):
                self._infer(node) if self._promoted(node) else self._read(node, WIDE, first=True)
            else:
                self._read(node, self.dtype, _OWN if isinstance(op, _NORMS) else frozenset())
        else:
            self._read(node, WIDE)

    def _follows(self, node: fx.Node, op: ops.Op | None) -> bool:
        """Whether an op goes on in bfloat16, as what it reads is."""
        if not _may_follow(node, op) or node in self._huge:
            return False
        if isinstance(op, ops.BatchNorm) and op.uses_batch_statistics:
            return False
        if isinstance(op, ops.AvgPool) and op.rank == 3:  # of which the CPU has no kernel
            return False
        if isinstance(op, _NORMS) and not all(map(self.graph.is_constant, _named(node, _OWN))):
            return False
        return any(one in self.wide and self._narrow(one) for one in node.all_input_nodes)

    def _narrow(self, node: fx.Node) -> bool:
        return any(one.dtype == self.dtype for one in tensors_of(node))

    def _is_residual(self, op: ops.Op | None) -> bool:
        """Whether an op is a sum of two activations that is to be float32."""
        if self.residual == "bf16" or not isinstance(op, ops.Add):
            return False
        left, right = op.operands
        if not (isinstance(left, Value) and isinstance(right, Value)):
            return False
        if any(self.graph.is_constant(one.node) for one in (left, right)):
            return False
        if not same_shape(left.shape, right.shape):
            return False
        if self.residual == "float32":
            return True
        readers = (Builder(self.graph, one).view(one) for one in op.out.node.users)
        return any(isinstance(one, (ops.LayerNorm, ops.RMSNorm)) for one in readers)

    def _promoted(self, node: fx.Node) -> bool:
        return any(one in self.wide and not self._narrow(one) for one in node.all_input_nodes)

    def _kept(self, node: fx.Node) -> str:
        """Why a map stays in float32; empty if it does not."""
        if (decision := self.decisions.get(node)) is not None:
            return f"{decision.name} decides by what it computes"
        if any(self.graph.is_constant(one) and compressed(one) is not None
               for one in node.all_input_nodes):  # fmt: skip
            return "its weight is stored as integer codes"
        return ""

    @cached_property
    def decisions(self) -> dict[fx.Node, fx.Node]:
        """A comparison, a rounding or a loop that depends on a value, for every value with one."""
        found: dict[fx.Node, fx.Node] = {}
        for node in reversed(list(self.graph.nodes)):
            by = node if self._decides(node) else found.get(node)
            if by is not None and self._passes_on(node):
                for one in node.all_input_nodes:
                    found.setdefault(one, by)
        return found

    def _passes_on(self, node: fx.Node) -> bool:
        """Whether a value is made of those of its operands, not of their sizes alone."""
        sizes = not list(tensors_of(node)) or isinstance(
            Builder(self.graph, node).view(node), ops.Full
        )
        return not sizes

    def _decides(self, node: fx.Node) -> bool:
        if node.op != "call_function" or not any(one in self.wide for one in node.all_input_nodes):
            return False
        if not is_overload(node.target):
            module = getattr(node.target, "__module__", "")
            plain = node.target is operator.getitem or module in ("_operator", "math", "torch")
            return not plain
        op = Builder(self.graph, node).view(node)
        name = node.target._schema.name  # type: ignore[union-attr]
        if name in _STEPS or not name.startswith("aten::"):
            return True
        read = [node, *(one for one in node.users if one.target is operator.getitem)]
        values = [one for user in read if not isinstance(user.meta.get("val"), (tuple, list))
                  for one in tensors_of(user)]  # fmt: skip
        whole = any(not one.dtype.is_floating_point and not one.is_complex() for one in values)
        return whole and not isinstance(op, ops.Full)

    def _beyond(self, node: fx.Node) -> bool:
        """Whether a value may be finite and yet too large for bfloat16, as what hides scores may."""
        largest = torch.finfo(self.dtype).max
        literals = [*node.args, *node.kwargs.values()]
        if any(isinstance(one, float) and largest < abs(one) < math.inf for one in literals):
            return True
        return any(one in self._huge or self._has_huge(one) for one in node.all_input_nodes)

    def _has_huge(self, node: fx.Node) -> bool:
        if node not in self.wide or not self.graph.is_constant(node):
            return False
        value = self._plain.evaluate(self._twins[self.origin[node]])
        return bool(((value.abs() > torch.finfo(self.dtype).max) & value.isfinite()).any())

    # -- how ------------------------------------------------------------------------------------

    def _read(
        self, node: fx.Node, dtype: torch.dtype, keep: frozenset[str] = frozenset(),
        first: bool = False,
    ) -> None:  # fmt: skip
        """Let a node read its float32 operands as `dtype`, but for those named `keep`; or the first."""
        kept = _named(node, keep)
        done = False
        instead: dict[fx.Node, fx.Node] = {}
        for one in dict.fromkeys(node.all_input_nodes):
            if one not in self.wide or one in kept or (first and done):
                continue
            if (dtype == WIDE) == self._narrow(one):
                instead[one], done = self._as(one, dtype, node), True
        if instead:
            node.args, node.kwargs = fx.map_arg(
                (node.args, node.kwargs), lambda one: instead.get(one, one)
            )
        if any(map(self._narrow, node.all_input_nodes)):
            self._infer(node)

    def _infer(self, node: fx.Node) -> None:
        if node.op == "call_function":
            node.meta["val"] = infer(self.graph, node.target, node.args, node.kwargs)

    def _as(self, node: fx.Node, dtype: torch.dtype, before: fx.Node) -> fx.Node:
        if self.graph.is_constant(node):
            return self._constant(node)
        if (node, dtype) not in self._cast:
            if isinstance(node.meta["val"], (tuple, list)):
                raise PassError(f"lower-precision: {node.name} is a list, expected a tensor")
            at = Builder(self.graph, before)
            made = at.call(torch.ops.aten.to.dtype, {"self": at.value(node), "dtype": dtype}).node
            made.meta["where"] = self.graph.where(node)
            self._cast[node, dtype] = made
        return self._cast[node, dtype]

    # -- weights ----------------------------------------------------------------------------------

    @cached_property
    def _constants(self) -> tuple[Graph, dict[fx.Node, fx.Node]]:
        return self.source.constants()

    @property
    def _twins(self) -> dict[fx.Node, fx.Node]:
        return self._constants[1]

    @cached_property
    def _plain(self) -> Evaluator:
        return Evaluator(self._constants[0], lifted=False)

    @cached_property
    def _lifted(self) -> Evaluator:
        return Evaluator(self._constants[0])

    def _constant(self, node: fx.Node) -> fx.Node:
        """The stored bfloat16 value of what depends on parameters alone."""
        if node not in self._stored:
            twin, origin = self._twins[self.origin[node]], self.origin[node]
            cone = cone_of(origin)
            own = rounds_inside(self.source, origin, cone)
            values = self._plain if own else self._lifted
            exact: Callable[[], Tensor] = partial(values.evaluate, twin)
            value = rounded(lift(exact()))
            value = value.contiguous(memory_format=layout(value))
            states = [self.source.states[str(one.target)] for one in cone if one.op == "get_attr"]
            parameters = [one.tensor for one in states if one.kind == "parameter"]
            kind = states[0].kind if node.op == "get_attr" else (
                "parameter" if parameters else "constant"
            )  # fmt: skip
            if kind == "parameter":
                grad = any(one.requires_grad for one in parameters)
                value = nn.Parameter(value, requires_grad=grad)
            persistent = all(one.persistent for one in states)
            wish = str(node.target) if node.op == "get_attr" else role(self.graph, node)
            state = State(value, kind, persistent, exact)
            made = self.graph.add_state(f"{wish}_narrow", state)
            self._names.append((str(made.target), wish))
            self._stored[node] = made
        return self._stored[node]


def _may_follow(node: fx.Node, op: ops.Op | None) -> bool:
    if node.target is operator.getitem or isinstance(op, FOLLOWING):
        return True
    return is_overload(node.target) and node.target._schema.name in _NAMED  # type: ignore[union-attr]


def _named(node: fx.Node, names: frozenset[str]) -> set[fx.Node]:
    """The operands of a call that have one of these names."""
    if not names or not is_overload(node.target):
        return set()
    arguments = [one.name for one in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(arguments, node.args, strict=False)), **node.kwargs}
    return {one for name, one in given.items() if name in names and isinstance(one, fx.Node)}
