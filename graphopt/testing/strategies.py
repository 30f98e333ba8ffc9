"""Hypothesis strategies for networks of convolutions, linear maps and norms.

`networks()` draws a `Network`: an nn.Module in eval mode and inputs for it. Its blocks are drawn
from every geometry that matters to a fold: rank, groups, stride, padding mode, dilation,
transposition, bias, affine parameters, gamma of either sign and zero, eps, what stands between map
and norm, norms before and after maps, sums, concatenations, several readers of a value, modules that
are called more than once, functional calls with keyword arguments, norms written out by hand. Some
of it folds, some must not; every network computes values of order one.

    @given(strategies.networks())
    def test_it(network):
        network.module(*network.inputs)

A network prints as the module it is, so a failing example reads as code. Smaller blocks, fewer of
them and plainer options shrink first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

Draw = Callable[[st.SearchStrategy[Any]], Any]
Shape = tuple[int, ...]

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
SIZES = {1: (9,), 2: (6, 5), 3: (4, 3, 4)}
MOST = 4096  # elements of an activation; blocks that make more are not drawn


@dataclasses.dataclass(frozen=True)
class Network:
    """A module in eval mode (but for norms that are meant to train) and inputs for it."""

    module: nn.Module
    inputs: tuple[Tensor, ...]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{list(one.shape)}" for one in self.inputs)
        return f"inputs of {shapes} into {self.module}"


# -- modules that torch.nn lacks ----------------------------------------------------------------


class Op(nn.Module):
    """A function as a module that prints its name."""

    def __init__(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.name = name
        self.function = function

    def extra_repr(self) -> str:
        return self.name

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class KeywordConv(nn.Module):
    """A convolution as a function call with nothing positional."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        one, rank = self.conv, self.conv.weight.ndim - 2
        name = f"conv_transpose{rank}d" if one.transposed else f"conv{rank}d"
        more = {"output_padding": one.output_padding} if one.transposed else {}
        call = getattr(F, name)
        return call(
            groups=one.groups, dilation=one.dilation, stride=one.stride, bias=one.bias,
            padding=one.padding, weight=one.weight, input=x, **more,
        )  # type: ignore[no-any-return]  # fmt: skip


class FrozenNorm(nn.Module):
    """A batch norm written out by hand: four buffers and arithmetic."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        def column(name: str) -> Tensor:
            return self.get_buffer(name).reshape(-1, *(1,) * (x.ndim - 2))

        scale = column("weight") / (column("running_var") + self.eps).sqrt()
        return x * scale + (column("bias") - column("running_mean") * scale)


class Scale(nn.Module):
    """A factor (and an offset) per channel."""

    def __init__(self, channels: int, shift: bool) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.randn(channels))
        self.offset = nn.Parameter(torch.randn(channels)) if shift else None

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *(1,) * (x.ndim - 2))
        y = self.factor.reshape(shape) * x
        return y if self.offset is None else y + self.offset.reshape(shape)


class Constant(nn.Module):
    """A parameter in place of a function of the input."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(shape))

    def extra_repr(self) -> str:
        return f"{list(self.value.shape)}"

    def forward(self, x: Tensor) -> Tensor:
        return self.value


