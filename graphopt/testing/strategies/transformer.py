"""Transformers over features, tokens or patches, in the dialects that trained models speak."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.testing.strategies.families import batch_norms
from graphopt.testing.strategies.network import Draw, Network, integers, normal, seeds, settle

WIDTH, LENGTH, VOCABULARY = 8, 6, 11


@dataclasses.dataclass(frozen=True)
class Dialect:
    """What the blocks of one transformer have in common."""

    norm: str = "layer"  # layer, rms, written rms, batch
    place: str = "pre"  # pre, post, parallel
    kernel: str = "sdpa"  # sdpa, written, einsum, multihead
    fused: bool = False
    heads: int = 2
    groups: int = 2  # heads of keys and values
    mask: str = "none"  # none, causal, additive, boolean
    rotary: bool = False
    normed_keys: bool = False
    mlp: str = "gelu"  # gelu, relu, swiglu
    bias: bool = True
    layer_scale: bool = False


DIALECTS = st.builds(
    Dialect,
    norm=st.sampled_from(["layer", "rms", "written rms", "batch"]),
    place=st.sampled_from(["pre", "post", "parallel"]),
    kernel=st.sampled_from(["sdpa", "written", "einsum", "multihead"]),
    fused=st.booleans(),
    heads=st.sampled_from([2, 4]),
    groups=st.sampled_from([2, 1]),
    mask=st.sampled_from(["none", "causal", "additive", "boolean"]),
    rotary=st.booleans(),
    normed_keys=st.booleans(),
    mlp=st.sampled_from(["gelu", "relu", "swiglu"]),
    bias=st.booleans(),
    layer_scale=st.booleans(),
)


class WrittenRMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` as most language models spell it."""

    def __init__(self, features: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class TokenNorm(nn.Module):
    """A batch norm over the features of `[N, L, C]`."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


def rotate(x: Tensor) -> Tensor:
    """Rotary embedding of `[N, heads, L, D]`: pairs of features turn with their position."""
    length, half = x.shape[-2], x.shape[-1] // 2
    rates = 10.0 ** -torch.arange(half, dtype=x.dtype)
    angles = torch.outer(torch.arange(length, dtype=x.dtype), rates)
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    """Self-attention on `[N, L, C]`."""

    def __init__(self, dialect: Dialect, length: int) -> None:
        super().__init__()
        self.dialect = dialect
        self.size = WIDTH // dialect.heads
        self.grouped = self.size * dialect.groups
        if dialect.fused:
            self.qkv = nn.Linear(WIDTH, WIDTH + 2 * self.grouped, dialect.bias)
        else:
            self.q = nn.Linear(WIDTH, WIDTH, dialect.bias)
            self.k = nn.Linear(WIDTH, self.grouped, bias=False)
            self.v = nn.Linear(WIDTH, self.grouped, dialect.bias)
        self.out = nn.Linear(WIDTH, WIDTH, dialect.bias)
        self.key_norm = nn.LayerNorm(self.size) if dialect.normed_keys else nn.Identity()
        if dialect.mask == "additive":
            self.mask = nn.Parameter(torch.zeros(dialect.heads, length, length))
        elif dialect.mask == "boolean":
            self.register_buffer("mask", torch.ones(length, length).tril().bool())

    def forward(self, x: Tensor) -> Tensor:
        if self.dialect.fused:
            sizes = [WIDTH, self.grouped, self.grouped]
            q, k, v = (self._heads(one) for one in self.qkv(x).split(sizes, dim=-1))
        else:
            q, k, v = (self._heads(one(x)) for one in (self.q, self.k, self.v))
        q, k = self.key_norm(q), self.key_norm(k)
        if self.dialect.rotary:
            q, k = rotate(q), rotate(k)
        if self.dialect.heads != self.dialect.groups:
            repeats = self.dialect.heads // self.dialect.groups
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        y = self._attend(q, k, v).transpose(1, 2)
        return self.out(y.reshape(*x.shape[:2], WIDTH))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.size)).transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask: Any = self.mask if self.dialect.mask in ("additive", "boolean") else None
        causal = self.dialect.mask == "causal"
        if self.dialect.kernel == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        if self.dialect.kernel == "einsum":
            scores = torch.einsum("nhqd,nhkd->nhqk", q, k) / math.sqrt(self.size)
        else:
            scores = (q * self.size**-0.5) @ k.transpose(-2, -1)
        if causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        elif self.dialect.mask == "boolean":
            scores = torch.where(mask, scores, -1e4)
        elif mask is not None:
            scores = scores + mask
        weights = F.dropout(scores.softmax(dim=-1), 0.1, self.training)
        if self.dialect.kernel == "einsum":
            return torch.einsum("nhqk,nhkd->nhqd", weights, v)
        return weights @ v


class MultiHead(nn.Module):
    """torch's own attention module."""

    def __init__(self, heads: int, causal: bool, length: int) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, heads, batch_first=True)
        future = torch.ones(length, length, dtype=torch.bool).triu(1) if causal else None
        self.register_buffer("mask", future)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x, x, x, attn_mask=self.mask, need_weights=False)[0]
        return y


