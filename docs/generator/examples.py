"""A small model for every pass: what the example on its page is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.passes.base import Pass
from graphopt.passes.lower_precision import LowerPrecision
from graphopt.passes.open_operators import OpenOperators
from graphopt.passes.prune import Prune
from graphopt.passes.quantize import Quantize

CLEAN = "canonicalize"


class Net(nn.Module):
    """`body(net, *inputs)` over named submodules and parameters."""

    def __init__(self, body: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.body = body
        for name, one in parts.items():
            setattr(self, name, one)

    def forward(self, x: Tensor, y: Tensor | None = None, z: Tensor | None = None) -> Any:
        return self.body(self, *(one for one in (x, y, z) if one is not None))


@dataclasses.dataclass(frozen=True)
class Example:
    """A model and inputs, and what runs.

    `before` runs first and is not part of what is shown; `run` is the pass with options, if it is not as it
    comes; `then` runs behind it, for a pass leaves to others what nobody reads any more.
    """

    body: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    parts: Callable[[], dict[str, Any]] = dict
    before: str = CLEAN
    run: str | Pass = ""
    then: str = CLEAN
    integers: bool = False

    def model(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The model in eval mode, its norms with statistics as after training, and its inputs."""
        torch.manual_seed(0)
        model = Net(self.body, **self.parts()).eval()
        for name, one in model.state_dict().items():
            if name.endswith("running_mean"):
                one.normal_()
            elif name.endswith("running_var"):
                one.uniform_(0.5, 2)
        draw = partial(torch.randint, 0, 4) if self.integers else torch.randn
        return model, tuple(draw(shape) for shape in self.shapes)


TOKENS, IMAGE = (2, 5, 8), (2, 3, 8, 8)


def conv(inner: int = 3, outer: int = 4, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, 3, padding=1, **options)


def parameter(*shape: int, zero: bool = False) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape) if zero else torch.randn(shape))


class Triangle(torch.autograd.Function):
    """A spike, and the gradient of a triangle."""

    @staticmethod
    def forward(context: Any, z: Tensor) -> Tensor:
        context.save_for_backward(z)
        return (z > 0).to(z.dtype)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (z,) = context.saved_tensors
        return gradient * (1 - z.abs()).clamp(min=0)


def leaky(net: nn.Module, x: Tensor) -> Tensor:
    """A leaky neuron over the steps of `x`, `[T, N, C]`."""
    v, spikes = torch.zeros_like(x[0]), []
    for now in x:
        v = v + (now - v) / 2
        spikes.append((v >= 1).to(v.dtype))
        v = v * (1 - spikes[-1])
    return torch.stack(spikes)


def over_time(net: Any, x: Tensor) -> Tensor:
    """One convolution at each of four steps."""
    return torch.stack([net.conv(x[:, t]).relu() for t in range(4)], 1)


def attention(net: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1) @ v


def block(net: Any, x: Tensor) -> Tensor:
    x = x + net.down(F.gelu(net.up(net.norm(x))))
    return net.head(net.last(x))


def positions(net: Any, x: Tensor) -> Tensor:
    return x + net.table(torch.arange(5).unsqueeze(0).expand(x.shape[0], -1))


def layers(net: Any, x: Tensor) -> Tensor:
    x = net.embed(x)
    for one in net.blocks:
        x = x + one(x)
    return x


def rotated(net: Any, x: Tensor) -> Tensor:
    turn = torch.eye(8) - 2 * net.u @ net.u.T
    return F.linear(x, net.weight @ turn)


def straight_through(net: Any, x: Tensor) -> Tensor:
    return net.out(x + (torch.sign(x) - x).detach())


def coded(net: Any, x: Tensor) -> Tensor:
    """A weight of int8 codes with a scale for each row, and an adapter beside it."""
    return F.linear(x, net.codes.float() * net.scale) + net.up(net.down(x))


def codes() -> dict[str, Any]:
    weight = torch.randn(8, 8)
    scale = weight.abs().amax(1, keepdim=True) / 127
    stored = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
    return {
        "codes": stored, "scale": nn.Parameter(scale),
        "down": nn.Linear(8, 2, bias=False), "up": nn.Linear(2, 8, bias=False),
    }  # fmt: skip


def tied() -> dict[str, Any]:
    embed, head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
    head.weight = embed.weight
    return {"embed": embed, "head": head}


def opened(net: Any, x: Tensor) -> Tensor:
    if not hasattr(torch.ops.graphopt_pages, "twice"):
        torch.library.custom_op(
            "graphopt_pages::twice", lambda x: x * 2 + 1, mutates_args=(),
            schema="(Tensor x) -> Tensor",
        ).register_fake(torch.empty_like)  # fmt: skip
    return torch.ops.graphopt_pages.twice(x).relu()


