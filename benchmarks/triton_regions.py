"""Regions drawn by hypothesis: what the Triton backend makes of them, against float64.

    python -m benchmarks.triton_regions --count 500 --ptx

A region is a chain of pointwise ops, views, reductions and small products over tensors of drawn
shapes, strides and dtypes. Every generated kernel runs in Triton's interpreter on the traced sizes
and, where the batch is dynamic, on one, no and more rows; with --ptx it also compiles to PTX for
sm_80 and sm_90. Results go to benchmarks/results/triton_regions.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.backends.triton.compiled import Compiled, Program
from graphopt.ir.capture import capture
from graphopt.ir.source import CaptureError
from graphopt.module import build

RESULTS = Path(__file__).parent / "results" / "triton_regions.json"
DTYPES = (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)
SIZES = (1, 2, 3, 4, 5, 7, 8, 16, 17)
Step = tuple[str, Callable[[Tensor], Tensor]]

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh,
    "exp": lambda x: torch.tanh(x).exp(),
    "sigmoid": torch.sigmoid, "square": lambda x: torch.tanh(x) ** 2, "abs": torch.abs, "neg": torch.neg,
    "softplus": F.softplus, "hardswish": F.hardswish, "elu": F.elu, "leaky_relu": F.leaky_relu,
    "clamp": lambda x: x.clamp(-1.5, 1.0), "rsqrt": lambda x: (x * x + 1).rsqrt(), "sin": torch.sin,
    "affine": lambda x: 0.5 * x + 0.25, "erf": torch.erf, "log1p": lambda x: x.abs().log1p(),
    "masked": lambda x: x.masked_fill(x > 0.5, 0.5),
}  # fmt: skip


@dataclasses.dataclass
class Drawn(nn.Module):
    """A drawn function: `steps` on the first input; a step may read another input."""

    steps: list[Step]
    inputs: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        super().__init__()

    __hash__ = nn.Module.__hash__

    def forward(self, x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        kept = []
        for name, step in self.steps:
            x = step(x, *others) if name.startswith("with") else step(x)  # type: ignore[call-arg]
            if name.startswith("keep"):
                kept.append(x)
        return (x, *kept)

    def __repr__(self) -> str:
        shapes = [f"{tuple(one.shape)}/{one.stride()} {one.dtype}" for one in self.inputs]
        return f"Drawn({' > '.join(name for name, _ in self.steps)}; {', '.join(shapes)})"


def draw(rng: random.Random) -> Drawn:
    """A function and inputs with their strides."""
    dtype = rng.choice(DTYPES)
    shape = tuple(rng.choice(SIZES[1:]) for _ in range(rng.randint(2, 4)))
    generator = torch.Generator().manual_seed(rng.randint(0, 10**6))
    main = _strided(rng, shape, dtype, generator)
    others: list[Tensor] = []
    steps: list[Step] = []
    current = shape
    for _ in range(rng.randint(1, 6)):
        name, step, other = _step(rng, current, len(others), dtype, generator)
        if other is not None:
            others.append(other)
        filled = [torch.zeros(one.shape, dtype=one.dtype) for one in others]
        value = torch.zeros(current, dtype=dtype)
        current = tuple((step(value, *filled) if other is not None else step(value)).shape)
        steps.append((name, step))
    return Drawn(steps, (main, *others))


def _strided(
    rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """A tensor of a shape: dense, with its axes stored in another order, or with gaps."""
    how = rng.choice(("dense", "dense", "permuted", "gaps"))
    if how == "permuted":
        order = list(range(len(shape)))
        rng.shuffle(order)
        stored = torch.randn([shape[axis] for axis in order], generator=generator)
        return stored.to(dtype).permute([order.index(axis) for axis in range(len(shape))])
    if how == "gaps":
        stored = torch.randn([*shape[:-1], shape[-1] + 3], generator=generator)
        return stored.to(dtype)[..., 1 : 1 + shape[-1]]
    return torch.randn(shape, generator=generator).to(dtype)


def _step(
    rng: random.Random, shape: tuple[int, ...], count: int, dtype: torch.dtype,
    generator: torch.Generator,
) -> tuple[str, Callable[..., Tensor], Tensor | None]:  # fmt: skip
    rank = len(shape)
    dim = rng.randrange(rank) if rank else 0
    kinds = ["unary", "unary", "binary", "binary", "keep"]
    if rank:
        kinds += ["normalize", "reduce", "view", "view", "pad", "cat"]
    if rank >= 2 and dtype != torch.float64:
        kinds.append("product")
    kind = rng.choice(kinds)
    if kind in ("unary", "keep"):
        name = rng.choice(sorted(UNARY))
        return ("keep " if kind == "keep" else "") + name, UNARY[name], None
    if kind == "binary":
        return _binary(rng, shape, count, dtype, generator)
    if kind == "product":
        width = rng.choice(SIZES[1:])
        weight = torch.randn(width, shape[-1], generator=generator).to(dtype) / shape[-1] ** 0.5
        return f"with linear {width}", lambda x, *o: F.linear(x, o[count]), weight
    if kind == "normalize":
        return f"normalize {dim}", _normalizer(shape, dim, rng), None
    if kind == "reduce":
        name = rng.choice(("sum", "mean", "amax", "amin", "var"))
        keep = rng.random() < 0.7
        if name == "var":
            return f"var {dim}", lambda x: x.var(dim, correction=0, keepdim=keep), None
        return f"{name} {dim}", lambda x: getattr(x, name)(dim, keepdim=keep), None
    if kind == "pad":
        pads = [rng.randint(0, 2), rng.randint(0, 2)]
        return f"pad {pads}", lambda x: F.pad(x, pads, value=0.5), None
    if kind == "cat":
        return f"cat {dim}", lambda x: torch.cat([x, x * 0.5], dim), None
    return (*_view(rng, shape, dim), None)


def _normalizer(shape: tuple[int, ...], dim: int, rng: random.Random) -> Callable[[Tensor], Tensor]:
    choice = rng.randrange(4)
    if choice == 0:
        return lambda x: x.softmax(dim)
    if choice == 1:
        return lambda x: x.log_softmax(dim)
    if choice == 2 and len(shape) >= 3 and shape[1] % 2 == 0:
        return lambda x: F.group_norm(x, 2, eps=0.1)
    return lambda x: F.layer_norm(x, x.shape[-1:], eps=0.1)


def _binary(
    rng: random.Random, shape: tuple[int, ...], count: int, dtype: torch.dtype,
    generator: torch.Generator,
) -> tuple[str, Callable[..., Tensor], Tensor]:  # fmt: skip
    start = rng.randint(0, len(shape))
    other = [size if rng.random() < 0.7 else 1 for size in shape[start:]]
    tensor = _strided(rng, tuple(other), dtype, generator) if other else torch.randn(
        (), generator=generator).to(dtype)  # fmt: skip
    name, function = rng.choice([
        ("add", torch.add), ("mul", torch.mul), ("sub", torch.sub), ("maximum", torch.maximum),
        ("minimum", torch.minimum), ("div", lambda a, b: a / (b * b + 1)),
        ("where", lambda a, b: torch.where(b > 0, a, b)),
    ])  # fmt: skip
    return f"with {name} {other}", lambda x, *o: function(x, o[count]), tensor


def _view(
    rng: random.Random, shape: tuple[int, ...], dim: int
) -> tuple[str, Callable[[Tensor], Tensor]]:
    kind = rng.choice(("permute", "merge", "split", "slice", "flip", "select", "unsqueeze"))
    rank, size = len(shape), shape[dim]
    if kind == "permute":
        order = list(range(rank))
        rng.shuffle(order)
        return f"permute {order}", lambda x: x.permute(order)
    if kind == "merge" and rank >= 2:
        first = rng.randrange(rank - 1)
        return f"flatten {first}", lambda x: x.flatten(first, first + 1)
    if kind == "split" and size % 2 == 0 and dim > 0:
        return f"unflatten {dim}", lambda x: x.unflatten(dim, (2, size // 2))
    if kind == "slice" and dim > 0 and size > 2:
        return f"slice {dim}", lambda x: x.narrow(dim, 1, size - 2)
    if kind == "flip":
        return f"flip {dim}", lambda x: x.flip(dim)
    if kind == "select" and dim > 0:
        return f"select {dim}", lambda x: x.select(dim, size - 1)
    return f"unsqueeze {dim}", lambda x: x.unsqueeze(dim)


# -- checking ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Checked:
    """What came of one region. `error` and `own` are the largest relative errors against float64,
    of the kernels and of torch's ops in the same dtype."""

    program: Program
    error: float
    own: float
    rows: tuple[int, ...]
    covered: tuple[int, int]