class MLP(nn.Module):
    """Two linear maps with a nonlinearity between them, or SwiGLU's three."""

    def __init__(self, kind: str, bias: bool) -> None:
        super().__init__()
        self.kind = kind
        self.up = nn.Linear(WIDTH, 12, bias)
        self.gate = nn.Linear(WIDTH, 12, bias) if kind == "swiglu" else None
        self.down = nn.Linear(12, WIDTH, bias)

    def extra_repr(self) -> str:
        return self.kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if self.gate is not None:
            return self.down(F.silu(self.gate(x)) * y)
        return self.down(F.gelu(y) if self.kind == "gelu" else F.relu(y))


class Window(nn.Module):
    """Attention within windows of two by two patches of a `side` by `side` image, shifted."""

    def __init__(self, attention: nn.Module, side: int, shift: int) -> None:
        super().__init__()
        self.attention, self.side, self.shift = attention, side, shift

    def forward(self, x: Tensor) -> Tensor:
        side, shift = self.side, self.shift
        y = x.view(-1, side, side, WIDTH)
        if shift:
            y = torch.roll(y, (-shift, -shift), dims=(1, 2))
        y = y.view(-1, side // 2, 2, side // 2, 2, WIDTH).permute(0, 1, 3, 2, 4, 5)
        y = self.attention(y.reshape(-1, 4, WIDTH))
        y = y.view(-1, side // 2, side // 2, 2, 2, WIDTH).permute(0, 1, 3, 2, 4, 5)
        y = y.reshape(-1, side, side, WIDTH)
        if shift:
            y = torch.roll(y, (shift, shift), dims=(1, 2))
        return y.reshape(x.shape)


class Block(nn.Module):
    """Attention and MLP with norms before, behind or beside them."""

    def __init__(self, dialect: Dialect, attention: nn.Module, norms: list[nn.Module]) -> None:
        super().__init__()
        self.dialect = dialect
        self.attention, self.mlp = attention, MLP(dialect.mlp, dialect.bias)
        self.norms = nn.ModuleList(norms)
        shape = (2, WIDTH) if dialect.layer_scale else (0,)
        self.scales = nn.Parameter(torch.ones(shape))

    def extra_repr(self) -> str:
        return f"{self.dialect}"

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.scales[0], self.scales[1]) if self.dialect.layer_scale else (1, 1)
        one, two = self.norms
        if self.dialect.place == "pre":
            x = x + self.attention(one(x)) * first
            return x + self.mlp(two(x)) * second
        if self.dialect.place == "post":
            x = one(x + self.attention(x) * first)
            return two(x + self.mlp(x) * second)
        y = one(x)
        return two(x + self.attention(y) * first + self.mlp(y) * second)


class Transformer(nn.Module):
    """Front (features, tokens or patches), positions, blocks, head.

    `tied`: logits are products with the embedding; `cls`: a learned token goes first; `pool`: what
    the head reads: all, first, mean or last.
    """

    def __init__(
        self, front: nn.Module, blocks: list[nn.Module], norm: nn.Module, *, length: int,
        positions: str, cls: bool, pool: str, tied: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.front, self.blocks, self.norm = front, nn.Sequential(*blocks), norm
        self.pool, self.tied = pool, tied
        self.cls = nn.Parameter(torch.zeros(1, 1, WIDTH)) if cls else None
        self.positions = nn.Parameter(torch.zeros(1, length, WIDTH)) if positions == "own" else None
        self.table = nn.Embedding(length, WIDTH) if positions == "embedded" else None
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=not tied)
        if tied:
            self.head.weight = front.weight  # type: ignore[assignment]

    def extra_repr(self) -> str:
        return f"pool={self.pool}, tied={self.tied}, cls={self.cls is not None}"

    def forward(self, x: Tensor) -> Tensor:
        y = self.front(x)
        if self.cls is not None:
            y = torch.cat([self.cls.expand(y.shape[0], -1, -1), y], dim=1)
        if self.positions is not None:
            y = y + self.positions
        if self.table is not None:
            y = y + self.table(torch.arange(y.shape[1]))
        y = self.norm(self.blocks(y))
        if self.pool == "mean":
            y = y.mean(dim=1)
        elif self.pool != "all":
            y = y[:, 0] if self.pool == "first" else y[:, -1]
        return self.head(y)


class Patches(nn.Module):
    """A convolution whose stride is its kernel, flattened to tokens."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, WIDTH, size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x).flatten(2).transpose(1, 2)


@st.composite
def transformers(draw: Draw) -> Network:
    """One or two blocks of one dialect behind a front and before a head."""
    dialect: Dialect = draw(DIALECTS)
    kind = draw(st.sampled_from(["features", "tokens", "patches"]))
    rows, seed = draw(st.integers(2, 3)), draw(seeds())
    windowed = kind == "patches" and draw(st.booleans())
    cls = not windowed and draw(st.booleans())
    length = {"features": LENGTH, "tokens": LENGTH, "patches": 16}[kind] + cls
    front: nn.Module
    if kind == "tokens":
        front, x = nn.Embedding(VOCABULARY, WIDTH), integers((rows, LENGTH), VOCABULARY, seed)
    elif kind == "patches":
        front, x = Patches(2), normal((rows, 3, 8, 8), seed)
    else:
        front, x = nn.Linear(5, WIDTH), normal((rows, LENGTH, 5), seed)
    blocks: list[nn.Module] = []
    for index in range(draw(st.integers(1, 2))):
        attention = _attention(dialect, 4 if windowed else length)
        if windowed:
            attention = Window(attention, 4, index % 2)
        blocks.append(Block(dialect, attention, [_norm(draw, dialect.norm) for _ in range(2)]))
    if draw(st.integers(0, 5)) == 5:
        blocks.append(blocks[0])  # one block, twice
    module = Transformer(
        front, blocks, _norm(draw, dialect.norm), length=length, cls=cls,
        positions=draw(st.sampled_from(["none", "own", "embedded"])),
        pool=draw(st.sampled_from(["all", "mean", "first", "last"])),
        tied=kind == "tokens" and draw(st.booleans()),
    ).double()  # fmt: skip
    settle(module, seed)
    return Network(module, (x,))


def _attention(dialect: Dialect, length: int) -> nn.Module:
    if dialect.kernel == "multihead":
        return MultiHead(dialect.heads, dialect.mask == "causal", length)
    return Attention(dialect, length)


def _norm(draw: Draw, kind: str) -> nn.Module:
    if kind == "batch":
        return TokenNorm(draw(batch_norms(1, WIDTH)))
    return {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "written rms": WrittenRMSNorm}[kind](WIDTH)
