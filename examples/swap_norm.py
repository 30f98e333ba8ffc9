"""Swap the layer norms of a small transformer while it trains; afterwards nothing of them is left."""

from __future__ import annotations

import torch
from torch import nn

import graphopt


class Net(nn.Module):
    """Does a sequence hold more positive than negative numbers?"""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.encoder(self.embed(x))).mean(1))


def train(model: nn.Module, calls: int) -> float:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    model.train()
    for _ in range(calls):
        x = torch.randn(32, 9, 1)
        loss = nn.functional.cross_entropy(model(x), (x > 0).sum((1, 2)) // 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(32, 9, 1)
    print(f"loss with layer norms {train(model, 40):.3f}")
    swapped = graphopt.swap_norm(model, (x,), to="prepbn", warm=5, steps=20)
    print(swapped.swaps.report)
    print(f"loss with the new norms {train(swapped, 40):.3f}, share left {swapped.swaps.share}")
    fast = graphopt.optimize(swapped.eval(), (x,))
    print("norms left:", sum("norm" in str(node.target) for node in fast.graph_module.graph.nodes))
    print("largest difference:", float((fast(x) - swapped(x)).abs().max().detach()))


if __name__ == "__main__":
    main()
