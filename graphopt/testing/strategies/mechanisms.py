"""Statements of a free-form program: modules, also shared, hooked, parametrized and stateful ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

from graphopt.testing.strategies.layers import between, convolutions, norms
from graphopt.testing.strategies.sketch import Sketch, statement


def _image(s: Sketch) -> str | None:
    """A value `[N, C, *spatial]` with one to three small spatial axes."""
    return s.pick(
        lambda one: s.batched(one) and 3 <= len(s.shape(one)) <= 5 and min(s.shape(one)[2:]) > 1
        and s.shape(one)[1] <= 12
    )  # fmt: skip


@statement
def convolution(s: Sketch) -> object:
    x = _image(s)
    return x and s.let(f"{s.attach('conv', s.draw(convolutions(s.shape(x))))}({x})")


@statement
def convolution_and_norm(s: Sketch) -> object:
    """What folds, unless something here keeps it from folding."""
    x = _image(s)
    if x is None:
        return None
    y = s.let(f"{s.attach('conv', s.draw(convolutions(s.shape(x))))}({x})")
    if y is None:
        return None
    norm = s.attach("norm", s.draw(norms(len(s.shape(y)) - 2, s.shape(y)[1])))
    return s.let(f"{norm}({y})")


@statement
def norm(s: Sketch) -> object:
    x = s.pick(lambda one: s.batched(one) and 2 <= len(s.shape(one)) <= 5)
    if x is None:
        return None
    rank, channels = len(s.shape(x)) - 2, s.shape(x)[1]
    if rank == 1 and s.number(0, 2) == 2:
        return s.let(f"{s.attach('norm', s.draw(norms(1, channels)))}({x})")
    return s.let(f"{s.attach('norm', s.draw(norms(rank, channels)))}({x})")


@statement
def layer_norm(s: Sketch) -> object:
    """Layer, group, instance and RMS norms, as modules and functions."""
    x = s.pick(lambda one: s.batched(one) and len(s.shape(one)) >= 2)
    if x is None:
        return None
    size, channels, affine = s.shape(x)[-1], s.shape(x)[1], s.flag()
    makers: list[Any] = [
        lambda: nn.LayerNorm(size, eps=0.1, elementwise_affine=affine),
        lambda: nn.RMSNorm(size, eps=0.1, elementwise_affine=affine),
        lambda: nn.GroupNorm(1, channels, eps=0.1, affine=affine),
        lambda: nn.GroupNorm(channels, channels, eps=0.1, affine=affine),
        lambda: nn.InstanceNorm1d(channels, eps=0.1, affine=affine),
        lambda: nn.LayerNorm(s.shape(x)[1:], eps=0.1),
    ]
    if s.number(0, 3) == 3:
        return s.let(f"F.layer_norm({x}, [{size}], weight={s.parameter(size)}, eps=0.1)")
    return s.let(f"{s.attach('norm', s.choose(makers)())}({x})")


@statement
def linear(s: Sketch) -> object:
    x = s.pick(lambda one: -1 in s.fixed(one))
    if x is None:
        return None
    layer = nn.Linear(s.shape(x)[-1], s.choose([4, 2, 1]), bias=s.flag())
    return s.let(f"{s.attach('linear', layer)}({x})")


@statement
def middle(s: Sketch) -> object:
    """What may stand between a map and a norm."""
    x = _image(s)
    return x and s.let(f"{s.attach('layer', s.draw(between(s.shape(x))))}({x})")


@statement
def other_module(s: Sketch) -> object:
    """Modules of few parameters, containers, recurrent ones."""
    x = s.pick(lambda one: s.batched(one) and len(s.shape(one)) >= 2)
    if x is None:
        return None
    size, channels = s.shape(x)[-1], s.shape(x)[1]
    makers: list[Any] = [
        lambda: nn.Dropout(0.5), nn.Identity, lambda: nn.PReLU(channels), nn.PReLU,
        lambda: nn.Flatten(1), nn.Softmax2d, lambda: nn.Softmax(-1),
        lambda: nn.Sequential(nn.Linear(size, 3), nn.ReLU(inplace=True), nn.Linear(3, size)),
        lambda: nn.Sequential(nn.Identity(), nn.Sequential(nn.Linear(size, 2, bias=False))),
        lambda: nn.AlphaDropout(0.2), lambda: nn.Hardshrink(0.1234567),
    ]  # fmt: skip
    if len(s.shape(x)) == 3 and s.number(0, 3) == 3:
        recurrent = s.choose([nn.GRU, nn.LSTM])(size, 3, batch_first=True)
        return s.let(f"{s.attach('recurrent', recurrent)}({x})[0]")
    made = s.choose(makers)()
    if isinstance(made, nn.Hardshrink) and not s.far_from(x, 0.1234567, -0.1234567):
        return None
    return s.let(f"{s.attach('layer', made)}({x})")


@statement
def embedding(s: Sketch) -> object:
    i = s.integer()
    table = s.attach("table", nn.Embedding(5, 3))
    forms = ["{t}({i} % 5)", "{t}({i}.clamp(0, 4))", "F.embedding({i} % 5, {t}.weight * 2)"]
    return i and s.let(s.choose(forms).format(t=table, i=i))


@statement
def shared_module(s: Sketch) -> object:
    """A module that has been called is called again, perhaps on another value."""
    names = [name for name in s.module._modules if name != "recurrent0"]
    x = s.pick()
    return x and names and s.let(f"self.{s.choose(names)}({x})")


@statement
def tied(s: Sketch) -> object:
    """Two linear maps with one weight; or a parameter under a second name."""
    x = s.pick(lambda one: -1 in s.fixed(one))
    if x is None:
        return None
    size = s.shape(x)[-1]
    one, two = nn.Linear(size, size), nn.Linear(size, size, bias=False)
    first = s.attach("linear", one)
    second = s.attach("linear", two)
    two.weight = one.weight
    form = s.choose(
        ["{b}({a}({x}).relu())", "{a}({x}) + {b}({x})", "({x} @ {a}.weight) + {b}({x})"]
    )
    return s.let(form.format(a=first, b=second, x=x))


class Halved(nn.Module):
    """A parametrization: half of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


