"""Values: the tensors a rewrite speaks about.

A `Value` stands for one node of the graph. Arithmetic on values emits nodes through the builder
that made them, so a formula in a rewrite reads as the formula in the paper:

    scale = weight * (var + eps).rsqrt()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import fx

from graphopt.ir.sizes import same, same_shape

if TYPE_CHECKING:
    from graphopt.ir.builder import Builder
    from graphopt.ir.ops.base import Op

Number = int | float | bool | complex
Operand = Union["Value", Number]


class Value:
    """One value of a graph, as seen by the builder (or rewriter) that hands it out."""

    __slots__ = ("builder", "node")

    def __init__(self, node: fx.Node, builder: Builder) -> None:
        self.node = node
        self.builder = builder

    # -- what is known about it ---------------------------------------------------------------

    @property
    def meta(self) -> Any:
        """The fake tensor (shape, dtype, device without data) or symbolic number it stands for."""
        return self.node.meta["val"]

    @property
    def is_tensor(self) -> bool:
        return isinstance(self.node.meta.get("val"), torch.Tensor)

    @property
    def shape(self) -> tuple[Any, ...]:
        """Sizes; an entry is an int, or a `torch.SymInt` where the size is dynamic."""
        return tuple(self.meta.shape)

    @property
    def ndim(self) -> int:
        return len(self.meta.shape)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.meta.dtype
        return dtype

    @property
    def op(self) -> Op | None:
        """The op view of the node that computes this value, or None if the op is unknown."""
        return self.builder.view(self.node)

    @property
    def is_constant(self) -> bool:
        """Whether it depends on parameters, buffers and literals alone."""
        return self.builder.graph.is_constant(self.node)

    @property
    def users(self) -> tuple[fx.Node, ...]:
        return tuple(self.node.users)

    @property
    def where(self) -> str:
        """The module path in the source model, such as `layer1.0.bn1`."""
        return self.builder.graph.where(self.node)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Value) and self.builder.same(self.node, other.node)

    def __hash__(self) -> int:
        return hash(self.node)

    def __repr__(self) -> str:
        return f"%{self.node.name}"

    # -- formulas -----------------------------------------------------------------------------

    def _binary(self, name: str, left: Operand, right: Operand) -> Value:
        from graphopt.ir import ops

        return self.builder.emit(getattr(ops, name)(left, right))

    def __add__(self, other: Operand) -> Value:
        return self._binary("Add", self, other)

    def __radd__(self, other: Operand) -> Value:
        return self._binary("Add", self, other)

    def __sub__(self, other: Operand) -> Value:
        return self._binary("Sub", self, other)

    def __rsub__(self, other: Operand) -> Value:
        return self._binary("Sub", other, self)

    def __mul__(self, other: Operand) -> Value:
        return self._binary("Mul", self, other)

    def __rmul__(self, other: Operand) -> Value:
        return self._binary("Mul", self, other)

    def __truediv__(self, other: Operand) -> Value:
        return self._binary("Div", self, other)

    def __neg__(self) -> Value:
        return self._unary("Neg")

    def __matmul__(self, other: Value) -> Value:
        from graphopt.ir import ops

        return self.builder.emit(ops.Matmul(self, other))

    def _unary(self, name: str) -> Value:
        from graphopt.ir import ops

        return self.builder.emit(getattr(ops, name)(self))

    def rsqrt(self) -> Value:
        return self._unary("Rsqrt")

    def reshape(self, *shape: int) -> Value:
        from graphopt.ir import ops

        if same_shape(shape, self.shape):
            return self
        return self.builder.emit(ops.Reshape(self, tuple(shape)))

    def expand(self, *shape: int) -> Value:
        from graphopt.ir import ops

        return self.builder.emit(ops.Expand(self, tuple(shape)))

    def permute(self, *dims: int) -> Value:
        from graphopt.ir import ops

        return self.builder.emit(ops.Permute(self, tuple(dims)))

    def sum(self, dims: Sequence[int], keepdim: bool = False) -> Value:
        from graphopt.ir import ops

        if not dims:
            return self
        return self.builder.emit(ops.Sum(self, tuple(dims), keepdim))

    def narrow(self, dim: int, start: int, length: int) -> Value:
        from graphopt.ir import ops

        if start == 0 and same(self.shape[dim], length):
            return self
        return self.builder.emit(ops.Slice(self, dim, start, start + length))

    def to(self, dtype: torch.dtype) -> Value:
        from graphopt.ir import ops

        return self if dtype == self.dtype else self.builder.emit(ops.Cast(self, dtype))
