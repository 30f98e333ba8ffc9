"""Adapters merged from the traced graph alone: low rank, rescaled, rotated, and one that nobody published.

No method and no library is known by name; with PEFT it is `optimize(peft_model.eval(), (x,))` all the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import graphopt


class LowRank(nn.Module):
    """W x + s B A x (LoRA)."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(x))


class Rescaled(LowRank):
    """m / |W + B A| (W + B A) x + b, row by row (DoRA)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.magnitude = nn.Parameter(torch.rand(base.out_features) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight + self.up.weight @ self.down.weight
        scale = self.magnitude / weight.norm(dim=1)
        return (
            nn.functional.linear(x, self.base.weight) + self.up(self.down(x))
        ) * scale + self.base.bias


class Rotated(nn.Module):
    """W applied to x whose blocks are rotated, by Cayley's transform (OFT)."""

    def __init__(self, base: nn.Linear, size: int = 8) -> None:
        super().__init__()
        self.base, self.size = base, size
        self.free = nn.Parameter(torch.randn(base.in_features // size, size, size) / 4)

    def forward(self, x: Tensor) -> Tensor:
        skew, one = self.free - self.free.mT, torch.eye(self.size)
        turn = torch.linalg.solve(one + skew, one - skew)
        blocks = torch.einsum("...bi,bij->...bj", x.unflatten(-1, (-1, self.size)), turn)
        return self.base(blocks.flatten(-2))


class Filtered(nn.Module):
    """W x plus x through a learned filter in the frequencies of its features, backwards. Nobody's."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.filter = base, nn.Parameter(torch.randn(base.in_features) / 8)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x) * torch.fft.rfft(self.filter)
        return self.base(x) + torch.fft.irfft(spectrum, n=x.shape[-1]).flip(-1)


def ops(fast: graphopt.OptimizedModule) -> list[str]:
    """The names of its operations, in order."""
    nodes = fast.graph_module.graph.nodes
    return [str(one.target).split(".")[1] for one in nodes if one.op == "call_function"]


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 10, 32)
    print("adapter    ops  after         float64 error  parameters")
    for adapter in (LowRank, Rescaled, Rotated, Filtered):
        model = nn.Sequential(adapter(nn.Linear(32, 32)), nn.GELU()).eval()
        merged = graphopt.optimize(model, (x,))
        before, after = merged.report.before, merged.report.after
        error = merged.report.check.float64_error
        print(f"{adapter.__name__:<10} {before.nodes:<4} {', '.join(ops(merged)):<13} {error:<14.1e}",
              before.parameters, "->", after.parameters)  # fmt: skip
        assert ops(merged) == ["linear", "gelu"]
        assert torch.allclose(merged(x), model(x), atol=1e-4)


if __name__ == "__main__":
    main()
