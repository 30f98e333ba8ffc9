"""Three generated kernels, word for word, as `docs/triton.md` shows them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.backends.triton.helpers import compiled

DOCS = Path(__file__).parents[3] / "docs" / "triton.md"


class Gated(nn.Module):
    def forward(self, gate, up):
        return F.silu(gate) * up


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(96)

    def forward(self, x, y):
        return self.norm(x + y)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(128, 512)

    def forward(self, x):
        return F.gelu(self.fc(x))


CASES = {
    "silu_mul": (Gated(), [(4, 9, 30)] * 2),
    "add_layer_norm": (Residual(), [(4, 9, 96)] * 2),
    "linear_gelu": (Wide(), [(4, 9, 128)]),
}


def printed(name: str) -> str:
    model, shapes = CASES[name]
    inputs = [torch.randn(*shape) for shape in shapes]
    (region,) = compiled(model, *inputs).program(inputs).regions
    return region.source


@pytest.mark.parametrize("name", CASES)
def test_the_documentation_shows_what_is_generated(name):
    shown = re.findall(r"```python[^\n]*\n(import triton\n.*?)```", DOCS.read_text(), re.DOTALL)
    (found,) = [one for one in shown if f"def {name}(" in one]
    assert found == printed(name)
