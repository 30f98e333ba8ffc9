"""What several tests need: random norms, errors in float64, and proof that a model is untouched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import graphopt
from graphopt.ir.source import copy_module

EXACT = 1e-12  # two orders of the same float64 sums; a wrong fold is off by 1e-6 or (far) more

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_state_dict_hooks", "_load_state_dict_pre_hooks",
)  # fmt: skip


def randomize_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and affine parameters as training leaves them, gamma of both signs and one zero."""
    generator = torch.Generator().manual_seed(seed)

    def like(tensor: Tensor, low: float, high: float) -> Tensor:
        drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        return (low + (high - low) * drawn).to(tensor.dtype)

    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_var", None) is not None:
                module.running_mean.copy_(like(module.running_mean, -1, 1))
                module.running_var.copy_(like(module.running_var, 0.1, 2))
                if module.weight is not None:
                    module.weight.copy_(like(module.weight, -2, 2))
                    module.weight[0] = 0
                    module.bias.copy_(like(module.bias, -1, 1))
    return model


def prepare(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` in float64 and eval mode, its norms randomized."""
    return randomize_norms(model.double().eval(), seed)


def tensor(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """A normal random tensor."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(dtype)


def leaves(value: Any) -> list[Tensor]:
    return [one for one in pytree.tree_leaves(value) if isinstance(one, Tensor)]


def relative_error(found: Any, truth: Any) -> float:
    """The largest difference over the largest value, the worst over paired outputs, in float64.

    Values below 1e-3 count as 1e-3: our models compute values of order one, and an output may
    cancel to zero. inf and nan must be where the truth has them.
    """
    pairs = list(zip(leaves(found), leaves(truth), strict=True))
    assert pairs
    worst = 0.0
    for a, b in pairs:
        assert a.shape == b.shape, f"shape {list(a.shape)}, expected {list(b.shape)}"
        assert a.dtype == b.dtype, f"dtype {a.dtype}, expected {b.dtype}"
        if b.numel():
            a, b = a.detach().double(), b.detach().double()
            scale = max(float(b.abs().nan_to_num(0.0, 0.0).max()), 1e-3)
            same = (a == b) | (a.isnan() & b.isnan())
            away = torch.where(same, 0.0, (a - b).abs()).nan_to_num(float("inf"))
            worst = max(worst, float(away.max()) / scale)
    return worst


def assert_equal(found: Any, truth: Any, limit: float = EXACT) -> None:
    """Equal up to float64 rounding."""
    error = relative_error(found, truth)
    assert error <= limit, f"relative error {error:.1e}, expected at most {limit:.0e}"


def output_of(model: nn.Module, inputs: Iterable[Tensor]) -> Any:
    """What the model computes, on a copy: training norms would change the model."""
    with torch.no_grad():
        return copy_module(model)(*inputs)


def gradients(model: nn.Module, inputs: Iterable[Tensor]) -> dict[str, Tensor]:
    """Gradients of a fixed random functional of the outputs, on a copy; zero where there is none."""
    model = copy.deepcopy(model)
    outputs = leaves(model(*inputs))
    loss = sum(
        (one * tensor(*one.shape, seed=7 + i).to(one)).sum() for i, one in enumerate(outputs)
    )
    parameters = dict(model.named_parameters())
    found = (
        torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        if parameters and getattr(loss, "requires_grad", False)
        else [None] * len(parameters)
    )
    return {
        name: torch.zeros_like(one) if grad is None else grad
        for (name, one), grad in zip(parameters.items(), found, strict=True)
    }


def gradient_error(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """The largest relative difference over parameters. A gradient that is tiny beside the others
    counts as 1e-4 of the largest: it is the rounding of a zero."""
    assert sorted(found) == sorted(truth)
    floor = 1e-4 * max(
        (float(one.abs().max()) for one in truth.values() if one.numel()), default=0.0
    )
    worst = 0.0
    for name, expected in truth.items():
        if expected.numel():
            scale = max(float(expected.abs().max()), floor, 1e-3)
            worst = max(worst, float((found[name] - expected).abs().max()) / scale)
    return worst


# -- what is in an optimized model --------------------------------------------------------------


def calls(fast: graphopt.OptimizedModule) -> list[str]:
    """The names of the ATen ops of the graph, in order: `conv2d`, `relu`, ..."""
    assert fast.graph_module is not None
    return [
        node.target._schema.name.removeprefix("aten::")
        for node in fast.graph_module.graph.nodes
        if node.op == "call_function" and hasattr(node.target, "_schema")
    ]


def norm_nodes(fast: graphopt.OptimizedModule) -> list[Any]:
    """The nodes that still normalize with running or batch statistics."""
    assert fast.graph_module is not None
    return [
        node
        for node in fast.graph_module.graph.nodes
        if node.op == "call_function"
        and any(word in str(node.target) for word in ("batch_norm", "instance_norm"))
    ]


def norms_left(fast: graphopt.OptimizedModule) -> int:
    """How many batch (or statistics-keeping instance) norms the graph still has."""
    return len(norm_nodes(fast))


def reasons(fast: graphopt.OptimizedModule, where: str | None = None) -> str:
    """The reasons for which anything (or anything at one module path) was refused."""
    return "\n".join(
        one.reason for one in fast.report.refused if where is None or one.where == where
    )


# -- the source model stays as it was -----------------------------------------------------------


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Remember everything about a model; the result asserts that nothing of it has changed."""

    def look() -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            seen[f"{path} object"] = id(module)
            seen[f"{path} type"] = type(module)
            seen[f"{path} training"] = module.training
            seen[f"{path} attributes"] = sorted(vars(module))
            for hooks in _HOOKS:
                seen[f"{path} {hooks}"] = list(getattr(module, hooks).values())
        named = [*model.named_parameters(remove_duplicate=False)]
        named += model.named_buffers(remove_duplicate=False)
        for name, one in named:
            seen[f"{name} tensor"] = (id(one), one.requires_grad, one.grad is None, one._version)
        return seen

    before = look()
    values = {name: one.clone() for name, one in model.state_dict().items()}

    def assert_unchanged() -> None:
        assert look() == before
        after = model.state_dict()
        assert list(after) == list(values)
        assert all(torch.equal(after[name], one) for name, one in values.items())

    return assert_unchanged


# -- models in one expression --------------------------------------------------------------------


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


class Spike(torch.autograd.Function):
    """Whether a value is positive, with the gradient of a smooth step."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient / (1 + ctx.saved_tensors[0].abs()) ** 2


class Net(nn.Module):
    """`body(net, *inputs)` over named submodules: a model in one expression."""

    def __init__(self, body: object, **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.body = body
        for name, one in modules.items():
            setattr(self, name, one)

    def forward(self, *args: Tensor) -> Tensor:
        return self.body(self, *args)


class Counting(nn.Module):
    """A model that writes to a buffer on every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x + self.calls


def optimized(
    model: nn.Module, mode: str, *shapes: tuple[int, ...], **options: Any
) -> graphopt.OptimizedModule:
    """`model` (prepared) optimized: right on two inputs, its Tune gradients too, nothing rolled back,
    the source untouched."""
    inputs = tuple(tensor(*shape, seed=i) for i, shape in enumerate(shapes))
    unchanged = snapshot(model)
    fast = graphopt.optimize(model, inputs, mode=mode, **options)
    unchanged()
    assert fast.report.rolled_back == []
    for rows in (inputs, tuple(one.flip(0) * 2 for one in inputs)):
        assert_equal(output_of(fast, rows), output_of(model, rows))
    if mode == "tune":
        # 1e-10, for what is zero by an identity (a key bias) is noise in the source's gradients.
        assert gradient_error(gradients(fast, inputs), gradients(model, inputs)) <= 1e-10
    return fast
