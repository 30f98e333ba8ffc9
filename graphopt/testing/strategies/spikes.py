"""Spiking networks: integrate-and-fire neurons unrolled over T time steps in plain PyTorch.

    v <- v + (x - v) / tau   (or v + x),    spike = v >= threshold,    v <- reset(v, spike)

A spike is a discontinuous function of everything before it. Values are random float64 numbers, so
the chance that a membrane comes within rounding (1e-13) of its threshold is about 1e-12 per
comparison, 1e-8 per network: no margin is built in. Thresholds stay off the round numbers which
exact arithmetic could hit, and norms whose gamma is zero still differ by their random offsets.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.testing.strategies.families import batch_norms
from graphopt.testing.strategies.layers import CONV
from graphopt.testing.strategies.network import Draw, Network, normal, seeds, settle

STEPS = ("multi-step", "single-step")
SPIKES = ("cast", "where", "heaviside", "straight through")
RESETS = ("soft", "hard", "detached")
INPUTS = ("repeated", "frames first", "frames second")


@dataclasses.dataclass(frozen=True)
class Dynamics:
    """The equations of one neuron."""

    leak: float | None = 2.0  # tau; None does not leak
    decay_input: bool = True
    threshold: float = 0.6180339887
    spike: str = "cast"
    reset: str = "soft"

    def charge(self, v: Tensor, x: Tensor) -> Tensor:
        if self.leak is None:
            return v + x
        if self.decay_input:
            return v + (x - v) / self.leak
        return v * (1 - 1 / self.leak) + x

    def fire(self, v: Tensor) -> Tensor:
        over = v - self.threshold
        if self.spike == "where":
            return torch.where(v >= self.threshold, 1.0, 0.0).to(v.dtype)
        if self.spike == "heaviside":
            return torch.heaviside(over, torch.ones_like(over[:1, :1]))
        hard = (over >= 0).to(v.dtype)
        if self.spike == "straight through":
            soft = torch.sigmoid(4 * over)
            return hard.detach() - soft.detach() + soft
        return hard

    def after(self, v: Tensor, spike: Tensor) -> Tensor:
        if self.reset == "soft":
            return v - spike * self.threshold
        if self.reset == "hard":
            return v * (1 - spike)
        return torch.where(spike.detach() > 0.5, torch.zeros_like(v), v)


class Neuron(nn.Module):
    """A layer of neurons; `norm` (MPBN) normalizes the membrane before it is compared."""

    def __init__(self, dynamics: Dynamics, norm: nn.Module) -> None:
        super().__init__()
        self.dynamics, self.norm = dynamics, norm

    def extra_repr(self) -> str:
        return f"{self.dynamics}"

    def step(self, x: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
        """Spikes and membrane after one step of `[N, C, *spatial]`."""
        v = self.dynamics.charge(torch.zeros_like(x) if v is None else v, x)
        v = self.norm(v)
        spike = self.dynamics.fire(v)
        return spike, self.dynamics.after(v, spike)

    def forward(self, x: Tensor) -> Tensor:
        """All steps of `[T, N, C, *spatial]`."""
        v, spikes = None, []
        for current in x:
            spike, v = self.step(current, v)
            spikes.append(spike)
        return torch.stack(spikes)


class ThresholdNorm(nn.Module):
    """tdBN: a batch norm scaled by alpha times the threshold."""

    def __init__(self, norm: nn.Module, scale: float) -> None:
        super().__init__()
        self.norm, self.scale = norm, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.norm(x)


class StepNorms(nn.Module):
    """BNTT: every time step has its own norm; `[T, N, C, *spatial]`."""

    def __init__(self, norms: list[nn.Module]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norms)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([norm(one) for norm, one in zip(self.norms, x, strict=True)])


class Flat(nn.Module):
    """Stateless layers on `[T, N, ...]`, all steps as one batch of T * N."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Spiking(nn.Module):
    """`[map, neuron] * depth`, then a linear readout of mean spikes.

    "single-step" carries membranes through a loop over time and calls every layer T times;
    "multi-step" runs layer by layer on all steps. `frames`: how the input holds time.
    """

    def __init__(
        self, maps: list[nn.Module], neurons: list[nn.Module], readout: nn.Module, *, steps: str,
        frames: str, time: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.maps, self.neurons = nn.ModuleList(maps), nn.ModuleList(neurons)
        self.readout = readout
        self.steps, self.frames, self.time = steps, frames, time

    def extra_repr(self) -> str:
        return f"{self.steps}, {self.frames}, T={self.time}"

    def forward(self, x: Tensor) -> Tensor:
        if self.frames == "repeated":
            x = x.unsqueeze(0).repeat(self.time, *(1,) * x.ndim)
        elif self.frames == "frames second":
            x = x.transpose(0, 1)
        if self.steps == "multi-step":
            for layer, neuron in zip(self.maps, self.neurons, strict=True):
                x = neuron(layer(x))
            return self.readout(x.flatten(2).mean(0))
        states: list[Any] = [None] * len(self.neurons)
        total: Any = 0
        for t in range(self.time):
            y = x[t]
            for i, (layer, neuron) in enumerate(zip(self.maps, self.neurons, strict=True)):
                y, states[i] = neuron.step(layer(y), states[i])  # type: ignore[operator]
            total = total + self.readout(y.flatten(1))
        return total / self.time


@st.composite
def dynamics(draw: Draw) -> Dynamics:
    """Leaky or not, every threshold function, every reset."""
    return Dynamics(
        draw(st.sampled_from([2.0, None, 4.0 / 3.0])), draw(st.booleans()),
        draw(st.sampled_from([0.6180339887, 0.3141592654])),
        draw(st.sampled_from(SPIKES)), draw(st.sampled_from(RESETS)),
    )  # fmt: skip


@st.composite
def spiking(draw: Draw) -> Network:
    """One to three layers of neurons over two to four steps, convolutional or linear."""
    rank = draw(st.sampled_from([2, 0, 1]))
    steps, frames = draw(st.sampled_from(STEPS)), draw(st.sampled_from(INPUTS))
    time, rows = draw(st.integers(2, 4)), draw(st.integers(2, 3))
    equations = draw(dynamics())
    channels, spatial = 3, {0: (), 1: (6,), 2: (5, 5)}[rank]
    shape = {
        "repeated": (rows, channels, *spatial),
        "frames first": (time, rows, channels, *spatial),
        "frames second": (rows, time, channels, *spatial),
    }[frames]
    maps: list[nn.Module] = []
    neurons: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        out = draw(st.sampled_from([4, 3]))
        maps.append(_map(draw, rank, channels, out, equations, steps, time))
        membrane = draw(st.booleans()) and draw(st.booleans())
        neurons.append(
            Neuron(equations, draw(batch_norms(rank, out)) if membrane else nn.Identity())
        )
        channels = out
    size = channels * torch.Size(spatial).numel()
    module = Spiking(maps, neurons, nn.Linear(size, 3), steps=steps, frames=frames, time=time)
    seed = draw(seeds())
    settle(module.double(), seed)
    return Network(module, (normal(shape, seed),))


def _map(
    draw: Draw, rank: int, channels: int, out: int, equations: Dynamics, steps: str, time: int
) -> nn.Module:
    """A convolution or linear map and its norm, for one step or for all."""
    bias = draw(st.booleans())
    linear: nn.Module = (
        CONV[rank](channels, out, 3, padding=1, bias=bias)
        if rank
        else nn.Linear(channels, out, bias=bias)
    )
    kind = draw(st.sampled_from(["batch", "threshold", "none", "every step"]))
    norm: nn.Module = nn.Identity()
    if kind == "every step" and steps == "multi-step":
        return nn.Sequential(
            Flat(linear), StepNorms([draw(batch_norms(rank, out)) for _ in range(time)])
        )
    if kind != "none":
        norm = draw(batch_norms(rank, out))
    if kind == "threshold":
        norm = ThresholdNorm(norm, 0.9 * equations.threshold)
    both = nn.Sequential(linear, norm)
    return Flat(both) if steps == "multi-step" else both
