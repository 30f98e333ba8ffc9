"""Layer norms of a transformer centred in its checkpoint: RMS norms compute the same with the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphopt
from tests.fleet.test_checkpoint import empty, read, real, stored

WIDE = 16
TOKENS = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(0))


def layer_norm() -> nn.Module:
    return nn.LayerNorm(WIDE, bias=False)


class Block(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(), norm()
        self.qkv, self.out = nn.Linear(WIDE, 3 * WIDE), nn.Linear(WIDE, WIDE)
        self.up, self.down = nn.Linear(WIDE, 2 * WIDE), nn.Linear(2 * WIDE, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.out((q @ k.transpose(-2, -1) * WIDE**-0.5).softmax(-1) @ v)
        return x + self.down(torch.relu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, norm: Any = layer_norm) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, WIDE)
        self.blocks = nn.Sequential(Block(norm), Block(norm))
        self.norm, self.head = norm(), nn.Linear(WIDE, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.head(self.norm(self.blocks(self.tokens(tokens))))
        return found


def test_the_result_is_the_checkpoint_of_a_model_with_rms_norms(tmp_path: Path) -> None:
    source = real(Transformer)
    done = graphopt.rewrite_checkpoint(
        empty(Transformer), TOKENS, stored(source, tmp_path), tmp_path / "out",
        passes="canonicalize,recognize-norms,center-norms", across=True,
    )  # fmt: skip
    assert {one.rewrite for one in done.applied} >= {"center-stream"}
    assert not done.rolled_back
    found = read(tmp_path / "out")
    names = {name for name in source.state_dict() if name.endswith(("out.weight", "down.weight"))}
    assert done.computed == 2 * len(names) + 1  # with their biases, and the table of tokens
    for name in names:
        assert float(found[name].double().mean(0).abs().max()) < 1e-7
    centred = Transformer(lambda: nn.RMSNorm(WIDE, eps=1e-5)).eval()
    centred.load_state_dict(found)
    with torch.no_grad():
        a, b = source.double()(TOKENS), centred.double()(TOKENS)
    assert float((a - b).norm() / a.norm()) < 1e-6  # the weights are rounded to float32
