"""Training on scikit-learn's digits, shown over T steps: 1437 images to train, 360 to test.

Direct encoding shows the image itself at every step; rate encoding shows spikes with the pixels as their
probability. Weights are kept in a folder for temporary files, by what the net, its training and torch are.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.digits import Digits, digits

CACHE = Path(tempfile.gettempdir()) / "graphopt-spiking"
ENCODINGS = ("direct", "rate")


def upsampled(size: int = 16) -> Digits:
    """The digits, `[N, 1, size, size]`."""
    x, y, test_x, test_y = digits()
    x, test_x = (
        nn.functional.interpolate(one, (size, size), mode="bilinear") for one in (x, test_x)
    )
    return Digits(x, y, test_x, test_y)


def many(images: Tensor, labels: Tensor, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`count` images: those given, then copies that are shifted by up to 2 and have noise."""
    generator = torch.Generator().manual_seed(seed)
    found = [images]
    left = count - len(images)
    chosen = torch.randint(0, len(images), (max(left, 0),), generator=generator)
    for index in chosen.tolist():
        down, right = (int(one) for one in torch.randint(-2, 3, (2,), generator=generator))
        one = images[index : index + 1].roll((down, right), (2, 3))
        found.append(one + 0.1 * torch.randn(one.shape, generator=generator))
    y = torch.cat([labels, labels[chosen]])
    return torch.cat(found)[:count], y[:count]


def encode(x: Tensor, encoding: str, steps: int, generator: torch.Generator) -> Tensor:
    """What a net is shown: the images, or `[N, T, C, H, W]` of spikes."""
    if encoding == "direct":
        return x
    if encoding != "rate":
        raise ValueError(f"expected one of {ENCODINGS}, found {encoding!r}")
    chance = x.clamp(0, 1).unsqueeze(1).expand(-1, steps, -1, -1, -1)
    return torch.bernoulli(chance.contiguous(), generator=generator)


def train(
    model: nn.Module, data: Digits, epochs: int, encoding: str = "direct", steps: int = 4,
    batch: int = 64, rate: float = 1e-2,
) -> float:  # fmt: skip
    """Adam, its learning rate falling to zero along a cosine; returns seconds. The model ends in eval
    mode."""
    generator = torch.Generator().manual_seed(0)
    count = len(data.x) // batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * count)
    model.train()
    start = time.perf_counter()
    for _ in range(epochs):
        order = torch.randperm(len(data.x), generator=generator)[: count * batch]
        for chosen in order.split(batch):
            optimizer.zero_grad()
            x = encode(data.x[chosen], encoding, steps, generator)
            nn.functional.cross_entropy(model(x), data.y[chosen]).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    return time.perf_counter() - start


def trained(
    name: str, make: Callable[[], nn.Module], data: Digits, epochs: int,
    encoding: str = "direct", steps: int = 4,
) -> nn.Module:  # fmt: skip
    """What `make` makes, trained; or its weights from an earlier run of the same."""
    torch.manual_seed(0)
    model = make()
    about = f"{name} {epochs} {encoding} {steps} {len(data.x)} {torch.__version__} {model}"
    path = CACHE / f"{hashlib.sha256(about.encode()).hexdigest()[:16]}.pt"
    if not path.exists():
        seconds = train(model, data, epochs, encoding, steps)
        CACHE.mkdir(parents=True, exist_ok=True)
        torch.save({key: one.clone() for key, one in model.state_dict().items()}, path)
        print(f"trained {name} in {seconds:.0f} s", flush=True)
        model = make()  # with no states of neurons in it
    model.load_state_dict(torch.load(path))
    return model.eval()


@torch.no_grad()
def accuracy(run: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, batch: int = 125) -> float:
    """In percent."""
    right = sum(
        int((run(a).argmax(1) == b).sum())
        for a, b in zip(x.split(batch), y.split(batch), strict=True)
    )
    return 100 * right / len(x)


@torch.no_grad()
def mix_signs(model: nn.Module, seed: int = 0, zeros: float = 0.1, size: float = 1.0) -> nn.Module:
    """Scales of norms with both signs and some zeros, shifts too; statistics stay as trained."""
    generator = torch.Generator().manual_seed(seed)
    for norm in model.modules():
        weight = getattr(norm, "weight", None)
        if getattr(norm, "running_var", None) is None or weight is None:
            continue
        drawn = torch.rand(weight.shape, generator=generator, dtype=torch.float64)
        weight[drawn < 0.4] *= -1
        weight[drawn > 1 - zeros] = 0.0
        bias = getattr(norm, "bias", None)
        if bias is not None:
            noise = torch.randn(bias.shape, generator=generator, dtype=torch.float64)
            bias += size * 0.3 * noise.to(bias.dtype)
    return model
