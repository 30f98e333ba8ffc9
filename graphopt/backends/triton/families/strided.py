"""Elementwise access to tensors of one shape and any strides, with as few axes as their strides allow."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

REACH = (1 << 31) - (1 << 17)  # offsets that 32 bits count, with what the last block has too many


@dataclasses.dataclass(frozen=True)
class Layout:
    """How operands are addressed by the axes i0, i1, .. that are left after merging.

    `kinds[operand][axis]` is "0" where the operand is broadcast, "1" where the axis is contiguous,
    else "s": the stride is an argument. `wide` tells that offsets need 64 bits.
    """

    kinds: tuple[str, ...]
    rank: int
    wide: bool = False

    def index(self) -> list[str]:
        """Lines that split the place `i` into axes, the last one contiguous."""
        if self.rank <= 1:
            return ["i0 = i"]
        rest, lines = "i", []
        for axis in range(self.rank - 1, 0, -1):
            lines.append(f"i{axis} = {rest} % n{axis}")
            if axis > 1:
                lines.append(f"rest = {rest} // n{axis}")
                rest = "rest"
        return [*lines, f"i0 = {rest} // n1"]

    def offset(self, operand: int, name: str) -> str:
        """ " + i0 * x_s0 + i1", or nothing for a scalar."""
        return "".join(
            f" + i{axis}" if kind == "1" else f" + i{axis} * {name}_s{axis}"
            for axis, kind in enumerate(self.kinds[operand])
            if kind != "0"
        )

    def arguments(self, names: Sequence[str]) -> list[str]:
        """The names of the integers that a kernel takes, in the order of `values`."""
        sizes = [f"n{axis}" for axis in range(1, self.rank)]
        return sizes + [
            f"{name}_s{axis}"
            for name, kinds in zip(names, self.kinds, strict=True)
            for axis, kind in enumerate(kinds)
            if kind == "s"
        ]


def layout(
    shape: Sequence[int], operands: Sequence[Tensor], extent: int = 0
) -> tuple[Layout, list[int]]:
    """The layout of tensors that broadcast to `shape`, and the values of its arguments.

    `extent`: the largest offset that is added to those of the layout.
    """
    strides = [one.expand(tuple(shape)).stride() for one in operands]
    sizes: list[int] = []
    steps: list[list[int]] = [[] for _ in operands]
    for axis, size in enumerate(shape):
        if size == 1:
            continue
        inner = [one[axis] for one in strides]
        if sizes and all(s[-1] == step * size for s, step in zip(steps, inner, strict=True)):
            sizes[-1] *= size
            for s, step in zip(steps, inner, strict=True):
                s[-1] = step
        else:
            sizes.append(size)
            for s, step in zip(steps, inner, strict=True):
                s.append(step)
    kinds = tuple("".join({0: "0", 1: "1"}.get(step, "s") for step in one) for one in steps)
    reach = [sum(abs(step) * (n - 1) for step, n in zip(one, sizes, strict=True)) for one in steps]
    wide = max([extent, *reach], default=0) >= REACH
    values = sizes[1:] + [s for one in steps for s in one if s not in (0, 1)]
    return Layout(kinds, len(sizes), wide), values
