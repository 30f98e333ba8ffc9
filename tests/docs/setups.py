"""What the pages take as given: `model` in eval mode, its inputs `(x,)`, and what a page needs beside."""

from __future__ import annotations

from typing import Any

COMMON = """
import torch
from torch import nn

import graphopt

torch.manual_seed(0)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.wide, self.point = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.norm(self.wide(x) + self.point(x)).relu().mean((2, 3)))


model, x = Branches().eval(), torch.randn(2, 3, 8, 8)
batches = [((x,), None)]
"""

TRANSFORMER = """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.mix, self.up, self.down = nn.Linear(4, 4), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = x + self.mix(self.norm1(x).mT).mT
        return x + self.down(self.up(self.norm2(x)).relu())


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 4)
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.embed(x))))


model, x = Transformer().eval(), torch.randn(2, 4, 3)
"""

SPIKING = """
class Spike(torch.autograd.Function):
    @staticmethod
    def forward(context, z):
        context.save_for_backward(z)
        return (z > 0).to(z.dtype)

    @staticmethod
    def backward(context, gradient):
        return gradient * (1 - context.saved_tensors[0].abs()).clamp(min=0)


class Neuron(nn.Module):
    def forward(self, x):
        v, spikes = torch.zeros_like(x[:, 0]), []
        for now in x.unbind(1):
            v = v + (now - v) / 2
            spikes.append(Spike.apply(v - 1))
            v = v * (1 - spikes[-1])
        return torch.stack(spikes, 1)
"""

CHECKPOINT = '''
from pathlib import Path
from safetensors.torch import save_file

Path("mine").mkdir()
Path("mine/models.py").write_text("""
import torch
from torch import nn


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(8, 8)
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def adapted():
    with torch.device("meta"):
        return Adapted().eval(), (torch.randn(2, 8, device="cpu"),)
""")
Path("base").mkdir()
save_file({"base.weight": torch.randn(8, 8), "base.bias": torch.randn(8)}, "base/model.safetensors")
for name in ("tuned", "other"):
    Path(name).mkdir()
    save_file({"base.weight": torch.randn(8, 8), "base.bias": torch.randn(8)}, f"{name}/model.safetensors")
save_file({"down.weight": torch.randn(2, 8), "up.weight": torch.randn(8, 2)}, "adapter.safetensors")
from mine.models import adapted

model, inputs = adapted()
'''

BUILD = '''
from pathlib import Path

import numpy
from safetensors.torch import save_file

Path("mine").mkdir()
Path("mine/models.py").write_text("""
import torch
from torch import nn


class Net(nn.Sequential):
    def forward(self, image):
        return super().forward(image)


def net():
    made = Net(nn.Conv2d(3, 4, 7, 16), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return made.eval(), (torch.randn(2, 3, 224, 224),)
""")
from mine.models import net

save_file(net()[0].state_dict(), "weights.safetensors")
numpy.savez("samples.npz", image=numpy.zeros((2, 3, 224, 224), "float32"))
'''

ADAPTERS = """
import copy

from graphopt.torchvision_ops import declare_missing_ops

declare_missing_ops()  # transformers imports torchvision
import peft

base = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)).eval()
x = torch.randn(4, 8)
config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
peft.get_peft_model(copy.deepcopy(base), config).save_pretrained("my-adapter")
french, german = copy.deepcopy(base), copy.deepcopy(base)
french[0].bias.data += 1
german[2].weight.data *= 2
"""

SETUPS = {
    "adapt.md": "loader = [(x, None), (x + 1, None)]",
    "adapters.md": ADAPTERS,
    "build.md": BUILD,
    "depth.md": TRANSFORMER,
    "fleet.md": CHECKPOINT,
    "gradients.md": SPIKING + "net, x = Neuron(), torch.randn(2, 3, 4)",
    "norms.md": TRANSFORMER,
    "spiking.md": SPIKING
    + "steps, x = 5, torch.randn(2, 5, 4)\nfast = graphopt.optimize(Neuron(), (x,))",
    "swaps.md": TRANSFORMER,
    "training.md": "lr = 0.1",
}
ALONE = ("start.md", "writing-passes.md", "writing-backends.md")  # they bring all that they need


def scope_of(page: str) -> dict[str, Any]:
    """The names that the blocks of a page find, made in the working directory."""
    scope: dict[str, Any] = {"__name__": page.removesuffix(".md").replace("-", "_")}
    if page not in ALONE:
        exec(compile(COMMON + SETUPS.get(page, ""), f"set-up of {page}", "exec"), scope)
    return scope