def normed(net: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * net.gain


def reps(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    return net.norm(y) + net.alpha * y


EXAMPLES: dict[str, Example] = {
    "absorb-scales": Example(
        lambda net, x: net.linear(net.gain * x) * 0.5, (TOKENS,),
        lambda: {"linear": nn.Linear(8, 4), "gain": parameter(8)},
    ),
    "batch-siblings": Example(over_time, ((2, 4, *IMAGE[1:]),), lambda: {"conv": conv()}),
    "cancel-terms": Example(straight_through, (TOKENS,), lambda: {"out": nn.Linear(8, 4)}),
    "canonicalize": Example(
        lambda net, x: (x * 1 + 0).reshape(2, -1).reshape(-1).neg().neg() + net.drop(x.flatten()), (TOKENS,),
        lambda: {"drop": nn.Dropout()}, before="", run="canonicalize", then="",
    ),
    "center-norms": Example(
        lambda net, x: net.head(net.last(net.embed(x))), (TOKENS,),
        lambda: {"embed": nn.Linear(8, 6), "last": nn.LayerNorm(6), "head": nn.Linear(6, 4)},
        before="canonicalize,absorb-scales,materialize,canonicalize",
    ),
    "collect-terms": Example(
        reps, (IMAGE,), lambda: {"conv": conv(), "norm": nn.BatchNorm2d(4), "alpha": parameter(1)}
    ),
    "detach-masks": Example(
        lambda net, q, k, v: F.scaled_dot_product_attention(q, k, v, net.bias), ((2, 2, 5, 8),) * 3,
        lambda: {"bias": parameter(2, 5, 5)},
    ),
    "drop-gradients": Example(lambda net, x: Triangle.apply(x), (TOKENS,)),
    "drop-layers": Example(
        layers, (TOKENS,),
        lambda: {
            "embed": nn.Linear(8, 8),
            "blocks": nn.ModuleList(
                nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(3)
            ),
        },
        run="drop-layers{count=1,importance=random}",
    ),
    "drop-zeros": Example(
        lambda net, x: net.main(x).relu() + net.gate * net.side(x).relu(), (TOKENS,),
        lambda: {"main": nn.Linear(8, 4), "side": nn.Linear(8, 4), "gate": parameter(1, zero=True)},
    ),
    "fold-batch-norm": Example(
        lambda net, x: net.norm(net.conv(x)).relu(), (IMAGE,),
        lambda: {"conv": conv(), "norm": nn.BatchNorm2d(4)},
    ),
    "fold-thresholds": Example(
        lambda net, x: (net.norm(x) > 1).to(x.dtype), (IMAGE,), lambda: {"norm": nn.BatchNorm2d(3)},
        then="materialize,canonicalize",
    ),
    "lower-precision": Example(
        lambda net, x: net.last(net.first(x).relu()), (TOKENS,),
        lambda: {"first": nn.Linear(8, 16), "last": nn.Linear(16, 4)},
        run=LowerPrecision(force=True),
    ),
    "materialize": Example(
        lambda net, x: F.linear(x, net.weight * net.gain.exp()), (TOKENS,),
        lambda: {"weight": parameter(4, 8), "gain": parameter(8)},
    ),
    "merge-branches": Example(
        lambda net, x: (net.wide(x) + net.point(x) + x).relu(), (IMAGE,),
        lambda: {"wide": conv(3, 3), "point": nn.Conv2d(3, 3, 1)},
    ),
    "merge-regions": Example(
        lambda net, x: net.linear(x.unflatten(-1, (4, 2)).flip(-1).flatten(-2) * net.gain), (TOKENS,),
        lambda: {"linear": nn.Linear(8, 8), "gain": parameter(8)},
    ),
    "merge-sequences": Example(
        lambda net, x: net.last(net.first(x)), (TOKENS,),
        lambda: {"first": nn.Linear(8, 6), "last": nn.Linear(6, 4)},
    ),
    "multiply-out": Example(rotated, (TOKENS,), lambda: {"weight": parameter(8, 8), "u": parameter(8, 1)}),
    "open-operators": Example(opened, (TOKENS,), run=OpenOperators()),
    "prune": Example(
        lambda net, x: net.last(net.first(x).relu()), (IMAGE,),
        lambda: {"first": conv(3, 8), "last": conv(8, 4)}, run=Prune(ratio=0.5),
    ),
    "quantize": Example(
        lambda net, x: net.last(net.first(x).relu()), ((2, 64, 16),),
        lambda: {"first": nn.Linear(16, 64), "last": nn.Linear(64, 8)}, run=Quantize(force=True),
    ),
    "recognize-activations": Example(lambda net, x: x * (1 + torch.erf(x / 2**0.5)) / 2, (TOKENS,)),
    "recognize-attention": Example(attention, ((2, 2, 5, 8),) * 3),
    "recognize-norms": Example(normed, (TOKENS,), lambda: {"gain": parameter(8)}),
    "requantize": Example(
        coded, (TOKENS,), codes, run="requantize{budget=1}",
        then="merge-branches,materialize,canonicalize",
    ),
    "roll-steps": Example(leaky, ((4, 2, 3),)),
    "settle-thresholds": Example(
        lambda net, x: (F.prelu(x, net.slope) > 1).to(x.dtype), (TOKENS,),
        lambda: {"slope": nn.Parameter(torch.tensor([0.25]))},
        then="materialize,canonicalize",
    ),
    "sink-expands": Example(positions, (TOKENS,), lambda: {"table": nn.Embedding(5, 8)}),
    "stack-siblings": Example(
        lambda net, x: net.query(x) @ net.key(x).transpose(1, 2), (TOKENS,),
        lambda: {"query": nn.Linear(8, 8), "key": nn.Linear(8, 8)},
    ),
    "untie": Example(
        lambda net, tokens: net.head(net.embed(tokens)), ((2, 5),), tied, integers=True,
    ),
}  # fmt: skip
