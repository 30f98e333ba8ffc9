"""Which ATen op is what: a view, pointwise, a reduction, a product, or the framework's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphopt.backends.triton import scalars

aten = torch.ops.aten

# The same elements in the same order under another shape.
RESHAPES = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim,
    aten.squeeze.dims,
}  # fmt: skip
VIEWS = RESHAPES | {
    aten.permute.default, aten.transpose.int, aten.t.default, aten.expand.default,
    aten.select.int, aten.slice.Tensor, aten.flip.default,
}  # fmt: skip
# Axes of an operand read at the positions that tensors hold.
LOOKUPS = {aten.embedding.default, aten.index_select.default, aten.index.Tensor}
# Pointwise, but not elementwise: an element comes from one of several places.
GATHERING = {aten.cat.default, aten.constant_pad_nd.default} | LOOKUPS
CREATION = {aten.full.default, aten.arange.start_step, aten.scalar_tensor.default}
REDUCTIONS = {
    aten.sum.dim_IntList: "sum", aten.mean.dim: "mean", aten.mean.default: "mean",
    aten.amax.default: "max", aten.amin.default: "min",
}  # fmt: skip
CONVOLUTIONS = {
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default,
}  # fmt: skip
PRODUCTS = CONVOLUTIONS | {
    aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default,
    aten.addmm.default, aten.baddbmm.default,
}  # fmt: skip
# The framework has kernels for these that no formula of small ops comes near.
WHOLE = PRODUCTS | {
    getattr(aten, name).default for name in (
        "scaled_dot_product_attention", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d",
        "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
        "adaptive_avg_pool3d", "adaptive_max_pool2d", "batch_norm", "instance_norm", "einsum",
        "embedding", "index_select", "cdist", "grid_sampler", "conv_transpose1d", "matrix_exp", "dropout")
} | {
    aten.conv_transpose2d.input, aten.conv_transpose3d.input, aten.lstm.input, aten.gru.input,
    aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec,
    aten.upsample_nearest1d.vec, aten.upsample_linear1d.vec, aten.index.Tensor,
    aten.one_hot.default, aten.all.dim, aten.all.default, aten.isin.Tensor_Tensor,
}  # fmt: skip
KEPT = VIEWS | GATHERING | CREATION | set(REDUCTIONS) | WHOLE | set(scalars.TABLE)

# `view` asks for strides that a generated kernel need not give.
SPELLED = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}


def _always(*args: Any, **kwargs: Any) -> bool:
    return True


def _idle(x: Any, p: float = 0.5, train: bool = False, *rest: Any) -> bool:
    return not train


def _no_cast(x: torch.Tensor, dtype: Any = None, device: Any = None, **rest: Any) -> bool:
    return dtype in (None, x.dtype) and (device is None or torch.device(device) == x.device)


# Ops that give their first argument back, as far as values go, and when they do.
SAME: dict[Any, Callable[..., bool]] = {
    **{op: _always for op in (
        aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default,
        aten.lift_fresh.default, aten.lift_fresh_copy.default)},
    aten.dropout.default: _idle, aten.feature_dropout.default: _idle,
    aten._to_copy.default: _no_cast,
}  # fmt: skip

DTYPES = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8,
    torch.int8, torch.int16, torch.int32, torch.int64,
}  # fmt: skip


def bind(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    found: dict[str, Any] = {}
    for position, one in enumerate(node.target._schema.arguments):
        if position < len(node.args):
            found[one.name] = node.args[position]
        else:
            found[one.name] = node.kwargs.get(one.name, one.default_value)
    return found


@dataclasses.dataclass(frozen=True)
class Lookup:
    """`source` with some axes replaced by the common shape of tensors of positions along them.

    Attributes:
        indices: the positions along each such axis, by axis.
        start, rank: where the common axes begin in the result, and how many they are.
        wraps: negative positions count from the end; otherwise torch refuses them.
    """

    source: fx.Node
    indices: dict[int, fx.Node]
    start: int
    rank: int
    wraps: bool


def lookup(node: fx.Node) -> Lookup | str:
    """What a node of `LOOKUPS` reads, or why that is none: a mask as an index."""
    given = bind(node)
    if node.target is aten.embedding.default:
        index = given["indices"]
        return Lookup(given["weight"], {0: index}, 0, index.meta["val"].ndim, False)
    source = given["self"]
    if node.target is aten.index_select.default:
        dim = given["dim"] % max(source.meta["val"].ndim, 1)
        if given["index"].meta["val"].ndim != 1:
            return "an index without an axis"
        return Lookup(source, {dim: given["index"]}, dim, 1, False)
    found = {dim: one for dim, one in enumerate(given["indices"]) if one is not None}
    if any(one.meta["val"].dtype not in (torch.int32, torch.int64) for one in found.values()):
        return "a mask as an index"
    dims = list(found)
    together = dims == list(range(dims[0], dims[0] + len(dims)))
    rank = max(one.meta["val"].ndim for one in found.values())
    return Lookup(source, found, dims[0] if together else 0, rank, True)


def classify(node: fx.Node, value: Any) -> tuple[str, str]:
    """The kind of a recorded call, and why it is external if a kernel might be expected."""
    target = node.target
    if target in VIEWS:
        return "view", ""
    if target in CREATION:
        return ("creation", "") if isinstance(value, torch.Tensor) else ("external", "")
    if target in PRODUCTS:
        return "product", ""
    kind = "reduction" if target in REDUCTIONS else ""
    if target in scalars.TABLE or target in GATHERING:
        kind = "pointwise"
    if not kind:
        return "external", f"no formula for {target}"
    return (kind, "") if not (why := unsupported(node, value)) else ("external", why)


def unsupported(node: fx.Node, value: Any) -> str:
    """Why Triton cannot compute an op that has a formula; empty if it can."""
    operands = [one.meta["val"] for one in node.all_input_nodes]
    found = [one for one in (*operands, value) if isinstance(one, torch.Tensor)]
    for one in found:
        if one.dtype not in DTYPES:
            return f"no kernels for {str(one.dtype).removeprefix('torch.')}"
        if any(isinstance(size, int) and size == 0 for size in one.shape):
            return "an empty tensor"
        if one.layout is not torch.strided:
            return f"no kernels for the layout {one.layout}"
    if node.target in LOOKUPS and isinstance(why := lookup(node), str):
        return why
    places = {one.device for one in found if one.ndim or one.device.type != "cpu"}
    if len(places) > 1:
        return f"operands on {', '.join(sorted(map(str, places)))}"
    entry = scalars.TABLE.get(node.target)
    return entry.refuses(bind(node), found) if entry is not None else ""


def fusible(node: fx.Node) -> bool:
    """Whether a node is a pointwise op or a reduction, in a kernel or not."""
    known = node.target in scalars.TABLE or node.target in GATHERING or node.target in REDUCTIONS
    return known and is_tensor(node)


def is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)
