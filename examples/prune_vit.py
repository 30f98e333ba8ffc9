"""A vision transformer at half of its operations, and a few steps of healing.

`prune` knows no architecture: what belongs together is found in the graph, and the result is checked against
the source with masks on every value.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import graphopt
from graphopt.passes.prune import Prune
from graphopt.torchvision_ops import declare_missing_ops

declare_missing_ops()  # torchvision may be built for another torch
from torchvision.models import VisionTransformer  # noqa: E402


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for rows in torch.randint(len(x), (steps, 64)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) == y).double().mean())


def main() -> None:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8).expand(-1, 3, -1, -1) / 16
    y = torch.tensor(labels)
    (x, test_x), (y, test_y) = x.split([1280, 517]), y.split([1280, 517])
    model = VisionTransformer(
        image_size=8,
        patch_size=4,
        num_layers=2,
        num_heads=4,
        hidden_dim=32,
        mlp_dim=64,
        num_classes=10,
    )
    train(model, x, y, steps=120)
    model.eval()
    print(f"trained: {accuracy(model, test_x, test_y):.1%}")
    print(str(graphopt.channel_groups(model, (x[:2],))).partition("\n")[0], "were found")

    data = [(x[:256], y[:256])]
    prune = Prune(
        target_flops=0.5, importance="taylor", data=data, loss=nn.functional.cross_entropy
    )
    small = graphopt.optimize(model, (x[:2],), passes=[prune], mode="tune")
    print(small.report)
    print(f"pruned: {accuracy(small, test_x, test_y):.1%};", end=" ")
    train(small, x, y, steps=40)
    print(f"{accuracy(small, test_x, test_y):.1%} after 40 steps")


if __name__ == "__main__":
    main()
