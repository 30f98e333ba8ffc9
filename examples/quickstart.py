"""Optimize a small convolutional network, look at the report, save and load it."""

from __future__ import annotations

import tempfile

import torch
from torch import nn

import graphopt


def main() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 15 * 15, 10), nn.BatchNorm1d(10),
    ).eval()  # fmt: skip
    x = torch.randn(4, 3, 32, 32)
    fast = graphopt.optimize(model, (x,))
    print(fast.report)
    with tempfile.TemporaryDirectory() as folder:
        fast.save(f"{folder}/model")
        again = graphopt.load(f"{folder}/model")
    print("loaded, largest difference:", float((again(x) - model(x)).abs().max().detach()))


if __name__ == "__main__":
    main()
