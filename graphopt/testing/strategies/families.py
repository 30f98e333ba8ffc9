"""The bricks of the families: batch norms, activations, and both behind a convolution."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.testing.strategies.layers import BATCH_NORM, CONV, GAMMAS, norms
from graphopt.testing.strategies.network import Draw

ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU, lambda: nn.ReLU(inplace=True), nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU, nn.LeakyReLU,
    nn.PReLU, nn.ELU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Hardtanh, nn.Identity,
    lambda: nn.SiLU(inplace=True), lambda: nn.GELU("tanh"),
)  # fmt: skip


def activations() -> st.SearchStrategy[nn.Module]:
    """An elementwise nonlinearity, in place or not."""
    return st.sampled_from(ACTIVATIONS).map(lambda make: make())


@st.composite
def batch_norms(draw: Draw, rank: int, channels: int) -> nn.Module:
    """An eval batch norm with gamma of any sign; now and then another of `layers.norms`."""
    if draw(st.integers(0, 5)) == 5:
        return draw(norms(rank, channels))
    norm = BATCH_NORM[max(rank, 1)](channels, draw(st.sampled_from([1e-5, 1e-3])))
    norm.gamma = draw(st.sampled_from(GAMMAS))
    return norm


@st.composite
def units(
    draw: Draw, rank: int, channels: int, out: int, *, kernel: int = 3, stride: int = 1,
    groups: int = 1, order: str = "map norm activation",
) -> nn.Sequential:  # fmt: skip
    """A convolution that keeps spatial sizes (or divides them by `stride`), with what `order` names
    around it."""
    layers: list[nn.Module] = []
    width = channels
    for part in order.split():
        if part == "map":
            bias = draw(st.booleans())
            layers.append(
                CONV[rank](channels, out, kernel, stride, kernel // 2, groups=groups, bias=bias)
            )
            width = out
        else:
            layers.append(draw(batch_norms(rank, width)) if part == "norm" else draw(activations()))
    return nn.Sequential(*layers)


@st.composite
def classifiers(draw: Draw, rank: int, channels: int) -> nn.Module:
    """From `[N, channels, *spatial]` to logits `[N, 3]`: pooled or flattened, dropout, linear."""
    pool = getattr(nn, f"Adaptive{draw(st.sampled_from(['Avg', 'Max']))}Pool{rank}d")
    size = draw(st.integers(1, 2))
    layers: list[nn.Module] = [pool(size), nn.Flatten()]
    if draw(st.booleans()):
        layers.append(nn.Dropout(0.3))
    return nn.Sequential(*layers, nn.Linear(channels * size**rank, 3))


class Residual(nn.Module):
    """`activation(branch(x) * scale + shortcut(x))`."""

    def __init__(
        self, branch: nn.Module, shortcut: nn.Module, activation: nn.Module, inplace: bool = False,
        scale: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.branch, self.shortcut, self.activation = branch, shortcut, activation
        self.inplace, self.scale = inplace, scale

    def extra_repr(self) -> str:
        return f"inplace={self.inplace}, scale={self.scale}"

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if self.scale != 1:
            y = self.scale * y
        if self.inplace:
            y += self.shortcut(x)
        else:
            y = y + self.shortcut(x)
        return self.activation(y)


class Concat(nn.Module):
    """The outputs of all branches, side by side along the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)
