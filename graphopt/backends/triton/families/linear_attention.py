"""Attention without softmax: products of three matrices, where the order is a choice.

    y  =  g(num, den),    num = phi(q) (psi(k)^T v),    den = phi(q) sum_n psi(k_n)

phi and psi are any pointwise maps of one operand (relu, elu + 1, exp, ..), g whatever pointwise formula
normalizes: num / (den + eps). With queries q `[m, d]`, keys k `[n, d]` and values v `[n, c]` of a head:

    q (k^T v)    2 d c (n + m) operations     two kernels: sums over the keys, then the queries
    (q k^T) v    2 n m (d + c) operations     one kernel, for short sequences

whichever is less is generated, whatever the order in the source. The maps are applied to tiles as they
are loaded, the normalizer to the accumulator: nothing of the size of q, k, v or m n is stored between.
The sums over the keys are accumulated in float32 by parts of the sequence that fill the device, and
added in one order: results do not depend on timing. SLAB (arXiv 2405.11582), arXiv 2006.16236.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from graphopt.backends.triton import interpreting
from graphopt.backends.triton.families import formulas
from graphopt.backends.triton.families.attention_graph import Attention, attentions
from graphopt.backends.triton.families.attention_kernels import Tiles, attend, order, printed, reach
from graphopt.backends.triton.families.common import (
    Found,
    bytes_of,
    expression,
    sizes_for,
    tensor,
    unit,
)  # fmt: skip
from graphopt.backends.triton.families.strided import REACH
from graphopt.backends.triton.ptx import Unit, pointer
from graphopt.backends.triton.region import Launcher, Outside, Region
from graphopt.ir.ops.base import hint

LARGEST = 256  # channels of a head that a tile holds


@dataclasses.dataclass(eq=False)
class LinearAttention(Region):
    """A region of kind "linear attention"; `parts` holds what was matched."""

    parts: Attention

    @property
    def sizes_of_heads(self) -> tuple[Any, Any, Any, int, int]:
        """(heads of all batches, m, n, d, c)."""
        q, k, v = (tensor(one.node) for one in (self.parts.q, self.parts.k, self.parts.v))
        pairs = sympy.prod([expression(size) for size in q.shape[:-2]])
        return pairs, expression(q.shape[-2]), expression(k.shape[-2]), q.shape[-1], v.shape[-1]

    @property
    def summed(self) -> bool:
        """Whether q (k^T v) is the cheaper order, for sizes as in the traced call."""
        q, k = tensor(self.parts.q.node), tensor(self.parts.k.node)
        m, n, d, c = hint(q.shape[-2]), hint(k.shape[-2]), q.shape[-1], self.sizes_of_heads[4]
        return order(m, n, d, c)

    @property
    def source(self) -> str:
        return self.printed(self.summed)

    def printed(self, summed: bool, interpreted: bool | None = None) -> str:
        """The kernels for one of the two orders."""
        interpreted = interpreting() if interpreted is None else interpreted
        title = f"For {', '.join(self.origins) or 'the graph'}."
        return printed(self.parts, self.name, title, summed, interpreted)

    def launcher(self) -> Launcher:
        parts = self.parts
        views = [one.view(self.inputs, self.sizes) for one in (parts.q, parts.k, parts.v)]
        sources = {summed: self.printed(summed) for summed in (False, True)}

        dtype = tensor(self.outputs[0]).dtype

        def launch(*args: Any) -> tuple[Tensor, ...]:
            q, k, v = (view(*args) for view in views)
            if max(map(reach, (q, k, v))) >= REACH:
                return self.reference(*args)  # type: ignore[no-any-return]
            summed = order(q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1])
            return (attend(sources[summed], self.name, summed, q, k, v, dtype),)

        return launch

    def units(self) -> list[Unit]:
        q, k, v = (tensor(one.node) for one in (self.parts.q, self.parts.k, self.parts.v))
        d, c = q.shape[-1], v.shape[-1]
        tiles = Tiles.of(hint(q.shape[-2]), hint(k.shape[-2]), d, c, v.dtype)
        pointers = {f"{name}_ptr": pointer(tensor(one.raw).dtype) for name, one in
                    zip("qkv", (self.parts.q, self.parts.k, self.parts.v), strict=True)}  # fmt: skip
        pointers |= {"s_ptr": "*fp32", "z_ptr": "*fp32"}
        pointers["y_ptr"] = pointer(tensor(self.outputs[0]).dtype)
        blocks = {"D": d, "C": c, "M": tiles.m, "N": tiles.n, "STEP_D": tiles.step_d,
                  "WIDE_D": tiles.wide_d, "WIDE_C": tiles.wide_c}  # fmt: skip
        names = [f"{self.name}_summary"] * self.summed + [self.name]
        source = self.printed(self.summed, interpreted=False)
        return [unit(source, name, pointers, blocks) for name in names]

    def work(self) -> tuple[sympy.Expr, sympy.Expr]:
        pairs, m, n, d, c = self.sizes_of_heads
        products = 2 * d * c * (n + m) if self.summed else 2 * n * m * (d + c)
        maps = d * (m * formulas.flops(self.parts.q.map) + n * formulas.flops(self.parts.k.map))
        maps += n * c * formulas.flops(self.parts.v.map)
        ends = m * (2 * d + c * formulas.flops(self.parts.normalizer))
        return bytes_of([*self.inputs, *self.outputs]), pairs * (products + maps + ends)


def match(graph: fx.Graph) -> Found:
    """Every product of three matrices, with its maps and its normalizer, in a graph."""
    found = Found([], [])
    taken: set[fx.Node] = set()
    for node, parts in attentions(graph, found.reasons):
        if taken & parts.nodes:
            continue
        position = {one: i for i, one in enumerate(graph.nodes)}
        region = LinearAttention(
            f"linear_attention_{node.name.lstrip('_')}", "linear attention",
            tuple(sorted(parts.nodes, key=position.__getitem__)),
            tuple(dict.fromkeys(one.raw for one in (parts.q, parts.k, parts.v))), (parts.last,),
            (), parts,
        )  # fmt: skip
        region.sizes = sizes_for([*region.inputs, *region.nodes])
        try:
            _require(region)
            _ = region.source, region.reference
        except (Outside, KeyError) as reason:
            found.reasons.append((node, str(reason)))
            continue
        taken |= parts.nodes
        found.regions.append(region)
    return found


def _require(region: LinearAttention) -> None:
    parts = region.parts
    for one in (parts.q, parts.k, parts.v):
        value = tensor(one.node)
        if value.ndim > 4:
            raise Outside(
                f"{one.node.name}: expected at most two batch axes, found {value.ndim - 2}"
            )
        if not isinstance(value.shape[-1], int) or value.shape[-1] > LARGEST:
            raise Outside(f"{one.node.name}: expected at most {LARGEST} channels of a head")
        if value.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise Outside(f"{one.node.name}: products of {value.dtype} are the framework's")
