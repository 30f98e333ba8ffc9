"""Single layers in every geometry that matters to a fold: convolutions, norms, and what may stand
between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from torch import nn

from graphopt.testing.strategies.modules import (
    Constant,
    Constantly,
    FrozenNorm,
    KeywordConv,
    Op,
    Scale,
)
from graphopt.testing.strategies.network import Draw, Shape

CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE: dict[int, Any] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
BATCH_NORM: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM: dict[int, Any] = {
    1: nn.InstanceNorm1d,
    2: nn.InstanceNorm2d,
    3: nn.InstanceNorm3d,
}
GAMMAS = ("positive", "mixed", "with zeros", "negative", "zero")


@st.composite
def convolutions(draw: Draw, shape: Shape, out: int | None = None, keep: bool = False) -> nn.Module:
    """A convolution for inputs `[N, C, *spatial]`, any kind that fits.

    `out` fixes the number of output channels; `keep` makes a plain one that keeps spatial sizes.
    """
    channels, spatial = shape[1], shape[2:]
    rank = len(spatial)
    bias = draw(st.booleans())
    divisors = [g for g in (1, 2, channels) if channels % g == 0 and (out is None or out % g == 0)]
    groups = draw(st.sampled_from(sorted(set(divisors))))
    if out is None:
        out = groups * draw(st.integers(1, max(1, 6 // groups)))
    if keep:
        kernel = [draw(st.sampled_from([1, 3])) for _ in spatial]
        padding: Any = "same" if draw(st.booleans()) else tuple(k // 2 for k in kernel)
        return CONV[rank](channels, out, kernel, padding=padding, groups=groups, bias=bias)
    if draw(st.booleans()) and draw(st.booleans()):
        return _wrapped(draw, _transposed(draw, channels, out, spatial, groups, bias))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    dilation = [draw(st.integers(1, 2)) for _ in spatial]
    stride = [draw(st.integers(1, 2)) for _ in spatial]
    kind = draw(st.sampled_from(["sizes", "same", "valid"]))
    padding = kind
    if kind == "same":
        stride = [1] * rank
    if kind == "sizes":
        padding = tuple(draw(st.integers(0, min(2, size - 1))) for size in spatial)
    # A kernel that fits into the padded input (and, for "same", pads less than an input's size).
    room = [
        size if kind != "sizes" else size + 2 * pad
        for size, pad in zip(spatial, padding if kind == "sizes" else spatial, strict=True)
    ]
    kernel = [
        draw(st.integers(1, max(1, min(3, (one - 1) // d + 1))))
        for one, d in zip(room, dilation, strict=True)
    ]
    return _wrapped(
        draw,
        CONV[rank](channels, out, kernel, stride, padding, dilation, groups, bias, mode),
    )


def _transposed(
    draw: Draw, channels: int, out: int, spatial: Shape, groups: int, bias: bool
) -> nn.Module:
    geometry = []
    for size in spatial:
        kernel, stride, dilation = (draw(st.integers(1, most)) for most in (3, 2, 2))
        extra = draw(st.integers(0, max(stride, dilation) - 1))
        length = (size - 1) * stride + dilation * (kernel - 1) + 1 + extra
        padding = draw(st.integers(0, min(1, (length - 1) // 2)))
        geometry.append((kernel, stride, padding, extra, dilation))
    kernels, strides, paddings, extras, dilations = zip(*geometry, strict=True)
    return CONV_TRANSPOSE[len(spatial)](
        channels, out, kernels, strides, paddings, extras, groups, bias, dilations
    )


def _wrapped(draw: Draw, conv: Any) -> nn.Module:
    """Now and then the same convolution as a functional call."""
    plain = conv.padding_mode == "zeros"
    return KeywordConv(conv) if plain and draw(st.integers(0, 3)) == 3 else conv


NORMS = ("batch", "batch", "batch", "batch", "instance", "frozen", "no statistics", "training")


@st.composite
def norms(draw: Draw, rank: int, channels: int) -> nn.Module:
    """A norm over axis 1 of `[N, channels, *spatial]`; rank 0 is `[N, channels]`.

    Mostly batch norms with running statistics; also instance norms that use theirs, norms written
    out by hand, and norms that use batch statistics and must not fold. Its values are set by
    `settle`, with the sign of gamma that is drawn here.
    """
    kind = draw(st.sampled_from(NORMS))
    affine = draw(st.booleans()) or draw(st.booleans())
    # Over a few equal numbers, batch statistics and a small eps would magnify their rounding.
    batch_statistics = kind in ("no statistics", "training")
    eps = 0.5 if batch_statistics else draw(st.sampled_from([1e-5, 1e-3, 0.5]))
    norm: nn.Module
    if kind == "frozen":
        norm = FrozenNorm(channels, eps)
    elif kind == "instance" and rank > 0:
        norm = INSTANCE_NORM[rank](channels, eps=eps, affine=affine, track_running_stats=True)
    else:
        keeps = kind != "no statistics"
        norm = BATCH_NORM[max(rank, 1)](channels, eps, affine=affine, track_running_stats=keeps)
    norm.gamma = draw(st.sampled_from(GAMMAS))  # type: ignore[assignment]
    norm.stays_training = kind == "training"  # type: ignore[assignment]
    return norm


@st.composite
def between(draw: Draw, shape: Shape) -> nn.Module:
    """Something that may stand between a map and a norm, on inputs `[N, C, *spatial]`."""
    channels, spatial = shape[1], shape[2:]
    rank = len(spatial)
    choices: list[Callable[[], nn.Module]] = [
        nn.Identity,
        nn.ReLU,
        nn.Dropout,
        lambda: Op("3 * y", lambda y: 3 * y),
        lambda: Op("y + 1", lambda y: y + 1),
        lambda: Op("-y", lambda y: -y),
        lambda: Op("channels last and back", lambda y: y.movedim(1, -1).movedim(-1, 1)),
        lambda: Op("channels last copied", lambda y: y.movedim(1, -1).contiguous().movedim(-1, 1)),
        lambda: Op("flat and back", lambda y: y.flatten(2).unflatten(2, y.shape[2:])),
        lambda: Scale(channels, draw(st.booleans())),
        lambda: Constantly(Constant(channels, *(1,) * rank)),
        lambda: Op("without the first pixels", lambda y: y[:, :, y.shape[2] // 2 :]),
        lambda: Op("channels in reverse", lambda y: y.flip(1)),
        lambda: Op("mean, kept", lambda y: y.mean(tuple(range(2, y.ndim)), keepdim=True)),
        lambda: _pool(draw, "AvgPool", spatial, count_include_pad=draw(st.booleans()),
                      ceil_mode=draw(st.booleans())),
        lambda: _pool(draw, "MaxPool", spatial),
        lambda: getattr(nn, f"AdaptiveAvgPool{rank}d")(draw(st.integers(1, 3))),
        lambda: getattr(nn, f"ConstantPad{rank}d")(draw(st.integers(0, 1)), 0.5),
        lambda: getattr(nn, f"ZeroPad{rank}d")(1),
        lambda: getattr(nn, f"ReplicationPad{rank}d")(1),
        lambda: nn.Upsample(scale_factor=2, mode=draw(st.sampled_from(
            ["nearest", ("linear", "bilinear", "trilinear")[rank - 1]]))),
    ]  # fmt: skip
    if min(spatial) > 1:
        choices.append(lambda: getattr(nn, f"ReflectionPad{rank}d")(1))
    if channels % 2 == 0 and rank == 2:
        choices.append(lambda: nn.ChannelShuffle(2))
    if channels % 4 == 0 and rank == 2:
        choices.append(lambda: nn.PixelShuffle(2))
    return draw(st.sampled_from(choices))()


def _pool(draw: Draw, name: str, spatial: Shape, **options: Any) -> nn.Module:
    rank = len(spatial)
    kernel = draw(st.integers(1, min(3, *spatial)))
    padding = draw(st.integers(0, kernel // 2))
    stride = draw(st.integers(1, 2))
    return getattr(nn, f"{name}{rank}d")(kernel, stride, padding, **options)  # type: ignore[no-any-return]
