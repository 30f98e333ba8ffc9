"""Regions that are one affine map of every token become one linear map.

    f(x)       =    W x + b,    b = f(0),    W e_i = f(e_i) - b
    f(x)       =    conv1x1(x; W, b)    where x has its channels in front of its pixels
    f(E[i])    =    f(E)[i]

for any f made of ops that are affine in x and treat tokens alone, whatever it looks like: rotations of
blocks, circulant products by Fourier transforms, permutations, sums over groups. The same of what is
looked up in tables by the same integers. What such a region is, and how W is computed from parameters
alone, is in `graphopt.ir.linearity`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from graphopt.ir import ops
from graphopt.ir.affine import same
from graphopt.ir.builder import Builder
from graphopt.ir.contracts import Exact
from graphopt.ir.driver import Session
from graphopt.ir.linearity import Region, obstacle, starts
from graphopt.ir.respell import respelled
from graphopt.ir.rewrite import Declined, Rewriter, describe, rewrite
from graphopt.ir.tokens import AFFINE, pixelwise
from graphopt.ir.value import Value
from graphopt.passes.base import RewritePass

BRANCH = 4  # convolutions in a branch
# A region without any of these, the mean of a norm for example, is better left as it is.
MATRICES = (ops.Linear, ops.Matmul, ops.Addmm, ops.Einsum, ops.Embedding, ops.Conv)


@rewrite(
    root=AFFINE,
    unproved="a region may be made of any affine ops; tests of each op, of random regions and the "
    "validation of every site check it",
)
def merge_region(end: ops.Op, rw: Rewriter) -> Value:
    """f(x) = W x + b for an affine f of tokens."""
    rw.match(end.out.is_tensor and not end.out.is_constant and end.out.dtype.is_floating_point)
    rw.match(not isinstance(end, ops.Conv) or pixelwise(end))
    beside, refusal = _beside(end), None
    best: tuple[float, Value, Layout] | None = None
    for start in starts(rw, end.out):
        for layout in _layouts(rw, end, start):
            try:
                saved, _ = _merged(rw, end, start, layout)
                if best is None or saved > best[0]:
                    best = saved, start, layout
            except Declined as declined:
                if beside is not None and start == beside[0]:
                    refusal = declined
            rw.rollback()
    if best is not None:
        return _merged(rw, end, *best[1:])[1]
    if refusal is not None:
        raise refusal
    if (frame := _framed_otherwise(end)) is not None:
        rw.decline(
            f"{describe(frame.out)} continues the border that the other branch pads with zeros"
        )
    blocked = None if beside is None else obstacle(rw, beside[1], beside[0])
    rw.require(blocked is None, f"{describe(blocked)} is not affine")
    rw.decline("it is no affine map of one value", near=False)


class Layout(NamedTuple):
    """The last axes that make a token, or that it is the channels of a pixel."""

    inside: int = 1
    channels: bool = False


def _layouts(rw: Rewriter, end: ops.Op, start: Value) -> Iterator[Layout]:
    """How the tokens of a start may lie."""
    yield Layout()
    if _joins_heads(rw, start):
        yield Layout(2)
    pixels = [end, *(one.op for one in _terms(end) if isinstance(one, Value))]
    if 2 < start.ndim == end.out.ndim and any(
        isinstance(one, ops.Conv) and pixelwise(one) for one in pixels
    ):
        yield Layout(1, channels=True)


def _terms(end: ops.Op) -> tuple[Any, ...]:
    return (end.left, end.right) if isinstance(end, (ops.Add, ops.Sub)) else ()


def _beside(end: ops.Op) -> tuple[Value, Value] | None:
    """What a linear map or a table reads, and what is added: the user expects one of the two."""
    if isinstance(end, (ops.Add, ops.Sub)):
        for one, other in ((end.left, end.right), (end.right, end.left)):
            op = one.op if isinstance(one, Value) else None
            if isinstance(op, (ops.Linear, ops.Embedding)) and isinstance(other, Value):
                return op.input if isinstance(op, ops.Linear) else op.indices, other
    return None


def _joins_heads(rw: Rewriter, start: Value) -> bool:
    """Whether a reshape makes one axis of the last two."""
    return any(
        same(one.out.shape[-1], start.shape[-2] * start.shape[-1])
        for one in rw.readers(start, ops.Reshape)
        if start.ndim > 2 and one.out.ndim and all(isinstance(n, int) for n in start.shape[-2:])
    )


def _framed_otherwise(end: ops.Op) -> ops.Pad | None:
    """What reflects or repeats the border in front of a convolution, beside which stands another one of
    the same image."""
    if isinstance(end, (ops.Add, ops.Sub)):
        for one, other in ((end.left, end.right), (end.right, end.left)):
            conv = one.op if isinstance(one, Value) else None
            pad = conv.input.op if isinstance(conv, ops.Conv) else None
            if isinstance(pad, ops.Pad) and pad.mode != "constant":
                for _ in range(BRANCH):
                    op = other.op if isinstance(other, Value) else None
                    if not isinstance(op, ops.Conv):
                        break
                    if op.input == pad.input:
                        return pad
                    other = op.input
    return None


def _merged(rw: Rewriter, end: ops.Op, start: Value, layout: Layout) -> tuple[float, Value]:
    """The region from `start` to `end` as one map, and the seconds that saves."""
    looks_up = start.dtype in (torch.int64, torch.int32)
    rw.match(looks_up or start.dtype == end.out.dtype)
    rw.match(not (looks_up and layout.channels))
    region = Region(rw, start, *layout)
    region.labels(end.out)
    rw.match(len(region.steps) > 1)
    rw.match(any(isinstance(step.op, MATRICES) for step in region.steps.values()))
    _exact(rw, region, end.out.dtype)
    if looks_up:
        tables = [one for one in gone(rw, end, region) if isinstance(one, ops.Embedding)]
        rw.match(end.out.shape[-1] <= sum(one.out.shape[-1] for one in tables))  # no larger table
        merged = rw.emit(ops.Embedding(region.table(end.out), start), like=end)
    elif layout.channels:
        weight, bias = region.affine(end.out)
        conv = next(one.op for one in region.steps.values() if isinstance(one.op, ops.Conv))
        weight = weight.reshape(*weight.shape, *(1,) * (start.ndim - 2))
        merged = rw.emit(conv.replace(input=start, weight=weight, bias=bias, groups=1), like=end)
    else:
        weight, bias = region.affine(end.out)
        merged = rw.emit(ops.Linear(region.input(), weight, bias), like=end)
    replaced = gone(rw, end, region)
    rw.match(layout.inside == 1 or len(replaced) > 2)  # the start needs a reshape
    return rw.pays(replaced, merged), merged


def _exact(rw: Rewriter, region: Region, dtype: torch.dtype) -> None:
    """No value on the way may be rounded more than what goes in and comes out."""
    for step in region.steps.values():
        found = step.op.out.dtype
        real = found.to_real() if found.is_complex else found
        rw.require(
            torch.promote_types(real, dtype) == real,
            f"{describe(step.op.out)} rounds {dtype} to {found}",
        )


def gone(rw: Rewriter, end: ops.Op, region: Region) -> list[ops.Op]:
    """The ops of a region that nobody reads any more once its end is replaced."""
    found = {end.out.node}
    for node, step in reversed(list(region.steps.items())):
        if node not in found and set(step.op.out.users) <= found:
            found.add(node)
    return [step.op for node, step in region.steps.items() if node in found]


@dataclasses.dataclass(frozen=True)
class MergeRegions(RewritePass):
    """What is one affine map of every token, whatever it is made of, becomes one linear map."""

    name = "merge-regions"
    rewrites = (merge_region,)

    def run(self, session: Session) -> None:
        for node in session.graph.calls:
            if (new := respelled(builder := Builder(session.graph, node), node)) is not None:
                session.replace("respell", Exact(), node, new.node, builder.made)
        # From the last op on: what stands in front of a matrix goes into it in one step.
        session.run(self.rewrites, last_first=True)
