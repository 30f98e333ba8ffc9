"""What the families share: reading fake tensors, sizes as expressions, kernels from source."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import sympy
import torch
from torch import fx

from graphopt.backends.triton import interpreting, scalars
from graphopt.backends.triton.ptx import Unit
from graphopt.backends.triton.region import Region, size_of
from graphopt.ir.ops.base import hint

HEADER = """import triton
import triton.language as tl

from graphopt.backends.triton import device


"""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclasses.dataclass
class Found:
    """What a family finds in a graph: its regions, and near misses with the reason for each."""

    regions: list[Region]
    reasons: list[tuple[fx.Node, str]]


def tensor(node: fx.Node) -> torch.Tensor:
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor), f"{node.name}: expected a tensor, found {value}"
    return value


def example(node: fx.Node) -> torch.Tensor:
    """A tensor without data, as large as in the traced call and with its strides."""
    value = tensor(node)
    sizes, strides = (tuple(map(hint, one)) for one in (value.shape, value.stride()))
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device="meta")


def is_pointwise(node: fx.Node) -> bool:
    """Whether each element of the result depends on the elements at its place alone."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    return node.target in scalars.TABLE or torch.Tag.pointwise in getattr(node.target, "tags", ())


def expression(size: Any) -> sympy.Expr:
    """A size, fixed or dynamic, as an expression."""
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def numel(value: torch.Tensor) -> sympy.Expr:
    return sympy.prod([expression(size) for size in value.shape])


def bytes_of(nodes: Iterable[fx.Node]) -> sympy.Expr:
    """The bytes of tensors, each counted once."""
    return sum(
        (numel(tensor(one)) * tensor(one).element_size() for one in dict.fromkeys(nodes)),
        sympy.Integer(0),
    )


def sizes_for(nodes: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
    """The size nodes of every symbol in the shapes of some nodes, in graph order."""
    nodes = list(nodes)
    wanted: set[sympy.Symbol] = set()
    for node in nodes:
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, torch.Tensor) else ():
            wanted |= expression(size).free_symbols
    found: dict[sympy.Expr, fx.Node] = {}
    for node in nodes[0].graph.nodes if wanted else ():
        if node.meta.get("kind") == "size" and (symbol := size_of(node)) in wanted:
            found.setdefault(symbol, node)
    return tuple(found.values())


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power(number: int) -> int:
    """The least power of two that is not below a number."""
    return 1 << max(number - 1, 0).bit_length()


def dense(value: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its last axis is contiguous, else a contiguous copy."""
    return value if value.ndim == 0 or value.stride(-1) == 1 else value.contiguous()


def widened(dtype: torch.dtype, interpreted: bool) -> str:
    """What follows the load of an operand of `tl.dot`: the interpreter multiplies the bits of bfloat16."""
    return ".to(tl.float32)" if interpreted and dtype == torch.bfloat16 else ""


def unit(source: str, name: str, pointers: Mapping[str, str], blocks: Mapping[str, int]) -> Unit:
    """A kernel of a source to compile without a GPU: all its integers have 32 bits."""
    head = source.partition(f"def {name}(")[2].partition("):")[0]
    names = [one.partition(":")[0].strip() for one in head.split(",") if one.strip()]
    own = {one: blocks[one] for one in names if one in blocks}
    return Unit(
        name, source, {one: pointers.get(one, "i32") for one in names if one not in own}, own
    )


def block(count: int, size: int) -> int:
    """How many places a program instance takes: few instances where each of them is slow."""
    return min(power(count), 1 << 16) if interpreting() else size
