"""A rewrite of one's own, and what happens to a wrong one."""

from __future__ import annotations

import torch
from torch import nn

import graphopt
from graphopt import Rewriter, rewrite
from graphopt.ir import ops


@rewrite
def pull_out_factor(product: ops.Linear, rw: Rewriter):
    """linear(c x) = c linear(x) without bias, for a number c."""
    scaled = rw.producer(product.input, ops.Mul)
    rw.match(isinstance(scaled.right, float))
    rw.require(product.bias is None, "the bias would be scaled too")
    rw.require(rw.only_user(scaled, product), "the scaled input is used elsewhere")
    return rw.emit_like(product, input=scaled.left) * scaled.right


@rewrite
def forget_the_bias(product: ops.Linear, rw: Rewriter):
    """Wrong: linear(x) with bias = linear(x) without."""
    rw.match(product.bias is not None)
    return rw.emit_like(product, bias=None)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x * 0.5) * 2.5)


def main() -> None:
    fast = graphopt.optimize(
        Scaled(), (torch.randn(2, 8),), passes=[pull_out_factor, forget_the_bias]
    )
    print(fast.report)
    assert [one.rewrite for one in fast.report.applied] == ["pull-out-factor"]
    assert [one.reason for one in fast.report.refused] == ["the bias would be scaled too"]
    assert [one.rewrite for one in fast.report.rolled_back] == ["forget-the-bias"]


if __name__ == "__main__":
    main()
