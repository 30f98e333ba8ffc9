"""The kernels of `linear_attention`: their text, their tiles, their launch."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from graphopt.backends.triton import interpreting
from graphopt.backends.triton.families import formulas
from graphopt.backends.triton.families.attention_graph import Attention, Operand
from graphopt.backends.triton.families.common import HEADER, cdiv, power, tensor, widened
from graphopt.backends.triton.runtime import load
from graphopt.backends.triton.scalars import spelled

_SUMMARY = '''\
@triton.jit
def {name}_summary(
    k_ptr, k_s0, k_s1, k_s2, k_s3, v_ptr, v_s0, v_s1, v_s2, v_s3, s_ptr, z_ptr, heads, n_count, PART,
    D: tl.constexpr, C: tl.constexpr, N: tl.constexpr, WIDE_D: tl.constexpr, WIDE_C: tl.constexpr,
):
    """s = psi(k)^T v and z = sum psi(k) over PART keys of a head. {title}"""
    pair, part = tl.program_id(0), tl.program_id(2)
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    d = tl.arange(0, WIDE_D)
    c = tl.program_id(1) * WIDE_C + tl.arange(0, WIDE_C)
    s = tl.zeros([WIDE_D, WIDE_C], tl.float32)
    z = tl.zeros([WIDE_D], tl.float32)
    for start in range(part * PART, tl.minimum(part * PART + PART, n_count), N):
        n = start + tl.arange(0, N)
{keys}
{values}
        s = tl.dot(k, v, s, input_precision="ieee")
        z += tl.sum(k.to(tl.float32), 1)
    place = (part * tl.num_programs(0) + pair).to(tl.int64) * D
    s_tile = s_ptr + (place + d)[:, None] * C + c[None, :]
    tl.store(s_tile, s, mask=(d < D)[:, None] & (c < C)[None, :])
    if tl.program_id(1) == 0:
        tl.store(z_ptr + place + d, z, mask=d < D)


@triton.jit
def {name}(
    q_ptr, q_s0, q_s1, q_s2, q_s3, s_ptr, z_ptr, y_ptr, y_s0, y_s1, y_s2, heads, m_count, n_count,
    D: tl.constexpr, C: tl.constexpr, M: tl.constexpr, STEP_D: tl.constexpr, WIDE_C: tl.constexpr,
):
    """{formula} {title}"""
{place}
    num = tl.zeros([M, WIDE_C], tl.float32)
    den = tl.zeros([M], tl.float32)
    for first in range(0, D, STEP_D):
        d = first + tl.arange(0, STEP_D)
{query}
        s_tile = s_ptr + (pair.to(tl.int64) * D + d)[:, None] * C + c[None, :]
        s = tl.load(s_tile, mask=(d < D)[:, None] & (c < C)[None, :], other=0.0)
        num = tl.dot(q.to(tl.float32), s, num, input_precision="{precision}")
        z = tl.load(z_ptr + pair.to(tl.int64) * D + d, mask=d < D, other=0.0)
        den += tl.sum(q.to(tl.float32) * z[None, :], 1)
    den = den[:, None]
{end}'''
_DIRECT = '''\
@triton.jit
def {name}(
    q_ptr, q_s0, q_s1, q_s2, q_s3, k_ptr, k_s0, k_s1, k_s2, k_s3, v_ptr, v_s0, v_s1, v_s2, v_s3,
    y_ptr, y_s0, y_s1, y_s2, heads, m_count, n_count, D: tl.constexpr, C: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STEP_D: tl.constexpr, WIDE_C: tl.constexpr,
):
    """{formula} {title}"""
{place}
    num = tl.zeros([M, WIDE_C], tl.float32)
    den = tl.zeros([M], tl.float32)
    for start in range(0, n_count, N):
        n = start + tl.arange(0, N)
        weights = tl.zeros([M, N], tl.float32)
        for first in range(0, D, STEP_D):
            d = first + tl.arange(0, STEP_D)
{queries}
{deep_keys}
            weights = tl.dot(q, k, weights, input_precision="ieee")
{values}
        den += tl.sum(weights, 1)
        num = tl.dot(weights.to(v.dtype), v, num, input_precision="ieee")
    den = den[:, None]
{end}'''
_PLACE = """\
pair = tl.program_id(0)
batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
m = tl.program_id(1) * M + tl.arange(0, M)
c = tl.program_id(2) * WIDE_C + tl.arange(0, WIDE_C)"""
_QUERY = """\
q_mask = (m < m_count)[:, None] & (d < D)[None, :]
q_head = q_ptr + batch * q_s0 + head * q_s1
x = tl.load(q_head + m[:, None] * q_s2 + d[None, :] * q_s3, mask=q_mask, other=0.0)"""
_KEYS = """\
k_mask = (n < n_count)[None, :] & (d < D)[:, None]
k_head = k_ptr + batch * k_s0 + head * k_s1
x = tl.load(k_head + n[None, :] * k_s2 + d[:, None] * k_s3, mask=k_mask, other=0.0)"""
_VALUES = """\
v_mask = (n < n_count)[:, None] & (c < C)[None, :]
v_head = v_ptr + batch * v_s0 + head * v_s1
x = tl.load(v_head + n[:, None] * v_s2 + c[None, :] * v_s3, mask=v_mask, other=0.0)"""
_END = """\
y_head = y_ptr + batch * y_s0 + head * y_s1
y_mask = (m < m_count)[:, None] & (c < C)[None, :]
tl.store(y_head + m[:, None] * y_s2 + c[None, :], {y}, mask=y_mask)
"""


def printed(parts: Attention, name: str, title: str, summed: bool, interpreted: bool) -> str:
    """The kernels for one of the two orders."""
    held = tensor(parts.v.node).dtype
    dtype = "tl.float32" if widened(held, interpreted) else spelled(held)
    made, (y,) = formulas.lines(parts.normalizer, ["num", "den"])
    before = [f"num = num * {one!r}" for one in parts.factors]
    before += ["den = den / n_count"] if parts.mean else []
    query = _mapped(_QUERY, parts.q, "q", dtype, interpreted)
    keys = _mapped(_KEYS, parts.k, "k", dtype, interpreted)
    return HEADER + (_SUMMARY if summed else _DIRECT).format(
        name=name, title=title,
        formula="y = g(phi(q) psi(k)^T v, phi(q) sum psi(k)).",
        place=_lines(_PLACE.splitlines(), 4), query=_lines(query, 8), queries=_lines(query, 12),
        keys=_lines(keys, 8), deep_keys=_lines(keys, 12),
        values=_lines(_mapped(_VALUES, parts.v, "v", dtype, interpreted), 8),
        precision="ieee" if held == torch.float32 else "tf32",
        end=_lines([*before, *made, *_END.format(y=y).splitlines()], 4) + "\n",
    )  # fmt: skip


def reach(value: Tensor) -> int:
    """The largest offset within a head."""
    return sum((n - 1) * s for n, s in zip(value.shape[-2:], value.stride()[-2:], strict=True))


def order(m: int, n: int, d: int, c: int) -> bool:
    """Whether q (k^T v) takes no more operations than (q k^T) v."""
    return d * c * (n + m) <= n * m * (d + c)


def _lines(lines: list[str], indent: int) -> str:
    return "\n".join(" " * indent + line for line in lines)


def _mapped(text: str, operand: Operand, name: str, dtype: str, interpreted: bool) -> list[str]:
    """The lines that load a tile and apply the operand's map; what is outside stays zero."""
    lines = text.splitlines()
    raw = operand.raw_dtype
    if not any(node.op == "call_function" for node in operand.map.nodes):
        return [*lines[:-1], lines[-1].replace("x = ", f"{name} = ") + widened(raw, interpreted)]
    if raw in (torch.float16, torch.bfloat16):
        lines[-1] += ".to(tl.float32)"
    made, (result,) = formulas.lines(operand.map, ["x"])
    return [*lines, *made, f"{name} = tl.where({name}_mask, {result}, 0.0).to({dtype})"]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile sizes: queries, keys, channels of keys per step and in all, channels of values."""

    m: int
    n: int
    step_d: int
    wide_d: int
    wide_c: int

    @classmethod
    def of(
        cls, m: int, n: int, d: int, c: int, dtype: torch.dtype, interpreted: bool = False
    ) -> Tiles:
        """Products in float32 run on the ordinary units, each thread holding its operands: there the
        contracted axes of a tile are short."""
        m, n, wide_d, wide_c = (max(16, power(one)) for one in (m, n, d, c))
        if interpreted:
            return cls(min(m, 256), min(n, 256), wide_d, wide_d, wide_c)
        if dtype == torch.float32:
            return cls(min(m, 64), 16, 16, wide_d, min(wide_c, 64, 8192 // wide_d))
        return cls(min(m, 64), min(n, 64), wide_d, wide_d, min(wide_c, 8192 // wide_d))


def attend(
    source: str, name: str, summed: bool, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype
) -> Tensor:
    """The result `[*batch, m, c]` of kernels on q `[*batch, m, d]`, k `[*batch, n, d]`, v
    `[*batch, n, c]`; batches of at most two axes. In memory the heads are beside the channels."""
    shape = (*q.shape[:-1], v.shape[-1])
    q, k, v = (one[(None,) * (4 - one.ndim)] for one in (q, k, v))
    batch, heads, m, d = q.shape
    n, c = v.shape[-2:]
    y = torch.empty([batch, m, heads, c], dtype=dtype, device=q.device).transpose(1, 2)
    if not y.numel():
        return y.reshape(shape)
    pairs, tiles = batch * heads, Tiles.of(m, n, d, c, v.dtype, interpreting())
    blocks = cdiv(c, tiles.wide_c)
    common: Any = {"D": d, "C": c, "WIDE_C": tiles.wide_c, "num_warps": 4}
    grid = pairs, cdiv(m, tiles.m), blocks
    kernel = load(source, name)
    into = y, *y.stride()[:3], heads, m, n
    if not summed:
        kernel[grid](q, *q.stride(), k, *k.stride(), v, *v.stride(), *into,
                     M=tiles.m, N=tiles.n, STEP_D=tiles.step_d, **common)  # fmt: skip
        return y.reshape(shape)
    wanted = 1 if interpreting() else max(1, 264 // (pairs * blocks))
    part = max(1, cdiv(cdiv(n, wanted), tiles.n)) * tiles.n
    parts = max(1, cdiv(n, part))
    s = torch.empty([parts, pairs, d, c], dtype=torch.float32, device=q.device)
    z = torch.empty([parts, pairs, d], dtype=torch.float32, device=q.device)
    load(source, f"{name}_summary")[pairs, blocks, parts](
        k,
        *k.stride(),
        v,
        *v.stride(),
        s,
        z,
        heads,
        n,
        part,
        N=tiles.n,
        WIDE_D=tiles.wide_d,
        **common,
    )
    if parts > 1:
        s, z = s.sum(0), z.sum(0)
    kernel[grid](q, *q.stride(), s, z, *into, M=tiles.m, STEP_D=tiles.step_d, **common)
    return y.reshape(shape)
