"""merge-regions around convolutions of single pixels, and with windows, scatters and columns of ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import calls, optimized, tensor

CHANNELS, OUT = 8, 12
Body = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """`body` between two activations, over a map of single pixels, or of features, and parameters."""

    def __init__(self, body: Body, rank: int = 2, **options: int) -> None:
        super().__init__()
        self.body, self.linear = body, nn.Linear(CHANNELS, OUT)
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        self.conv = conv(CHANNELS, OUT, **{"kernel_size": 1, **options})
        for seed, (name, shape) in enumerate(
            {"blocks": (2, 4, 4), "scale": (CHANNELS,), "wide": (OUT, CHANNELS), "shift": (OUT,),
             "narrow": (5, CHANNELS)}.items()
        ):  # fmt: skip
            self.register_parameter(name, nn.Parameter(tensor(*shape, seed=seed)))
        self.register_buffer("order", torch.tensor([3, 1, 7, 0, 2, 6, 5, 4, 10, 8, 11, 9]))
        self.register_buffer("some", torch.tensor([7, 0, 11, 4, 2]))
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x.sin()).relu()


def turned(m: Net, x: Tensor) -> Tensor:
    """Blocks of channels, turned, by rows of pixels."""
    rows = x.movedim(1, -1)
    blocks = torch.einsum("...rk,rkc->...rc", rows.reshape(-1, 2, 4), m.blocks)
    return blocks.reshape(rows.shape).movedim(-1, 1)


def as_windows(m: Net, x: Tensor) -> Tensor:
    """The same by windows of one pixel, as a library for windows of any size writes it."""
    n, _, h, w = x.shape
    windows = x.unfold(2, 1, 1).unfold(3, 1, 1).permute(0, 2, 3, 1, 4, 5).contiguous()
    blocks = torch.einsum("...rk,rkc->...rc", windows.view(n * h * w, 2, 4), m.blocks)
    columns = blocks.reshape(n, h, w, CHANNELS, 1, 1).permute(0, 3, 1, 2, 4, 5).contiguous()
    return F.fold(columns.view(n, CHANNELS, h * w), (h, w), 1)


def spectrum(m: Net, x: Tensor) -> Tensor:
    kernel = torch.fft.rfft(m.scale)[:, None, None]
    return torch.fft.irfft(torch.fft.rfft(x, dim=1) * kernel, n=CHANNELS, dim=1)


PIXELS: dict[str, Body] = {
    "turned in front": lambda m, x: m.conv(turned(m, x)),
    "turned by windows of one pixel": lambda m, x: m.conv(as_windows(m, x)),
    "a linear map beside": lambda m, x: m.conv(x)
    + F.linear(x.permute(0, 2, 3, 1), m.wide, m.shift).permute(0, 3, 1, 2),
    "shifted and filtered in front": lambda m, x: m.conv(
        spectrum(m, x) + m.scale[:, None, None]
    ),
    "shuffled in front": lambda m, x: m.conv(
        x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
    ),
}  # fmt: skip


SHORT = "canonicalize,merge-regions,materialize,canonicalize"


@pytest.mark.parametrize("name", PIXELS)
def test_what_is_affine_in_each_pixel_goes_into_a_convolution_of_pixels(name: str) -> None:
    fast = optimized(Net(PIXELS[name]), "deploy", (2, CHANNELS, 5, 6), passes=SHORT)
    assert calls(fast) == ["sin", "conv2d", "relu"]


def test_and_stays_trainable() -> None:
    model = Net(PIXELS["turned by windows of one pixel"])
    fast = optimized(model, "tune", (1, CHANNELS, 1, 3), passes="canonicalize,merge-regions")
    assert calls(fast).count("conv2d") == 2  # one of them of parameters alone


@pytest.mark.parametrize(
    ("rank", "options"), [(1, {}), (3, {}), (2, {"groups": 4}), (2, {"bias": False})], ids=str
)
def test_of_every_rank_and_grouping(rank: int, options: dict[str, int]) -> None:
    model = Net(PIXELS["turned in front"], rank, **options)
    shape = (2, CHANNELS, *(3, 4, 5)[:rank])
    fast = optimized(model, "deploy", shape, passes=SHORT)
    assert calls(fast) == ["sin", f"conv{rank}d", "relu"]


APART: dict[str, tuple[Body, dict[str, int]]] = {
    "a nonlinear pixel": (lambda m, x: m.conv(turned(m, x).abs()), {}),
    "mixed pixels": (lambda m, x: m.conv(x.flip(2) * m.scale[:, None, None]), {}),
    "each pixel otherwise": (
        lambda m, x: m.conv(turned(m, x) * torch.arange(6, dtype=x.dtype)), {}
    ),
    "windows of several": (lambda m, x: m.conv(turned(m, x)), {"kernel_size": 3, "padding": 1}),
    "a border": (lambda m, x: m.conv(turned(m, x) + m.scale[:, None, None]), {"padding": 1}),
    "steps": (lambda m, x: m.conv(turned(m, x)), {"stride": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", APART)
def test_what_is_not_stays_and_is_right(name: str) -> None:
    body, options = APART[name]
    fast = optimized(Net(body, **options), "deploy", (2, CHANNELS, 5, 6), passes=SHORT)
    assert calls(fast) != ["sin", "conv2d", "relu"]


def test_windows_of_several_pixels_are_not_respelled() -> None:
    model = Net(lambda m, x: m.conv(x.unfold(3, 2, 1).sum(-1)))
    assert "unfold" in calls(optimized(model, "deploy", (2, CHANNELS, 5, 6), passes=SHORT))


# -- scatters -----------------------------------------------------------------------------------


def scattered(m: Net, x: Tensor, index: Tensor, source: Tensor) -> Tensor:
    index = index.expand(*x.shape[:-1], -1)
    return torch.zeros(*x.shape[:-1], OUT, dtype=x.dtype).scatter(-1, index, source)


SCATTERS: dict[str, Body] = {
    "all": lambda m, x: m.linear(x) + scattered(m, x, m.order, F.linear(x, m.wide)),
    "some": lambda m, x: m.linear(x) + scattered(m, x, m.some, F.linear(x, m.narrow)),
    "with a column of ones": lambda m, x: m.linear(x) + scattered(
        m, x, m.some,
        F.linear(torch.cat([x, torch.ones(*x.shape[:-1], 1, dtype=x.dtype)], -1),
                 torch.cat([m.narrow, m.shift[:5, None]], 1)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", [(2, CHANNELS), (2, 3, CHANNELS)], ids=str)
@pytest.mark.parametrize("name", SCATTERS)
def test_what_is_scattered_into_zeros_merges(name: str, shape: tuple[int, ...]) -> None:
    fast = optimized(Net(SCATTERS[name]), "deploy", shape, passes=SHORT)
    assert calls(fast) == ["sin", "linear", "relu"]


KEPT: dict[str, Body] = {
    "one place twice": lambda m, x: scattered(
        m, x, torch.tensor([7, 0, 7, 4, 2]), F.linear(x, m.narrow)
    ),
    "each token otherwise": lambda m, x: torch.zeros(*x.shape[:-1], OUT, dtype=x.dtype).scatter(
        -1, torch.stack([m.some, m.some + 1 - m.some % 2 * 2, m.some]).expand(len(x), -1, -1),
        F.linear(x, m.narrow),
    ),
    "into ones": lambda m, x: torch.ones(*x.shape[:-1], OUT, dtype=x.dtype).scatter(
        -1, m.some.expand(*x.shape[:-1], -1), F.linear(x, m.narrow)
    ),
    "over tokens": lambda m, x: torch.zeros(len(x), 4, 5, dtype=x.dtype).scatter(
        1, torch.tensor([2, 0, 3])[:, None].expand(len(x), -1, 5), F.linear(x, m.narrow)
    ),
    "part of the source": lambda m, x: scattered(m, x, m.some, F.linear(x, m.wide)),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_other_scatters_stay_right(name: str) -> None:
    model = Net(lambda m, x: KEPT[name](m, x).sum(-1))
    fast = optimized(model, "deploy", (2, 3, CHANNELS), passes=SHORT)
    assert len(calls(fast)) > 3
    assert ("scatter" in calls(fast)) == (name != "over tokens")
