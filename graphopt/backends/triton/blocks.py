"""Block shapes: fixed in the interpreter, measured on a GPU (`tune`)."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.backends.triton.source import EVEN, Printed

INTERPRETED = (
    1 << 16
)  # elements of a tile: the interpreter's time is per operation, not per element

Blocks = dict[str, int]


def power(count: int) -> int:
    """The smallest power of two that is not below a count."""
    return 1 << max(count - 1, 0).bit_length()


def grid(form: Printed, blocks: Blocks, extent: Sequence[int]) -> tuple[int, ...]:
    """How many programs cover an extent."""
    if form.form == "product":
        rows, columns, batch, _ = extent
        return (-(-rows // blocks["ROWS"])) * (-(-columns // blocks["COLUMNS"])), batch
    return (-(-extent[0] // blocks["BLOCK" if form.form == "pointwise" else "ROWS"]),)


def gpu_blocks(form: str, columns: int) -> list[tuple[Blocks, int]]:
    """Block shapes to measure, with how many warps each; the first is a good guess.

    `columns` is their number where it is known; a persistent tile is as wide.
    """
    if form == "pointwise":
        return [
            ({"BLOCK": block}, warps) for block, warps in ((1024, 4), (512, 4), (256, 4), (1024, 8))
        ]
    if form == "product":
        return [({"ROWS": rows, "COLUMNS": wide, "INNER": inner}, warps)
                for rows, wide, inner, warps in ((64, 64, 32, 4), (128, 64, 32, 4), (64, 128, 32, 4),
                                                 (128, 128, 32, 8), (32, 64, 64, 4), (64, 64, 64, 4),
                                                 (16, 64, 64, 4), (128, 128, 64, 8))]  # fmt: skip
    if form == "looped":
        return [
            ({"ROWS": 1, "COLUMNS": tile}, warps)
            for tile, warps in ((2048, 8), (4096, 16), (1024, 4))
        ]
    tile = power(columns)
    many = max(1024 // tile, 1)
    found = [({"ROWS": rows, "COLUMNS": tile}, warps_for(rows * tile))
             for rows in dict.fromkeys((many, max(many // 4, 1), 1))]  # fmt: skip
    return [*found, ({"ROWS": many, "COLUMNS": tile}, min(2 * warps_for(many * tile), 16))]


def warps_for(elements: int) -> int:
    """Warps for a tile: up to 8 values per thread."""
    return min(max(power(elements) // 256, 1), 16)


def interpreted_blocks(form: Printed, extent: Sequence[int]) -> Blocks:
    """Few, large programs."""
    rows, columns = extent[:2]
    if form.form == "pointwise":
        block = min(power(rows), INTERPRETED)
        while form.even and rows % block:
            block //= 2
        return {"BLOCK": max(block, EVEN) if form.even else block}
    if form.form == "product":
        inner = min(power(extent[3]), 128)
        return {"ROWS": min(power(rows), 256), "COLUMNS": min(power(columns), 256), "INNER": inner}
    tile = min(power(columns), 4096) if form.form == "looped" else power(columns)
    return {"ROWS": max(min(power(rows), INTERPRETED // tile), 1), "COLUMNS": tile}
