"""What one call of a module does, and how far apart two of them are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from benchmarks.fuzz.row import Wrong

SMALLEST = 1e-3  # values below count as this: outputs are of order one, and may cancel to zero


@dataclasses.dataclass
class Observed:
    """One call: the leaves and structure of the result, the inputs and buffers after it, and which
    results share memory with what."""

    leaves: list[Any]
    structure: str
    inputs: list[Any]
    buffers: dict[str, Tensor]
    shared: set[tuple[Any, ...]]


def copied(value: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda one: one.detach().clone(), value)


@contextmanager
def put_back(module: nn.Module) -> Iterator[None]:
    """Afterwards, parameters and buffers have the values they had."""
    states = [*module.parameters(), *module.buffers()]
    kept = [one.detach().clone() for one in states]
    try:
        yield
    finally:
        with torch.no_grad():
            for state, value in zip(states, kept, strict=True):
                if not torch.equal(state, value):
                    state.copy_(value)


def observe(module: nn.Module, args: Any, kwargs: Any) -> Observed:
    args, kwargs = copied((args, kwargs))
    with torch.no_grad(), put_back(module):
        result = module(*args, **kwargs)
        leaves, spec = pytree.tree_flatten(result)
        inputs = pytree.tree_leaves((args, kwargs))
        shared = set(_shared(leaves, inputs, [*module.parameters(), *module.buffers()]))
        buffers = {name: one.clone() for name, one in module.named_buffers()}
        return Observed(copied(leaves), str(spec), copied(inputs), buffers, shared)


def _shared(leaves: list[Any], inputs: list[Any], states: list[Any]) -> Iterator[tuple[Any, ...]]:
    def memory(one: Any) -> Any:
        return one.untyped_storage().data_ptr() if isinstance(one, Tensor) else None

    owned = {memory(one) for one in states}
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            continue
        if memory(leaf) in owned:
            yield i, "a state"
        yield from ((i, "input", j) for j, one in enumerate(inputs) if memory(one) == memory(leaf))
        yield from ((i, "output", j) for j in range(i) if memory(leaves[j]) == memory(leaf))


def distance(found: list[Any], truth: list[Any], what: str) -> float:
    """The largest difference over the largest value, the worst over pairs.

    Raises:
        Wrong: where shapes, dtypes, integers, or the places of inf and nan differ.
    """
    if len(found) != len(truth):
        raise Wrong(f"{what}: {len(found)}, expected {len(truth)}")
    worst = 0.0
    for i, (a, b) in enumerate(zip(found, truth, strict=True)):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if type(a) is not type(b) or a != b:
                raise Wrong(f"{what} {i}: {a!r}, expected {b!r}")
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            raise Wrong(
                f"{what} {i}: {a.dtype} {list(a.shape)}, expected {b.dtype} {list(b.shape)}"
            )
        if not b.is_floating_point():
            if not torch.equal(a, b):
                raise Wrong(f"{what} {i}: integers differ")
            continue
        same = (a == b) | (a.isnan() & b.isnan())
        difference = torch.where(same, 0.0, a.double() - b.double()).abs()
        if not bool(difference.isfinite().all()):
            raise Wrong(f"{what} {i}: inf or nan where the source has none, or the reverse")
        if b.numel():
            largest = float(torch.where(b.isfinite(), b, 0.0).abs().max())
            worst = max(worst, float(difference.max()) / max(largest, SMALLEST))
    return worst
