"""Models whose values hide no error: random norms, and no parameter at a constant."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.zoo.inputs import MakeInputs
from graphopt.sources import randomize_norms


@torch.no_grad()
def wake(model: nn.Module, seed: int = 0) -> None:
    """Add noise to every parameter whose elements are all equal.

    Zero biases and layer scales of 1e-6 would hide whatever happens to them and to their branch.
    """
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        flat = parameter.flatten()
        if parameter.is_floating_point() and flat.numel() > 1 and bool((flat == flat[0]).all()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))


def finish(model: nn.Module, make: MakeInputs) -> tuple[nn.Module, MakeInputs]:
    """Random norms, no constants, eval mode; raises if the model does not run."""
    model.eval()
    wake(model)
    args, kwargs = make(2)
    randomize_norms(model, inputs=args if args else None)
    with torch.no_grad():
        model(*args, **kwargs)
    return model, make
