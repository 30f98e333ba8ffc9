"""The plugin at work. `pip install -e .` makes its pass known by name; here it is given as it is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tidy_linear import TidyLinear
from torch import nn

import graphopt
from graphopt.testing import prove


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.third = nn.Linear(8, 8, bias=False)
        self.shift = nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.shift + self.first(x))
        return self.third(F.relu(self.second(hidden * 2.0)) * 0.5)


def main() -> None:
    torch.manual_seed(0)
    for one in TidyLinear.rewrites:
        print(prove(one))
    fast = graphopt.optimize(Net(), (torch.randn(2, 8),), passes=[TidyLinear, "canonicalize"])
    print(fast.report)
    assert {one.rewrite for one in fast.report.applied} == {"take-in-bias", "pull-out-factor"}
    assert [one.reason for one in fast.report.refused] == ["the bias would be scaled too"]


if __name__ == "__main__":
    main()
