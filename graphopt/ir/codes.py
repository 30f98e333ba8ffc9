"""Integer codes of weights: what decodes them, and other weights rounded to codes of the same form.

    W = b + step c,    low <= c <= high integers,    step proportional to an element of a state, the scale

The c are what some bits of one stored byte mean: an int8, one of two nibbles, or else. Whether an expression
of parameters is such a decoding is not read off its ops but measured: it is evaluated in float64 with single
bits set and with other scales, and what is written is read back.

A weight V, such as W with an adapter, is rounded to V' = b' + step' c' by the best, for each element of the
scale, of four: the old one, those that cover the range of V or 0.9 of it, and the one that fits the old
codes, which makes a scaled W exact. The error counts as a fraction of the effect of what was merged,
|V' - V| / |V - W| in the Frobenius norm: above 1, the base without its adapter is nearer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from graphopt.ir.graph import Graph
from graphopt.ir.interpret import Interpreter, lift

BYTES = (torch.int8, torch.uint8)
CLIPPED = 0.9  # of the range: few elements of a group are that large
EXACT = 1e-6  # relative; a step is 1e-3 at least, and integers are divided in float32


class NoCodes(Exception):
    """Why a weight cannot be rounded to codes."""


@dataclasses.dataclass(frozen=True)
class Rounded:
    """Integers `codes`, of the weight's shape, the scale that they are decoded with (None: as it is), and
    the error as a fraction of the effect."""

    codes: Tensor
    scale: Tensor | None
    error: float


class Decoder:
    """A parameter-only value in float64, as a function of the states that it is computed from."""

    def __init__(self, graph: Graph, node: fx.Node) -> None:
        self.graph, self.node = graph, node
        self._interpreter = Interpreter(graph, lifted=True, writes=False)
        cone, stack = {node}, [node]
        while stack:
            new = [one for one in stack.pop().all_input_nodes if one not in cone]
            cone.update(new)
            stack += new
        self._order = sorted(cone)
        self.states = {str(one.target) for one in cone if one.op == "get_attr"}

    @torch.no_grad()
    def __call__(self, given: Mapping[str, Tensor]) -> Tensor:
        """The value with other tensors in the place of some states."""
        values: dict[fx.Node, Tensor] = {}
        try:
            for one in self._order:
                values[one] = self._value(one, given, values)
        except RuntimeError as error:
            raise NoCodes(f"{self.node.name} cannot be evaluated: {error}") from error
        return values[self.node]

    def _value(
        self, node: fx.Node, given: Mapping[str, Tensor], values: Mapping[fx.Node, Tensor]
    ) -> Tensor:
        if node.op != "get_attr":
            return self._interpreter.call(node, values)  # type: ignore[no-any-return]
        name = str(node.target)
        return lift(given[name]) if name in given else self._interpreter.state(name)  # type: ignore[no-any-return]

    def tensors(self) -> dict[str, Tensor]:
        """The states that it is computed from."""
        return {name: self.graph.states[name].tensor.detach() for name in sorted(self.states)}


class Codes:
    """The decoding of a weight from the bytes of one state.

    Raises:
        NoCodes: if it is none as the module says.
    """

    def __init__(
        self, graph: Graph, node: fx.Node, codes: fx.Node, bits: int | None = None
    ) -> None:
        self.graph, self.node, self.name = graph, node, str(codes.target)
        self.bytes = graph.states[self.name].tensor.detach()
        if self.bytes.dtype not in BYTES:
            raise NoCodes(f"{self.name} holds {self.bytes.dtype}, no integers of a byte")
        self.read = Decoder(graph, node)
        # Scales of one and the same zeros for all: what is left are the integers.
        self._plain = {
            name: torch.ones_like(one)
            for name, one in self.read.tensors().items()
            if one.is_floating_point() or (one.dtype in BYTES and name != self.name)
        }
        self._measure_bits()
        self.range = self._range(bits)
        self.scale, self.group = self._measure_scale()

    # -- what is measured ---------------------------------------------------------------------

    def _filled(self, byte: int, given: Mapping[str, Tensor]) -> Tensor:
        """The weight where all bytes are `byte`."""
        full = torch.full_like(self.bytes, byte, dtype=torch.uint8).view(self.bytes.dtype)
        return self.read({**given, self.name: full})

    def _measure_bits(self) -> None:
        """`bits` `[8, *weight]`: what each bit of the byte that an element reads adds to its code."""
        zero = self._filled(0, self._plain)
        parts, sizes = [], []
        for bit in range(8):
            added = self._filled(1 << bit, self._plain) - zero
            parts.append(added.float())
            if added.any():
                sizes.append(float(added.abs()[added != 0].min()))
        if not sizes:
            raise NoCodes(f"no bit of {self.name} adds to the weight by itself")
        self._zero, self._unit = zero, min(sizes)
        self.bits = torch.stack([(one / self._unit).round().to(torch.int16) for one in parts])
        used = self.bits != 0
        low, high = self.bits.clamp(max=0).sum(0), self.bits.clamp(min=0).sum(0)
        self.low, self.high, self.width = (
            int(one.flatten()[0]) for one in (low, high, used.sum(0))
        )
        powers = self.bits.abs()[used]
        whole = (
            bool(((powers & (powers - 1)) == 0).all() and (low == self.low).all())
            and bool((high == self.high).all() and (used.sum(0) == self.width).all())
            and self.high - self.low == (1 << self.width) - 1
        )
        ones = (self._filled(255, self._plain) - zero) / self._unit
        if not whole or not _close(ones, torch.full_like(ones, self.high + self.low)):
            raise NoCodes(f"the weight is no affine function of integers in {self.name}")

    def _range(self, bits: int | None) -> tuple[int, int]:
        """The least and the largest code of so many bits."""
        if bits is None or bits > self.width:
            return self.low, self.high
        return (0, (1 << bits) - 1) if not self.low else (-1 << bits - 1, (1 << bits - 1) - 1)

    def grid(self, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """b and the step of each element of the weight, with other tensors in the place of some states."""
        zero = self._filled(0, given)
        return zero, (self._filled(255, given) - zero) / (self.low + self.high)

    def _measure_scale(self) -> tuple[str | None, Tensor]:
        """The state that the step is proportional to, and which of its elements, for each of the weight.
        None if the step is no state's."""
        floating = {k: v for k, v in self.read.tensors().items() if v.is_floating_point()}
        for name in sorted(floating, key=lambda one: -floating[one].numel()):
            size = floating[name].numel()
            numbers = torch.arange(2, size + 2, device=self.bytes.device, dtype=torch.float64)
            numbers = numbers.reshape(floating[name].shape)
            ratio = self.grid({**self._plain, name: numbers})[1] / self._unit
            index = ratio.round()
            if _close(ratio, index) and 2 <= float(index.min()) and float(index.max()) < size + 2:
                return name, index.long() - 2
        return None, torch.zeros_like(self._zero, dtype=torch.int64)

    def keep_scale(self) -> None:
        """Round to the steps that there are."""
        self.scale, self.group = None, torch.zeros_like(self.group)

    @property
    def groups(self) -> int:
        """The number of elements of the scale."""
        return 1 if self.scale is None else self.graph.states[self.scale].tensor.numel()

    def _per_group(self, value: Tensor, reduce: str) -> Tensor:
        """A value for each element of the scale, reduced over those of the weight that share it."""
        start = value.new_zeros(self.groups)
        return start.scatter_reduce(
            0, self.group.flatten(), value.flatten(), reduce, include_self=False
        )

    # -- rounding -----------------------------------------------------------------------------

    def rounded(self, wanted: Tensor) -> Rounded:
        """The codes and the scale nearest to another weight."""
        old = self.read({})
        kept, *others = self._factors(wanted, old)
        best, least = kept, self._lost(wanted, kept)
        for factor in others:
            lost = self._lost(wanted, factor)
            best = torch.where(lost < least, factor, best)
            least = torch.minimum(lost, least)
        scale = self._scaled(best)
        codes, found = self._nearest(wanted, scale)
        error, effect = (found - wanted).norm(), (wanted - old).norm()
        return Rounded(
            codes,
            scale.get(self.scale or ""),
            float(error / effect) if effect else float(error > 0),
        )

    def _lost(self, wanted: Tensor, factor: Tensor) -> Tensor:
        """The squared error for each element of the scale, times a factor."""
        return self._per_group(
            (self._nearest(wanted, self._scaled(factor))[1] - wanted) ** 2, "sum"
        )

    def _factors(self, wanted: Tensor, old: Tensor) -> list[Tensor]:
        """What the old scale may be multiplied by, element by element; 1 first."""
        factors = [torch.ones(self.groups, dtype=torch.float64, device=wanted.device)]
        if self.scale is not None:
            zero, step = self.grid({})
            ends = torch.stack([zero + step * end for end in self.range])
            reached = torch.where(wanted > 0, wanted / ends.amax(0), wanted / ends.amin(0))
            reached = torch.where(reached.isfinite(), reached, 0.0)
            fitting = self._per_group(reached, "amax")
            same = self._per_group(wanted * old, "sum") / self._per_group(old * old, "sum")
            factors += [fitting, CLIPPED * fitting, same]
        return [torch.where(one.isfinite() & (one != 0), one, 1.0) for one in factors]

    def _scaled(self, factor: Tensor) -> dict[str, Tensor]:
        """The scale times a factor, in the dtype that it is stored in."""
        if self.scale is None:
            return {}
        old = self.graph.states[self.scale].tensor.detach()
        new = (old.double() * factor.reshape(old.shape)).to(old.dtype)
        return {self.scale: torch.where(new.isfinite(), new, old)}

    def _nearest(self, wanted: Tensor, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The codes nearest to a weight, and what they are decoded to."""
        zero, step = self.grid(given)
        exact = torch.where(step != 0, (wanted - zero) / step, 0.0)
        codes = exact.round().clamp(*self.range).to(torch.int16)
        return codes, zero + step * codes

    # -- bytes --------------------------------------------------------------------------------

    def written(self, result: Rounded) -> Tensor:
        """The bytes that are decoded to a rounded weight."""
        place, mask = self._places(), self._joined(self.bits.new_full(self._zero.shape, -1), False)
        new, used = (
            place.new_zeros(self.bytes.numel()).index_add_(0, place.flatten(), one.flatten())
            for one in (self._joined(result.codes), mask)
        )
        old = self.bytes.view(torch.uint8).flatten().long()
        found = (((old & ~used) | new) & 255).to(torch.uint8).view(self.bytes.dtype)
        found = found.reshape(self.bytes.shape)
        given = {} if result.scale is None or self.scale is None else {self.scale: result.scale}
        zero, step = self.grid(given)
        if not _close(self.read({**given, self.name: found}), zero + step * result.codes):
            raise NoCodes(f"{self.name} does not hold one code after the other")
        return found

    def _joined(self, codes: Tensor, signed: bool = True) -> Tensor:
        """The bits that mean a code, in their places of the byte; all that are used for unsigned -1."""
        raw = (codes - self.low if signed else codes).long()
        found = torch.zeros_like(codes, dtype=torch.int64)
        for place, part in enumerate(self.bits):
            size = part.abs().long().clamp(min=1)
            bit = (raw & size) != 0
            bit = bit ^ (part < 0) if signed else bit
            found |= (bit & (part != 0)).long() << place
        return found

    def _places(self) -> Tensor:
        """Which byte each element of the weight reads: the bytes are numbered, some bits at a time."""
        if 8 % self.width:
            raise NoCodes(f"codes of {self.width} bits do not share a byte evenly")
        count = self.bytes.numel()
        numbers = torch.arange(count, device=self.bytes.device).reshape(self.bytes.shape)
        found = torch.zeros_like(self._zero, dtype=torch.int64)
        for shift in range(0, max(count - 1, 1).bit_length(), self.width):
            digit = (numbers >> shift) & ((1 << self.width) - 1)
            byte = torch.stack([digit << at for at in range(0, 8, self.width)]).sum(0)
            given = {**self._plain, self.name: byte.to(torch.uint8).view(self.bytes.dtype)}
            code = ((self.read(given) - self._zero) / self._unit).round().to(torch.int16)
            bits = self._joined(code)
            for at in range(0, 8, self.width):
                found |= ((bits >> at) & ((1 << self.width) - 1)) << shift
        return found.clamp(max=count - 1)


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to float64 rounding."""
    return not a.numel() or bool((a - b).abs().max() <= EXACT * b.abs().max().clamp(min=1e-300))
