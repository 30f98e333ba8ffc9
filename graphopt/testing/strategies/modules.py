"""Modules that torch.nn lacks: norms and convolutions in other spellings, sums, shared modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class Constantly(nn.Module):
    """y + a constant."""

    def __init__(self, constant: Constant) -> None:
        super().__init__()
        self.constant = constant

    def forward(self, y: Tensor) -> Tensor:
        return y + self.constant(y)


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