@statement
def parametrized(s: Sketch) -> object:
    """Weight norm (both kinds), spectral norm, orthogonal and a home-made parametrization."""
    x = s.pick(lambda one: -1 in s.fixed(one))
    if x is None:
        return None
    size = s.shape(x)[-1]
    layer: Any = nn.Linear(size, s.choose([3, size]), bias=s.flag())
    path = s.attach("linear", layer)
    kind = s.choose(["weight norm", "spectral norm", "old weight norm", "orthogonal", "home-made"])
    if kind == "weight norm":
        parametrizations.weight_norm(layer)
    elif kind == "spectral norm":
        parametrizations.spectral_norm(layer)
    elif kind == "old weight norm":
        weight_norm(layer)
    elif kind == "orthogonal":
        parametrizations.orthogonal(layer)
    else:
        nn.utils.parametrize.register_parametrization(layer, "weight", Halved())
    layer.eval()
    return s.let(f"{path}({x})")


def _halve(module: nn.Module, inputs: Any, output: Any) -> Any:
    return 0.5 * output


def _shift(module: nn.Module, inputs: Any) -> Any:
    return (inputs[0] + 0.25, *inputs[1:])


@statement
def hooked(s: Sketch) -> object:
    """A hook that changes what a module takes or gives."""
    names = list(s.module._modules)
    x = s.pick()
    if not names or x is None:
        return None
    module: Any = s.module._modules[s.choose(names)]
    if isinstance(module, (nn.GRU, nn.LSTM)):
        return None
    if s.flag():
        return module.register_forward_hook(_halve)
    return module.register_forward_pre_hook(_shift)


@statement
def buffer(s: Sketch) -> object:
    """A buffer that the forward reads and now and then writes."""
    x = s.pick()
    if x is None:
        return None
    name = s.attach("b", s.random())
    if s.number(0, 2) == 2:
        line = s.choose(
            ["{b}.add_(1)", "{b}.mul_(0.9).add_({x}.mean().detach(), alpha=0.1)",
             "{b}.copy_({x}.amax().detach())"]
        )  # fmt: skip
        s.run(line.format(b=name, x=x))
    return s.let(f"{x} + 0.1 * {name}")


@statement
def without_gradient(s: Sketch) -> object:
    """A part under `no_grad`."""
    x = s.pick()
    name = f"v{s.count}"
    if x is None or not s.run(f"with torch.no_grad(): {name} = {x}.sigmoid() * 2"):
        return None
    s.count += 1
    s.pool.append(name)
    return name


@statement
def branch(s: Sketch) -> object:
    """Control flow on data: no capture of the whole."""
    if s.number(0, 15) < 15:
        return None
    x = s.pick()
    return x and s.let(f"({x} * 2 if {x}.mean() > 0.1234567 else {x} - 1)")


@statement
def dead(s: Sketch) -> object:
    """Computed for nothing."""
    x = s.pick()
    return x and s.run(f"_ = {x}.exp() + self.training")