class Join(nn.Module):
    """`norm(branches joined)` by "sum", "difference" or "cat"."""

    def __init__(self, how: str, branches: list[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.how = how
        self.branches = nn.ModuleList(branches)
        self.norm = norm

    def extra_repr(self) -> str:
        return self.how

    def forward(self, x: Tensor) -> Tensor:
        values = [branch(x) for branch in self.branches]
        if self.how == "cat":
            return self.norm(torch.cat(values, 1))
        total = values[0]
        for value in values[1:]:
            total = total + value if self.how == "sum" else total - value
        return self.norm(total)


class Shared(nn.Module):
    """Modules and values that are used more than once; `how` names one of the `USES`."""

    def __init__(self, how: str, convs: list[nn.Module], norms: list[nn.Module]) -> None:
        super().__init__()
        self.how = how
        self.convs = nn.ModuleList(convs)
        self.norms = nn.ModuleList(norms)

    def extra_repr(self) -> str:
        return self.how

    def forward(self, x: Tensor) -> Tensor:
        return USES[self.how][2](self.convs, self.norms, x)


def _two_norms(c: Any, n: Any, x: Tensor) -> Tensor:
    y = c[0](x)
    return n[0](y) + n[1](y)


def _conv_read_twice(c: Any, n: Any, x: Tensor) -> Tensor:
    y = c[0](x)
    return n[0](y) + torch.tanh(y)


def _norm_read_by_maps(c: Any, n: Any, x: Tensor) -> Tensor:
    y = n[0](x)
    return c[0](y) - c[1](y)


def _norm_read_by_others(c: Any, n: Any, x: Tensor) -> Tensor:
    y = n[0](x)
    return c[0](y) + torch.tanh(y).mean()


# name -> (convolutions, norms, function); norms[0] of those in NORM_FIRST see the input's channels.
USES: dict[str, tuple[int, int, Callable[[Any, Any, Tensor], Tensor]]] = {
    "one conv, called for two norms": (
        1, 2, lambda c, n, x: n[0](c[0](x)) + n[1](c[0](torch.relu(x)))
    ),
    "one norm for two convs": (2, 1, lambda c, n, x: n[0](c[0](x)) * n[0](c[1](x))),
    "one pair, called twice": (
        1, 1, lambda c, n, x: n[0](c[0](x)) + torch.relu(n[0](c[0](torch.relu(x))))
    ),
    "one conv read by two norms": (1, 2, _two_norms),
    "conv read twice": (1, 1, _conv_read_twice),
    "norm read by two convs": (2, 1, _norm_read_by_maps),
    "norm read by a conv and others": (1, 1, _norm_read_by_others),
}  # fmt: skip
NORM_FIRST = ("norm read by two convs", "norm read by a conv and others")


# -- drawing modules ----------------------------------------------------------------------------


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


class Constantly(nn.Module):
    """y + a constant."""

    def __init__(self, constant: Constant) -> None:
        super().__init__()
        self.constant = constant

    def forward(self, y: Tensor) -> Tensor:
        return y + self.constant(y)


def _pool(draw: Draw, name: str, spatial: Shape, **options: Any) -> nn.Module:
    rank = len(spatial)
    kernel = draw(st.integers(1, min(3, *spatial)))
    padding = draw(st.integers(0, kernel // 2))
    stride = draw(st.integers(1, 2))
    return getattr(nn, f"{name}{rank}d")(kernel, stride, padding, **options)  # type: ignore[no-any-return]


# -- drawing blocks -----------------------------------------------------------------------------


def measure(module: nn.Module, shape: Shape) -> Shape:
    """The output shape of a module for an input shape."""
    training = module.training
    with torch.no_grad():
        found = tuple(module.eval()(torch.zeros(shape)).shape)
    module.train(training)
    return found


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
    seed = draw(st.integers(0, 2**16))
    settle(module, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(source, generator=generator, dtype=torch.float64).to(dtype)
    return Network(module, (x,))


def _activation(draw: Draw) -> list[nn.Module]:
    return draw(st.sampled_from([[], [nn.ReLU()], [nn.Sigmoid()]]))  # type: ignore[no-any-return]


# -- values -------------------------------------------------------------------------------------


def settle(module: nn.Module, seed: int) -> None:
    """Give every parameter and statistic a value from `seed`, and every norm its mode.

    Where a norm uses batch statistics, no gamma is zero: such a norm makes numbers of order one of
    the rounding of a constant, and those cannot be compared.
    """
    batch_statistics = any(
        getattr(one, "stays_training", False) or not getattr(one, "track_running_stats", True)
        for one in module.modules()
    )
    generator = torch.Generator().manual_seed(seed)

    def fill(tensor: Tensor, low: float, high: float) -> None:
        drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.copy_(low + (high - low) * drawn)

    with torch.no_grad():
        for parameter in module.parameters():
            fan = max(1, parameter.numel() // max(1, parameter.shape[0]))
            fill(parameter, -2 / fan**0.5, 2 / fan**0.5)
        for one in module.modules():
            if getattr(one, "running_var", None) is not None:
                fill(one.running_mean, -1, 1)  # type: ignore[arg-type]
                fill(one.running_var, 0.1, 2)  # type: ignore[arg-type]
            gamma = getattr(one, "gamma", None)
            if gamma is not None and one.weight is not None:
                weight: Tensor = one.weight  # type: ignore[assignment]
                low, high = {"positive": (0.5, 2), "negative": (-2, -0.5)}.get(gamma, (-2, 2))
                fill(weight, low, high)
                if gamma == "zero" and not batch_statistics:
                    weight.zero_()
                elif gamma == "with zeros" and not batch_statistics:
                    weight[::2] = 0
    module.eval()
    for one in module.modules():
        if getattr(one, "stays_training", False):
            one.train()
