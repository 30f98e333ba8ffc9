"""One batch, several adapters: every row is computed with the adapter it names, over one base.

The models may come from any library. With PEFT, a view of a model per adapter, over the same tensors:

    def view(model, adapter):
        tensors = {id(one): one for one in [*model.parameters(), *model.buffers()]}
        view = copy.deepcopy(model, tensors).base_model
        view.set_adapter(adapter) if adapter else view.disable_adapter_layers()
        return view.eval()
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import graphopt


class LowRank(nn.Module):
    """W x + B A x."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.up(self.down(x))
        return y


class Scaled(nn.Module):
    """A learned scale per feature, as IA3 has it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.scale = base, nn.Parameter(torch.rand(base.out_features) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) * self.scale
        return y


def main() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64)).eval()
    french, german = copy.deepcopy(base), copy.deepcopy(base)
    french[0], german[2] = LowRank(base[0], 8), Scaled(base[2])

    x = torch.randn(6, 256)
    fast = graphopt.multi(base, [french, german], (x,))
    rows = torch.tensor([0, 1, -1, 1, 0, -1])  # -1 is the base
    y = fast(x, adapter_ids=rows)

    models = [french, german, base]
    alone = torch.cat([models[int(i)](x[t : t + 1]) for t, i in enumerate(rows)])
    print("parameters:", sum(one.numel() for one in base.parameters()), "of the base,",
          sum(one.numel() for one in fast.parameters()), "of all three models in one")  # fmt: skip
    print("largest difference from each row's own model:", float((y - alone).abs().max().detach()))


if __name__ == "__main__":
    main()
