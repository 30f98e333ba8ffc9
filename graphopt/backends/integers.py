"""oneDNN's kernels for bytes in place of maps between rounding and its inverse.

    quantize(relu(conv(dequantize(x), dequantize(w)) + b + dequantize(y)))      one call, bytes to bytes

The graph says in float32 what is computed (see `graphopt.passes.quantizing`); the kernels add products of
bytes in int32, exactly, and round where the graph does. A value that is needed in float32 too is written so.
Rounding that no map does is one pass over memory, max pooling and reshapes between bytes are of bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from graphopt.backends.calls import arguments, spread

aten = torch.ops.aten
QUANTIZE = "quantized_decomposed::quantize_per_tensor"
DEQUANTIZE = "quantized_decomposed::dequantize_per_tensor"
CHANNELS = "quantized_decomposed::dequantize_per_channel"
MONOTONE = {"aten::max_pool2d", "aten::view", "aten::_unsafe_view", "aten::reshape", "aten::flatten",
            "aten::permute", "aten::transpose", "aten::t", "aten::squeeze", "aten::unsqueeze"}  # fmt: skip
BEHIND_CONV = ("relu", "hardtanh", "hardswish", "swish")
BEHIND_LINEAR = (*BEHIND_CONV, "leaky_relu", "tanh", "gelu")
BEHIND_SUM = ("relu",)
NONE = "none"


class Rounded(NamedTuple):
    """Bytes and what they stand for: `(q - zero) scale`."""

    codes: fx.Node
    scale: float
    zero: int


class Weight(NamedTuple):
    codes: Tensor
    scale: Tensor
    zeros: Tensor
    names: list[str]


class Integers:
    """Rewrites the maps on integers of one program in place."""

    def __init__(
        self, program: fx.GraphModule, kinds: dict[fx.Node, Any], state: Callable[[str], Tensor],
        unary: Callable[[fx.Node], Any],
    ) -> None:  # fmt: skip
        self.program, self.graph, self.kinds = program, program.graph, kinds
        self.state, self.unary = state, unary
        self.names: list[str] = []  # of the states that are packed
        self._own: set[fx.Node] = set()  # bytes that are in no other tensor

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node._erased or node.op != "call_function":
                continue
            if name_of(node) == "aten::conv2d":
                self._map(node, convolution=True)
            elif name_of(node) == "aten::linear":
                self._map(node, convolution=False)
        for node in list(self.graph.nodes):
            if not node._erased and name_of(node) == QUANTIZE:
                self._round(node)
        self.graph.eliminate_dead_code()

    # -- reading the graph ------------------------------------------------------------------------

    def rounded(self, node: Any) -> Rounded | None:
        """What a value is the dequantization of, from a byte."""
        if not isinstance(node, fx.Node) or name_of(node) != DEQUANTIZE:
            return None
        codes, scale, zero, low, high, dtype = node.args[:6]
        fits = (low, high, dtype) == (0, 255, torch.uint8) and not node.kwargs
        return Rounded(codes, scale, zero) if fits else None  # type: ignore[arg-type]

    def rounding(self, node: fx.Node) -> Rounded | None:
        """The bytes that a call makes of its input."""
        if name_of(node) != QUANTIZE:
            return None
        _, scale, zero, low, high, dtype = node.args
        fits = (low, high, dtype) == (0, 255, torch.uint8)
        return Rounded(node, scale, zero) if fits else None  # type: ignore[arg-type]

    def weight(self, node: Any) -> Weight | None:
        if not isinstance(node, fx.Node) or name_of(node) != CHANNELS or node.kwargs:
            return None
        *stored, axis, _, _, dtype = node.args
        if axis != 0 or dtype != torch.int8:
            return None
        if not all(isinstance(one, fx.Node) and one.op == "get_attr" for one in stored):
            return None
        names = [str(one.target) for one in stored]  # type: ignore[union-attr]
        codes, scale, zeros = (self.state(one).detach() for one in names)
        fits = codes.is_cpu and codes.dtype == torch.int8 and not bool(zeros.any())
        return Weight(codes, scale.float(), zeros, names) if fits else None

    # -- maps ---------------------------------------------------------------------------------------

    def _map(self, node: fx.Node, convolution: bool) -> None:
        """One map, with what follows it, as one call."""
        given = arguments(node)
        source, weight = self.rounded(given["input"]), self.weight(given["weight"])
        if source is None or weight is None or given["input"] not in self.kinds:
            return
        shape, groups = self.kinds[given["input"]][0], given.get("groups", 1)
        if 0 in shape or (convolution and (len(shape) != 4 or isinstance(given["padding"], str))):
            return
        where: list[Any] = []
        if convolution:
            where = [spread(given[one], 2) for one in ("stride", "padding", "dilation")]
            packed = torch.ops.onednn.qconv_prepack(
                weight.codes, weight.scale, source.scale, source.zero, *where, groups, list(shape)
            )
            where.append(groups)
        else:
            rows = [shape[:-1].numel(), shape[-1]]
            packed = torch.ops.onednn.qlinear_prepack(weight.codes, rows)
        last, other = self._sum(node) if convolution else (node, None)
        alone = BEHIND_CONV if convolution else BEHIND_LINEAR
        last, activation = self._activation(last, alone if other is None else BEHIND_SUM)
        users = list(last.users)
        codes = self.rounding(users[0]) if len(users) == 1 else None
        if other is not None and codes is None:  # written as float32: the sum stays as it is
            other = None
            last, activation = self._activation(node, alone)
        end = codes.codes if codes is not None else last
        with self.graph.inserting_before(end):
            held = self._kept(packed, weight)
            written: tuple[Any, ...] = (
                (codes.scale, codes.zero, torch.uint8) if codes is not None
                else (1.0, 0, torch.float32)
            )  # fmt: skip
            start: tuple[Any, ...] = (source.codes, source.scale, source.zero, *held)
            if other is not None:
                onto = other.codes
                if not self._ours_alone(onto, end):
                    onto = self.graph.call_function(
                        aten.clone.default, (onto,), {"memory_format": torch.channels_last}
                    )
                new = self.graph.call_function(
                    torch.ops.onednn.qconv2d_pointwise.binary,
                    (*start, onto, given["bias"], *where, *written, other.scale, other.zero,
                     "sum", 1.0, *activation),
                )  # fmt: skip
            elif convolution:
                new = self.graph.call_function(
                    torch.ops.onednn.qconv_pointwise.default,
                    (*start, given["bias"], *where, *written, *activation),
                )
            else:
                new = self.graph.call_function(
                    torch.ops.onednn.qlinear_pointwise.default,
                    (*start, given["bias"], *written, *activation),
                )
        if codes is not None:
            self._own.add(new)
        if end in self.kinds:
            self.kinds[new] = self.kinds[end]
        end.replace_all_uses_with(new)
        self.graph.eliminate_dead_code()

    def _sum(self, node: fx.Node) -> tuple[fx.Node, Rounded | None]:
        """The sum of a map and of what bytes stand for, and these; or the map itself."""
        user = only_user(node)
        if user is None or name_of(user) != "aten::add" or len(user.args) != 2 or user.kwargs:
            return node, None
        found = user.args[1] if user.args[0] is node else user.args[0]
        if not isinstance(found, fx.Node) or found is node:
            return node, None
        other = self.rounded(found)
        known = found in self.kinds and node in self.kinds
        alike = known and self.kinds[found][:2] == self.kinds[node][:2]
        return (user, other) if other is not None and alike and other.codes < node else (node, None)

    def _activation(self, last: fx.Node, known: tuple[str, ...]) -> tuple[fx.Node, tuple[Any, ...]]:
        user = only_user(last)
        found = None if user is None else self.unary(user)
        if user is None or found is None or found.name not in known:
            return last, (NONE, [], "")
        return user, (found.name, list(found.scalars), found.algorithm)

    def _ours_alone(self, codes: fx.Node, end: fx.Node) -> bool:
        """Whether bytes may be overwritten: they are a map's own, and nobody reads them later."""
        readers = [
            later for one in codes.users
            for later in (one.users if name_of(one) == DEQUANTIZE else (one,))
        ]  # fmt: skip
        return codes in self._own and all(
            one < end and name_of(one) not in MONOTONE for one in readers
        )

    def _kept(self, packed: Tensor, weight: Weight) -> list[fx.Node]:
        names = [f"{one}_{len(self.names)}" for one in ("_packed_bytes", "_scales", "_zeros")]
        for name, tensor in zip(names, (packed, weight.scale, weight.zeros), strict=True):
            setattr(self.program, name, tensor)
        self.names += weight.names
        return [self.graph.create_node("get_attr", name) for name in names]

    # -- what is between them -----------------------------------------------------------------------

    def _round(self, node: fx.Node) -> None:
        """Rounding of what only moves bytes is no rounding; any other is one pass over memory."""
        made = self.rounding(node)
        source = node.args[0]
        if made is None or not isinstance(source, fx.Node):
            return
        moved = source
        before = self.rounded(moved.args[0]) if name_of(moved) in MONOTONE else None
        if before is not None and (before.scale, before.zero) == (made.scale, made.zero):
            with self.graph.inserting_before(node):
                new = self._moved(moved, before.codes)
        elif self.kinds.get(source, (None, None))[1] == torch.float32:
            with self.graph.inserting_before(node):
                new = self.graph.call_function(aten.mul.Tensor, (source, 1.0 / made.scale))
                for then, *numbers in (
                    (aten.round_.default,), (aten.add_.Tensor, made.zero),
                    (aten.clamp_.default, 0, 255), (aten.to.dtype, torch.uint8),
                ):  # fmt: skip
                    new = self.graph.call_function(then, (new, *numbers))
        else:
            return
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)

    def _moved(self, moved: fx.Node, codes: fx.Node) -> fx.Node:
        """A move of bytes in place of one of numbers."""
        if name_of(moved) != "aten::max_pool2d":
            return self.graph.call_function(moved.target, (codes, *moved.args[1:]), moved.kwargs)  # type: ignore[arg-type]
        given = arguments(moved)
        sizes = {one: spread(given[one], 2) for one in ("kernel_size", "padding", "dilation")}
        stride = spread(given["stride"], 2) if given["stride"] else sizes["kernel_size"]
        return self.graph.call_function(
            torch.ops.quantized.max_pool2d.default,
            (codes, sizes["kernel_size"], stride, sizes["padding"], sizes["dilation"],
             bool(given["ceil_mode"])),
        )  # fmt: skip


def name_of(node: fx.Node) -> str:
    return str(node.target._schema.name) if hasattr(node.target, "_schema") else ""


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
