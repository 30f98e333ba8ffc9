"""A spiking network with membrane potentials that are normalized (MPBN), trained on digits and optimized.

Its norms go into thresholds, one for every channel, and the spikes stay what they are.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import graphopt


class Spike(torch.autograd.Function):
    """One above the threshold; the gradient is that of a triangle around it."""

    @staticmethod
    def forward(context, z: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        context.save_for_backward(z)
        return (z > 1).to(z.dtype)

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        (z,) = context.saved_tensors
        return gradient * (1 - (z - 1).abs()).clamp(min=0)


class Neurons(nn.Module):
    """Leaky integrate-and-fire: u <- u / 4 + x, a spike where norm(u) > 1, which resets u to zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        u, spikes = torch.zeros_like(x[0]), []
        for current in x:
            u = 0.25 * u + current
            spike = Spike.apply(self.norm(u))
            u = u * (1 - spike)
            spikes.append(spike)
        return torch.stack(spikes)


class Net(nn.Module):
    """Two layers of neurons over four steps, an image presented at each; `[N, 1, 8, 8]` to `[N, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(*channels, 3, padding=1) for channels in ((1, 8), (8, 16))
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for channels in (8, 16))
        self.neurons = nn.ModuleList(Neurons(channels) for channels in (8, 16))
        self.head = nn.Linear(16 * 64, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = image.repeat(4, 1, 1, 1, 1)
        for conv, norm, neurons in zip(self.convs, self.norms, self.neurons, strict=True):
            x = neurons(norm(conv(x.flatten(0, 1))).unflatten(0, (4, -1)))
        found: Tensor = self.head(x.flatten(2)).mean(0)
        return found


def main() -> None:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for chosen in torch.cat([torch.randperm(1280) for _ in range(3)]).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    model.eval()

    fast = graphopt.optimize(model, (x[:4],))
    print(fast.report)
    with torch.no_grad():
        ours, theirs = fast(x[1280:]), model(x[1280:])
    right = [float((one.argmax(1) == y[1280:]).double().mean()) for one in (theirs, ours)]
    print(f"accuracy {right[0]:.1%} before, {right[1]:.1%} after;", end=" ")
    print("largest difference of an output", float((ours - theirs).abs().max()))


if __name__ == "__main__":
    main()
