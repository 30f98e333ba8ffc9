"""Networks of convolutions, linear maps and norms, in all the ways that may or must not fold."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import nn

from graphopt.testing.strategies.layers import between, convolutions, norms
from graphopt.testing.strategies.modules import NORM_FIRST, USES, Constant, Join, Op, Shared
from graphopt.testing.strategies.network import (
    Draw,
    Network,
    Shape,
    measure,
    normal,
    seeds,
    settle,
)

SIZES = {1: (9,), 2: (6, 5), 3: (4, 3, 4)}
MOST = 4096  # elements of an activation; blocks that make more are not drawn


@st.composite
def blocks(draw: Draw, shape: Shape) -> nn.Module:
    """A block for inputs `[N, C, *spatial]`, with at least one norm in it."""
    rank = len(shape) - 2
    kind = draw(st.sampled_from(["map, norm", "norm, map", "join", "shared"]))
    if kind == "map, norm":
        layers = [draw(convolutions(shape))]
        after = measure(layers[0], shape)
        for _ in range(draw(st.integers(0, 2))):
            layers.append(draw(between(after)))
            after = measure(layers[-1], after)
        layers += [draw(norms(rank, after[1])) for _ in range(draw(st.sampled_from([1, 1, 2])))]
        return nn.Sequential(*layers)
    if kind == "norm, map":
        layers = [draw(norms(rank, shape[1]))]
        after = shape
        if draw(st.booleans()):
            layers.append(draw(between(shape)))
            after = measure(layers[-1], shape)
        return nn.Sequential(*layers, draw(convolutions(after)))
    if kind == "join":
        return _joined(draw, shape)
    how = draw(st.sampled_from(sorted(USES)))
    count, norm_count, _ = USES[how]
    out = draw(st.sampled_from([shape[1], 4]))
    convs = [draw(convolutions(shape, out, keep=True)) for _ in range(count)]
    seen = shape[1] if how in NORM_FIRST else out
    return Shared(how, convs, [draw(norms(rank, seen)) for _ in range(norm_count)])


def _joined(draw: Draw, shape: Shape) -> nn.Module:
    rank, channels = len(shape) - 2, shape[1]
    how = draw(st.sampled_from(["sum", "difference", "cat"]))
    out = channels if how != "cat" else None

    def branch() -> nn.Module:
        kind = draw(st.sampled_from(["conv", "conv", "conv", "pair", "input", "relu", "constant"]))
        if kind == "input":
            return nn.Identity()
        if kind == "relu":
            return nn.ReLU()
        if kind == "constant" and how != "cat":
            sizes = shape[2:] if draw(st.booleans()) else (1,) * rank
            return Constant(draw(st.sampled_from([1, channels])), *sizes)
        conv = draw(convolutions(shape, out or draw(st.integers(1, 3)), keep=True))
        if kind == "pair":
            return nn.Sequential(conv, draw(norms(rank, measure(conv, shape)[1])))
        return conv

    # At least one branch has the full shape.
    first = draw(convolutions(shape, out, keep=True))
    branches = [first, *(branch() for _ in range(draw(st.integers(1, 2))))]
    if draw(st.booleans()):
        branches.reverse()
    total = channels if how != "cat" else sum(measure(one, shape)[1] for one in branches)
    return Join(how, branches, draw(norms(rank, total)))


@st.composite
def heads(draw: Draw, shape: Shape) -> nn.Module:
    """From `[N, C, *spatial]` to `[N, features]`, with a norm before or behind a linear map."""
    rank = len(shape) - 2
    layers: list[nn.Module] = []
    if draw(st.booleans()):
        layers.append(draw(norms(rank, shape[1])))
    if draw(st.booleans()):
        layers.append(getattr(nn, f"AdaptiveAvgPool{rank}d")(draw(st.integers(1, 2))))
    layers.append(nn.Flatten())
    features = measure(nn.Sequential(*layers), shape)[1]
    layers.append(nn.Linear(features, draw(st.integers(1, 4)), bias=draw(st.booleans())))
    if draw(st.booleans()):
        layers.append(draw(norms(0, layers[-1].out_features)))  # type: ignore[arg-type]
    return nn.Sequential(*layers)


@st.composite
def sequences(draw: Draw, shape: Shape) -> nn.Module:
    """Linear maps and norms on `[N, L, C]`: the norm is over L, or over C between transposes."""
    _, length, features = shape
    out = draw(st.sampled_from([length, features, 3]))
    linear = nn.Linear(features, out, bias=draw(st.booleans()))
    kind = draw(st.sampled_from(
        ["linear, norm of L", "linear, norm of C", "norm of L, linear", "norm of C, linear"]
    ))  # fmt: skip
    over = {"linear, norm of C": out, "norm of C, linear": features}.get(kind, length)
    norm: nn.Module = draw(norms(1, over))
    if kind.endswith("C") or "norm of C" in kind:
        norm = nn.Sequential(
            Op("transposed", lambda y: y.transpose(1, 2)), norm, Op("back", lambda y: y.mT)
        )
    return nn.Sequential(linear, norm) if kind.startswith("linear") else nn.Sequential(norm, linear)


@st.composite
def networks(draw: Draw, *, dtype: torch.dtype = torch.float64, max_blocks: int = 3) -> Network:
    """One to `max_blocks` blocks in a row, an activation between some, a linear head on some."""
    batch = draw(st.integers(2, 3))
    layers: list[nn.Module] = []
    if draw(st.integers(0, 5)) == 5:
        shape: Shape = (batch, draw(st.integers(2, 5)), draw(st.integers(2, 5)))
        source = shape
        for _ in range(draw(st.integers(1, max_blocks))):
            layers += [draw(sequences(shape)), *_activation(draw)]
            shape = measure(layers[-1] if len(layers) == 1 else nn.Sequential(*layers), source)
    else:
        rank = draw(st.integers(1, 3))
        shape = source = (batch, draw(st.integers(1, 4)), *SIZES[rank])
        for _ in range(draw(st.integers(1, max_blocks))):
            layer = draw(blocks(shape))
            after = measure(layer, shape)
            if torch.Size(after).numel() > MOST or min(after[2:]) < 2:
                layers.append(layer)
                shape = after
                break
            layers += [layer, *_activation(draw)]
            shape = after
        if draw(st.integers(0, 3)) == 3 and torch.Size(shape).numel() <= MOST:
            layers.append(draw(heads(shape)))
    module = nn.Sequential(*layers).to(dtype)
    seed = draw(seeds())
    settle(module, seed)
    return Network(module, (normal(source, seed, dtype),))


def _activation(draw: Draw) -> list[nn.Module]:
    return draw(st.sampled_from([[], [nn.ReLU()], [nn.Sigmoid()]]))  # type: ignore[no-any-return]
