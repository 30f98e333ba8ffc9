"""Low-rank products with the matrices of each row's own adapter, rows grouped by adapter.

    y_t  =  base_t  +  scale_i * (x_t A_i) B_i,      i = ids_t the adapter of row t, none where -1

A `[adapters, in, rank]`, B `[adapters, rank, out]`; smaller ranks are padded with zeros. Looking up a
matrix for every row, as the graph says it, copies `in * rank` numbers per row; here the rows of an
adapter share tiles and no matrix is copied. A tile never holds rows of two adapters. Two kernels:

    shrink   h_p = x A_i over the p-th part of the columns, in float32
    expand   y = base + scale_i * (sum_p h_p) B_i

The parts fill the device when rows are few; they are added where they are read, so the result does not
depend on timing. Formulas: Punica (arXiv 2310.18547), S-LoRA (arXiv 2311.03285).
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from graphopt.backends.triton import interpreting
from graphopt.backends.triton.families.common import HEADER, cdiv, dense, power
from graphopt.backends.triton.runtime import load


@dataclasses.dataclass(frozen=True)
class Form:
    """What the source depends on: the blocks are powers of two, tiles of `rows` rows.

    by_sequence: tiles are cut from sequences, which have one adapter each; else from sorted rows.
    """

    name: str
    title: str
    rank: int
    by_sequence: bool
    scaled: bool
    based: bool
    wide: str = ""

    @cached_property
    def source(self) -> str:
        return HEADER + _SOURCE.format(
            wide=self.wide, name=self.name, title=self.title, rank=self.rank,
            tables="ids_ptr, per_sequence" if self.by_sequence else "tile_ptr, order_ptr, tiles",
            tile=_indented(_BY_SEQUENCE if self.by_sequence else _SORTED),
            more=", scale_ptr" * self.scaled + ", base_ptr, base_s0, base_s1" * self.based,
            epilogue=_indented(_SCALE * self.scaled + _BASE * self.based),
        )  # fmt: skip


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.strip().splitlines()) if text else ""


_BY_SEQUENCE = """
sequence = tile // per_sequence
adapter = tl.load(ids_ptr + sequence).to(tl.int64)
step = tile % per_sequence * ROWS + tl.arange(0, ROWS)
inside = step < steps
row = sequence * steps + step
place = row
"""
_SORTED = """
adapter = tl.load(tile_ptr + tile).to(tl.int64)
if adapter < -1:  # no tile: there are as many programs as there may be tiles
    return