def check(drawn: Drawn) -> Checked | None:
    """Compile and run a region; None if torch itself cannot export it.

    Raises:
        AssertionError: if the kernels are further from float64 than torch's ops by more than rounding.
    """
    try:
        graph = capture(drawn, drawn.inputs).graph
    except CaptureError:
        return None
    module = build(graph)
    fast = Compiled(module)
    worst = own = 0.0
    rows = (drawn.inputs[0].shape[0],)
    sizes = [n.meta["type"]["shape"] for n in module.graph.nodes if n.op == "placeholder"]
    if isinstance(sizes[0][0], str):
        rows = (*rows, 1, 0, 5)
    program = fast.program(list(drawn.inputs))
    for count in rows:
        inputs = [
            _resized(one, count) if one.ndim and shape[0] == sizes[0][0] else one
            for one, shape in zip(drawn.inputs, sizes, strict=True)
        ]
        with torch.no_grad():
            try:
                same = module(*inputs)
            except (IndexError, RuntimeError):
                continue  # a maximum of nothing
            found = fast(*inputs)
            truth = drawn(*(one.double() for one in inputs))
        for a, b, c in zip(found, same, truth, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype, (drawn, count)
            error, theirs = _error(a, c), _error(b, c)
            eps = torch.finfo(a.dtype).eps
            assert error <= 4 * theirs + 32 * eps, f"{drawn} at {count} rows: {error} ({theirs})"
            worst, own = max(worst, error), max(own, theirs)
    return Checked(program, worst, own, rows, program.coverage)


def _resized(tensor: Tensor, rows: int) -> Tensor:
    """So many rows, with strides like the tensor's."""
    reach = [size if axis else max(rows, 1) for axis, size in enumerate(tensor.shape)]
    order = sorted(range(tensor.ndim), key=lambda axis: -tensor.stride(axis))
    stored = torch.randn(
        [reach[axis] for axis in order], generator=torch.Generator().manual_seed(3)
    )
    view = stored.to(tensor.dtype).permute([order.index(axis) for axis in range(tensor.ndim)])
    return view[:rows]


def _error(found: Tensor, truth: Tensor) -> float:
    if not found.numel():
        return 0.0
    scale = max(float(truth.abs().nan_to_num(0.0, 0.0, 0.0).max()), 1e-3)
    same = (found.double() == truth) | (found.isnan() & truth.isnan())
    away = torch.where(same, 0.0, (found.double() - truth).abs()).nan_to_num(float("inf"))
    return float(away.max()) / scale


regions = st.randoms(use_true_random=False).map(draw)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--ptx", action="store_true")
    options = parser.parse_args()
    start = time.time()
    seen: list[Checked] = []
    tally: Counter[str] = Counter()

    @hypothesis.settings(
        max_examples=options.count, derandomize=True, deadline=None, database=None,
        suppress_health_check=list(hypothesis.HealthCheck), phases=[hypothesis.Phase.generate],
    )  # fmt: skip
    @hypothesis.given(regions)
    def run(drawn: Drawn) -> None:
        tally["drawn"] += 1
        found = check(drawn)
        if found is None:
            tally["not exported by torch"] += 1
            return
        seen.append(found)
        tally.update(region.kind for region in found.program.regions)

    run()
    result: dict[str, Any] = {
        **tally,
        "agree with float64": len(seen),
        "largest error over torch's own": max(
            (one.error / max(one.own, 1e-16) for one in seen), default=0
        ),
        "nodes in kernels": sum(one.covered[1] for one in seen),
        "pointwise and reduction nodes": sum(one.covered[0] for one in seen),
        "seconds": round(time.time() - start),
    }
    if options.ptx:
        from graphopt.backends.triton.ptx import compile_all

        units = [unit for one in seen for region in one.program.regions for unit in region.units()]
        found = compile_all({unit.key: unit for unit in units}.values())
        failures = [one for one in found if one.error]
        result["kernels compiled to PTX"] = len(found)
        result["PTX failures"] = len(failures)
        result["with spills"] = sum(one.spills > 0 for one in found)
        result["largest registers"] = max((one.registers for one in found), default=0)
        for one in failures[:5]:
            print(one)
    result["seconds in all"] = round(time.time() - start)
    print(json.dumps(result, indent=1))
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
