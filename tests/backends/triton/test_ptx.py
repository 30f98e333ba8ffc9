"""Kernels compile to PTX for two targets without a GPU, and tell what they use."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from graphopt.backends.triton.ptx import Unit, compile_all
from tests.backends.triton.helpers import compiled
from tests.helpers import Net


def _units():
    def zoo(net, x, image):
        y = net.norm(x + F.gelu(net.fc(x)))
        z = F.pad(image, (1, 2)).relu().amax((2, 3))
        return (
            y.softmax(-1),
            z,
            net.group(image) * torch.tanh(image),
            (x > 0).sum(-1),
            net.conv(image).relu(),
        )

    model = Net(zoo, norm=nn.LayerNorm(48), fc=nn.Linear(48, 48), group=nn.GroupNorm(2, 4),
                conv=nn.Conv2d(4, 8, 1))  # fmt: skip
    units = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        inputs = torch.randn(4, 6, 48).to(dtype), torch.randn(4, 4, 5, 7).to(dtype)
        program = compiled(model.to(dtype), *inputs).program(inputs)
        units += [unit for region in program.regions for unit in region.units()]
    return units


def test_everything_compiles():
    units = _units()
    found = compile_all(units)
    assert len(found) == 2 * len(units) >= 24
    assert {one.target for one in found} == {80, 90}
    for one in found:
        assert not one.error, one
        assert 0 < one.registers <= 255 and one.ptx_lines > 20
        assert one.spills == 0, one


def test_what_does_not_compile_says_why():
    header = "import triton\nimport triton.language as tl\n\n\n@triton.jit\n"
    source = f"{header}def broken(x_ptr):\n    tl.nothing(x_ptr)\n"
    (found,) = compile_all([Unit("broken", source, {"x_ptr": "*fp32"}, {})], targets=[80])
    assert "nothing" in found.error