place = tl.load(tile_ptr + tiles + tile) + tl.arange(0, ROWS)
inside = place < tl.load(tile_ptr + 2 * tiles + tile)
row = tl.load(order_ptr + place, mask=inside, other=0).to(tl.int32)
sequence, step = row // steps, row % steps
"""
_SCALE = """
y = y * tl.load(scale_ptr + tl.maximum(adapter, 0)).to(tl.float32)
"""
_BASE = """
base_row = base_ptr + sequence.to(tl.int64) * base_s0 + step * base_s1
base_tile = base_row[:, None] + column[None, :]
y += tl.load(base_tile, mask=inside[:, None] & (column < OUT)[None, :], other=0.0)
"""
_SOURCE = '''\
@triton.jit
def {name}_shrink(
    x_ptr, x_s0, x_s1, a_ptr, a_s0, a_s1, a_s2, h_ptr, {tables}, rows, steps,
    IN: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):
    """h[p] = x A_i over the p-th PART of the columns. {title}"""
    tile, part = tl.program_id(0), tl.program_id(1)
{tile}    if adapter < 0:
        return
    rank = tl.arange(0, RANK)
    x_row = x_ptr + sequence.to(tl.int64) * x_s0 + step * x_s1
    a_part = a_ptr + adapter * a_s0 + rank[None, :] * a_s2
    h = tl.zeros([ROWS, RANK], tl.float32)
    for start in range(part * PART, tl.minimum(part * PART + PART, IN), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        known = column < IN
        x = tl.load(x_row[:, None] + column[None, :], mask=inside[:, None] & known[None, :], other=0.0){wide}
        a_mask = known[:, None] & (rank < {rank})[None, :]
        a = tl.load(a_part + column[:, None] * a_s1, mask=a_mask, other=0.0){wide}
        h = tl.dot(x, a, h, input_precision="ieee")
    h_tile = h_ptr + (part * rows + place).to(tl.int64)[:, None] * RANK + rank[None, :]
    tl.store(h_tile, h, mask=inside[:, None])


@triton.jit
def {name}(
    h_ptr, b_ptr, b_s0, b_s1, b_s2, y_ptr, {tables}, rows, steps{more},
    OUT: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):
    """y = base + scale_i * (h[0] + h[1] + ..) B_i. {title}"""
    tile = tl.program_id(0)
{tile}    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, RANK)
    h = tl.zeros([ROWS, RANK], tl.float32)
    own = rank < tl.where(adapter >= 0, {rank}, 0)  # a row without adapter has rank 0
    for part in tl.static_range(PARTS):
        h_tile = h_ptr + (part * rows + place).to(tl.int64)[:, None] * RANK + rank[None, :]
        h += tl.load(h_tile, mask=inside[:, None] & own[None, :], other=0.0)
    b_mask = own[:, None] & (column < OUT)[None, :]
    b_tile = b_ptr + adapter * b_s0 + rank[:, None] * b_s1 + column[None, :] * b_s2
    b = tl.load(b_tile, mask=b_mask, other=0.0){wide}
    y = tl.dot(h.to(b.dtype), b, input_precision="ieee")
{epilogue}    y_tile = y_ptr + row.to(tl.int64)[:, None] * OUT + column[None, :]
    tl.store(y_tile, y, mask=inside[:, None] & (column < OUT)[None, :])
'''


# -- tiles ----------------------------------------------------------------------------------------


def tiles(ids: Tensor, adapters: int, rows: int) -> tuple[Tensor, Tensor, int]:
    """(table, order, count): `order` sorts `ids` `[n]`; tile k of at most `rows` rows has the adapter
    `table[0, k]` (-2: no tile) and the places `table[1, k]` up to `table[2, k]` of the order.

    Nothing is read back from the device: `count` is the most tiles that there may be.
    """
    n = ids.numel()
    count = n // rows + min(adapters + 1, n)
    order = torch.argsort(ids)
    group = torch.arange(-1, adapters, device=ids.device)
    ends = torch.searchsorted(ids[order], group, right=True)
    starts = torch.nn.functional.pad(ends[:-1], (1, 0))
    last = torch.cumsum((ends - starts + rows - 1) // rows, 0)
    number = torch.arange(count, device=ids.device)
    owner = torch.searchsorted(last, number, right=True)
    real, owner = owner <= adapters, owner.clamp_max(adapters)
    before = torch.nn.functional.pad(last, (1, 0))[owner]
    first = starts[owner] + (number - before) * rows
    table = torch.stack([torch.where(real, owner - 1, -2), first, ends[owner]])
    return table.to(torch.int32), order.to(torch.int32), count


_PLANS: Any = WeakIdKeyDictionary()  # of ids: all layers of a model read the same ones


def _planned(ids: Tensor, adapters: int, rows: int, steps: int) -> tuple[Tensor, Tensor, int]:
    if ids.is_cuda and torch.cuda.is_current_stream_capturing():  # pragma: no cover
        return tiles(ids.repeat_interleave(steps), adapters, rows)
    key = (ids._version, adapters, rows, steps)
    held = _PLANS.get(ids)
    if held is None or held[0] != key:
        held = _PLANS[ids] = key, tiles(ids.repeat_interleave(steps), adapters, rows)
    return held[1]  # type: ignore[no-any-return]


def low_rank(
    form: Form, x: Tensor, a: Tensor, b: Tensor, ids: Tensor, scale: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`base + scale_i * (x A_i) B_i`, `[sequences, steps, out]`.

    Args:
        x: `[sequences, steps, in]`; a: `[adapters, in, rank]`; b: `[adapters, rank, out]`.
        ids: `[sequences]`, from -1 (none) to adapters - 1.
        scale: `[adapters]`; base: as the result.
    """
    sequences, steps, wide = x.shape
    adapters, rank, out = b.shape
    n = sequences * steps
    y = torch.empty([sequences, steps, out], dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    x, ids = dense(x), ids.contiguous()
    most = 32 if x.dtype == torch.float32 else 64
    rows = form_rows(n, adapters, steps, form.by_sequence, most)
    tables: tuple[Any, ...]
    if form.by_sequence:
        per_sequence = cdiv(steps, rows)
        tables, count = (ids, per_sequence), sequences * per_sequence
    else:
        table, order, count = _planned(ids, adapters, rows, steps)
        tables = table, order, count
    padded = max(16, power(rank))
    columns, to = tile_columns(x.dtype, wide, out, 4096 if interpreting() else None)
    parts = 1 if interpreting() else max(1, min(cdiv(wide, 512), 256 // count))
    part = cdiv(cdiv(wide, parts), columns) * columns
    parts = max(1, cdiv(wide, part))
    h = torch.empty([parts, n, padded], dtype=torch.float32, device=x.device)
    source = form.source
    load(source, f"{form.name}_shrink")[count, parts](
        x, *x.stride()[:2], a, *a.stride(), h, *tables, n, steps,
        IN=wide, PART=part, ROWS=rows, COLUMNS=columns, RANK=padded, num_warps=4,
    )  # fmt: skip
    more: list[Any] = [] if scale is None else [scale.contiguous()]
    if base is not None:
        base = dense(base)
        more += [base, *base.stride()[:2]]
    load(source, form.name)[count, cdiv(out, to)](
        h, b, *b.stride(), y, *tables, n, steps, *more,
        OUT=out, PARTS=parts, ROWS=rows, COLUMNS=to, RANK=padded, num_warps=4,
    )  # fmt: skip
    return y


def tile_columns(
    dtype: torch.dtype, wide: int, out: int, most: int | None = None
) -> tuple[int, int]:
    """Columns of a tile of the input and of the output. Products in float32 run on the ordinary units,
    where threads hold their operands: tiles are smaller."""
    least = (32, 64) if dtype == torch.float32 else (64, 128)
    first, second = (max(16, power(one)) for one in (wide, out))
    return min(first, most or least[0]), min(second, most or least[1])


def form_rows(rows: int, adapters: int, steps: int, by_sequence: bool, most: int) -> int:
    """The rows of a tile: few where segments are short."""
    segment = steps if by_sequence else rows // max(1, min(adapters, rows))
    return min(64 if segment >= 48 else 32 if segment >= 24 else 16, most)
