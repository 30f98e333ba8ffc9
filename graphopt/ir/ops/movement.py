"""Data movement: every output element is an input element (or a constant)."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.ir.ops.base import Call, Multilinear, Op, op, overload
from graphopt.ir.value import Value


def _dim(dim: int, ndim: int) -> int:
    return dim + ndim if dim < 0 else dim


@op("reshape.default", "view.default", "_unsafe_view.default", "flatten.using_ints",
    "unflatten.int", "unsqueeze.default", "squeeze.default", "squeeze.dim", "squeeze.dims",
    "view_as.default", "reshape_as.default")  # fmt: skip
class Reshape(Multilinear, Op):
    """The same elements in the same order under another `shape`; covers view, flatten, unflatten,
    squeeze and unsqueeze. An entry of `shape` is an int (at most one -1) or a symbolic size."""

    input: Value
    shape: tuple[Any, ...]

    @classmethod
    def parse(cls, call: Call) -> Op | None:
        if "size" in call.arguments:
            shape = call["size"]
        elif "shape" in call.arguments:
            shape = call["shape"]
        else:
            shape = call.out.shape
        return cls(call["self"], tuple(shape), out=call.out)

    def build(self) -> tuple[Any, dict[str, Any]]:
        known = [size if isinstance(size, (int, Value)) else -1 for size in self.shape]
        if known.count(-1) > 1:
            raise ValueError(f"cannot write a reshape with {known.count(-1)} unknown sizes")
        return overload("reshape.default"), {"self": self.input, "shape": known}


@op("permute.default", "transpose.int", "t.default", "numpy_T.default", "mT.default",
    "swapaxes.default", "swapdims.default", "movedim.int", "movedim.intlist")  # fmt: skip
class Permute(Multilinear, Op):
    """Axes reordered: output axis i is input axis `dims[i]`; covers transpose, t, mT, movedim."""

    input: Value
    dims: tuple[int, ...]

    @classmethod
    def parse(cls, call: Call) -> Op | None:
        value = call["self"]
        ndim = value.ndim
        order = list(range(ndim))
        name = call.target._schema.name
        if "dims" in call.arguments:
            dims = tuple(_dim(dim, ndim) for dim in call["dims"])
        elif name in ("aten::movedim",):
            source, target = call["source"], call["destination"]
            source = (source,) if isinstance(source, int) else source
            target = (target,) if isinstance(target, int) else target
            source = [_dim(dim, ndim) for dim in source]
            places = dict(zip((_dim(dim, ndim) for dim in target), source, strict=True))
            rest = iter(dim for dim in order if dim not in source)
            dims = tuple(places[i] if i in places else next(rest) for i in order)
        elif name == "aten::numpy_T":
            dims = tuple(reversed(order))
        else:
            pair = (-1, -2)
            if name in ("aten::transpose", "aten::swapdims"):
                pair = (call["dim0"], call["dim1"])
            elif name == "aten::swapaxes":
                pair = (call["axis0"], call["axis1"])
            if ndim >= 2:
                a, b = (_dim(dim, ndim) for dim in pair)
                order[a], order[b] = order[b], order[a]
            dims = tuple(order)
        return cls(value, dims, out=call.out)

    def build(self) -> tuple[Any, dict[str, Any]]:
        return overload("permute.default"), {"self": self.input, "dims": list(self.dims)}


@op("expand.default", "expand_as.default", "broadcast_to.default")
class Expand(Multilinear, Op):
    """Axes of size 1 repeated to `shape`, without copying; -1 keeps a size."""

    input: Value
    shape: tuple[Any, ...]

    @classmethod
    def parse(cls, call: Call) -> Op | None:
        shape = call["size"] if "size" in call.arguments else call.out.shape
        return cls(call["self"], tuple(shape), out=call.out)

    def build(self) -> tuple[Any, dict[str, Any]]:
        return overload("expand.default"), {"self": self.input, "size": list(self.shape)}


@op("repeat_interleave.self_int")
class RepeatInterleave(Multilinear, Op):
    """Every entry along `dim` repeated `repeats` times in place."""

    input: Value
    repeats: int
    dim: int | None = None
    output_size: int | None = None


@op("repeat.default")
class Repeat(Multilinear, Op):
    """The whole tensor tiled `repeats[i]` times along axis i."""

    input: Value
    repeats: tuple[int, ...]


@op("slice.Tensor", "narrow.default")
class Slice(Multilinear, Op):
    """Entries `start, start + step, ... < end` along `dim`, bounds clamped as in Python."""

    input: Value
    dim: int = 0
    start: int | None = None
    end: int | None = None
    step: int = 1

    @classmethod
    def parse(cls, call: Call) -> Op | None:
        value, dim = call["self"], _dim(call["dim"], call["self"].ndim)
        if "length" in call.arguments:
            start, length = call["start"], call["length"]
            if not isinstance(start, int) or not isinstance(length, int) or start < 0:
                return None
            return cls(value, dim, start, start + length, 1, out=call.out)
        return cls(value, dim, call["start"], call["end"], call["step"], out=call.out)


@op("select.int")
class Select(Multilinear, Op):
    """Entry `index` along `dim`, the axis removed."""

    input: Value
    dim: int
    index: int


@op("split.Tensor", "split_with_sizes.default", "split.sizes", "chunk.default")
class Split(Multilinear, Op):
    """A list of consecutive pieces along `dim`; `split` is a size, a list of sizes, or (from
    chunk) the sizes it comes to."""

    input: Value
    split: Any
    dim: int = 0

    @classmethod
    def parse(cls, call: Call) -> Op | None:
        for name in ("split_size", "split_sizes"):
            if name in call.arguments:
                return cls(call["self"], call[name], call["dim"], out=call.out)
        dim = call["dim"]
        return cls(call["self"], tuple(one.shape[dim] for one in call.out.meta), dim, out=call.out)

    def build(self) -> tuple[Any, dict[str, Any]]:
        if isinstance(self.split, tuple):
            target = overload("split_with_sizes.default")
            return target, {"self": self.input, "split_sizes": list(self.split), "dim": self.dim}
        return overload("split.Tensor"), {
            "self": self.input, "split_size": self.split, "dim": self.dim,
        }  # fmt: skip


@op("cat.default", "concat.default", "concatenate.default")
class Cat(Multilinear, Op):
    """Tensors joined along `dim`."""

    tensors: tuple[Value, ...]
    dim: int = 0

    @classmethod
    def parse(cls, call: Call) -> Op | None:
        return cls(call["tensors"], _dim(call["dim"], call.out.ndim), out=call.out)


@op("stack.default")
class Stack(Multilinear, Op):
    """Tensors joined along a new axis `dim`."""

    tensors: tuple[Value, ...]
    dim: int = 0


@op("pad.default", "constant_pad_nd.default")
class Pad(Op):
    """Borders added; `pad` lists (before, after) from the last axis on. `mode` is constant (with
    `value`, None for 0), reflect, replicate or circular."""

    input: Value
    pad: tuple[int, ...]
    mode: str = "constant"
    value: float | None = None

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        return run(magnitude).abs()

    @property
    def axes(self) -> frozenset[int]:
        """The axes that grow or shrink."""
        last = self.input.ndim - 1
        return frozenset(last - i // 2 for i, amount in enumerate(self.pad) if amount != 0)


@op("pixel_shuffle.default")
class PixelShuffle(Multilinear, Op):
    """`[*, C r^2, H, W] -> [*, C, H r, W r]`."""

    input: Value
    upscale_factor: int


@op("pixel_unshuffle.default")
class PixelUnshuffle(Multilinear, Op):
    """`[*, C, H r, W r] -> [*, C r^2, H, W]`."""

    input: Value
    downscale_factor: int


@op("channel_shuffle.default")
class ChannelShuffle(Multilinear, Op):
    """Channels of axis 1 interleaved over `groups`."""

    input: Value
    groups: int


@op("roll.default")
class Roll(Multilinear, Op):
    """Entries rotated by `shifts` along `dims`."""

    input: Value
    shifts: tuple[int, ...]
    dims: tuple[int, ...] = ()


@op("flip.default")
class Flip(Multilinear, Op):
    """Axes `dims` reversed."""

    input: Value
    dims: tuple[int, ...]


@op("index_select.default")
class IndexSelect(Multilinear, Op):
    """Entries `index` along `dim`."""

    input: Value
    dim: int
    index: Value


@op("gather.default")
class Gather(Multilinear, Op):
    """Entries picked along `dim` by an index tensor."""

    input: Value
    dim: int
    index: Value
    sparse_grad: bool = False


@op("index.Tensor")
class Index(Multilinear, Op):
    """Entries picked along `dim` by a tensor of integers, whose axes take the place of that one."""

    input: Value
    dim: int
    index: Value

    @classmethod
    def parse(cls, call: Call) -> Op | None:
        given = [(dim, one) for dim, one in enumerate(call["indices"]) if one is not None]
        if len(given) != 1 or given[0][1].dtype in (torch.bool, torch.uint8):
            return None
        return cls(call["self"], *given[0], out=call.out)

    def build(self) -> tuple[Any, dict[str, Any]]:
        indices = [None] * self.dim + [self.index]
        return overload("index.Tensor"), {"self": self.input, "indices": indices}
