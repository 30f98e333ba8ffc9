"""A ResNet made ready to ship: folded, stored, loaded again, compared, timed."""

from __future__ import annotations

import statistics
import tempfile
import time

import torch
from torch import nn

import graphopt
from graphopt.torchvision_ops import declare_missing_ops

declare_missing_ops()  # torchvision may be built for another torch
from torchvision.models import resnet18  # noqa: E402


def milliseconds(models: list[nn.Module], x: torch.Tensor) -> list[float]:
    """Medians of calls in turn."""
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(7):
        for model, measured in zip(models, seconds, strict=True):
            start = time.perf_counter()
            model(x)
            measured.append(time.perf_counter() - start)
    return [statistics.median(one) * 1e3 for one in seconds]


def main() -> None:
    torch.manual_seed(0)
    model, x = resnet18(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for _ in range(3):  # statistics of norms, as training leaves them
            model(torch.randn(8, 3, 32, 32))
    model.eval()

    fast = graphopt.optimize(model, (x,), backend="prepacked")
    print(fast.report)
    with tempfile.TemporaryDirectory() as folder:
        fast.save(f"{folder}/resnet")
        shipped = graphopt.load(f"{folder}/resnet")
    print(graphopt.verify(model, shipped, (x,)))
    with torch.no_grad():
        before, after = milliseconds([model, shipped], x)
        assert shipped(torch.cat([x, x, x])).shape == (3, 1000)  # any batch size
    print(f"one image: {before:.1f} ms before, {after:.1f} ms after")


if __name__ == "__main__":
    main()
