"""Fine-tune what was optimized (Tune mode): the same training, fewer operations, the same parameters.

A network with branches and batch norms is trained on digits, then fine-tuned on digits with their colours
inverted, once as it is and once optimized. .
"""

from __future__ import annotations

import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import graphopt


class Block(nn.Module):
    """relu(bn(conv3x3) + bn(conv1x1) + bn(x)), as RepVGG trains it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.point = nn.Conv2d(channels, channels, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        branches = (self.wide(x), self.point(x), x)
        return torch.relu(sum(norm(one) for norm, one in zip(self.norms, branches, strict=True)))


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, rate: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    draw = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=draw).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) == y).double().mean())


def main() -> None:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    (x, test_x), (y, test_y) = x.split([1280, 517]), y.split([1280, 517])

    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), Block(16), Block(16), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(256, 10),
    )  # fmt: skip
    train(model, x, y, epochs=2, rate=0.05)
    model.eval()
    print(f"trained: {accuracy(model, test_x, test_y):.1%} of digits,", end=" ")
    print(f"{accuracy(model, 1 - test_x, test_y):.1%} of inverted ones")

    tune = graphopt.optimize(model, (x[:4],), mode="tune")
    print(tune.report)
    source = copy.deepcopy(model)
    for one in (source, tune):
        train(one, 1 - x, y, epochs=1, rate=0.02)
    print(f"fine-tuned as it is: {accuracy(source, 1 - test_x, test_y):.1%},", end=" ")
    print(f"optimized: {accuracy(tune, 1 - test_x, test_y):.1%}")
    with torch.no_grad():
        away = max(
            float((tune.get_parameter(name) - one).abs().max())
            for name, one in source.named_parameters()
        )
    print(f"largest difference between their parameters: {away:.1e}")

    fast = graphopt.optimize(tune.eval(), (x[:4],))
    calls = [node for node in fast.graph_module.graph.nodes if node.op == "call_function"]
    print("deployed:", *(str(node.target).split(".")[1] for node in calls))
    print(f"accuracy {accuracy(fast, 1 - test_x, test_y):.1%}")


if __name__ == "__main__":
    main()
