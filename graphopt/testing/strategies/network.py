"""What every strategy draws: a module and inputs for it, its values settled from one seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

Draw = Callable[[st.SearchStrategy[Any]], Any]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Network:
    """A module in eval mode (but for norms that are meant to train) and inputs for it:
    `module(*inputs, **kwargs)`. Only free-form programs have keyword inputs."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        shown = [_shown(one) for one in self.inputs]
        shown += [f"{key}={_shown(value)}" for key, value in self.kwargs.items()]
        return f"inputs of {', '.join(shown)} into {self.module}"


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    integers = "" if value.is_floating_point() else f" {value.dtype}".replace("torch.", "")
    return f"{list(value.shape)}{integers}"


def measure(module: nn.Module, shape: Shape) -> Shape:
    """The output shape of a module for an input shape."""
    training = module.training
    with torch.no_grad():
        found = tuple(module.eval()(torch.zeros(shape)).shape)
    module.train(training)
    return found


def normal(shape: Shape, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A normal random tensor."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def integers(shape: Shape, below: int, seed: int) -> Tensor:
    """Random integers in `[0, below)`."""
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))


def seeds() -> st.SearchStrategy[int]:
    """What the values of a network are drawn from."""
    return st.integers(0, 2**16)


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
