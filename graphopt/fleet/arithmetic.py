"""Task arithmetic on checkpoints, tensor by tensor (arXiv:2212.04089).

    result = base + sum_i lambda_i (theta_i - base)

in float64, rounded once to the dtype of the base. Weights may be negative, which takes a task away: with
`[(tuned, 1), (source, -1)]` the base learns what `tuned` has over `source`. Where a term is the base itself,
or its weight is 0, it changes nothing, bit for bit.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from graphopt.files import beside, replace
from graphopt.fleet.mapped import CheckpointError, Files, bounded
from graphopt.fleet.shards import check_target, layout, write_index, write_shard

PIECE = 1 << 22  # elements that are in float64 at a time

Place = str | os.PathLike[str]
Weight = float | Callable[[str], float]


def combine(
    base: Place, terms: Sequence[tuple[Place, Weight]], output: Place, *,
    memory: int = 2 << 30, shard: int = 256 << 20, progress: Callable[[str], None] | None = None,
) -> list[str]:  # fmt: skip
    """Add to a checkpoint what others, of the same model, have over it.

    Args:
        base: safetensors, an index of sharded ones, or a folder of either.
        terms: checkpoints with tensors of the same names and shapes, and their weights: a number, or a
            function of a tensor's name. What is no floating point number, a counter for instance, stays
            the base's.
        output: a folder, which is replaced whole at the end.
        memory: bytes this process is to hold at most. A shard must fit beside what Python needs.
        shard: bytes of a file of the result at most, unless one tensor is larger.
        progress: called with a line of text at each step.

    Returns:
        The names of the files written.

    Raises:
        CheckpointError: if names or shapes differ, or a weight or a result is not finite.
    """
    target, say = Path(output), progress or (lambda _: None)
    check_target(target)
    own = Files([base])
    others = [(Files([place]), place, weight) for place, weight in terms]
    for files, place, _ in others:
        _check(own.tensors, files.tensors, place)

    def value(name: str) -> Tensor:
        weighted = [
            (files.tensors[name], _weight(weight, name, place)) for files, place, weight in others
        ]
        try:
            return combined(own.tensors[name], weighted)
        except OverflowError as error:
            raise CheckpointError(f"{name} {error}") from error

    with ExitStack() as stack:
        for files in (own, *(one for one, _, _ in others)):
            stack.enter_context(bounded(files, memory))
        shards = layout(((name, own.tensors[name].nbytes) for name in sorted(own.tensors)), shard)
        work = stack.enter_context(beside(target))
        os.chmod(work, 0o755)
        for one in shards:
            say(f"writing {one.file}")
            write_shard(one, value, work)
        write_index(shards, work)
        replace(work, target)
    return [one.file for one in shards]


def combined(base: Tensor, terms: Sequence[tuple[Tensor, float]]) -> Tensor:
    """`base + sum of weight * (term - base)`, a new tensor of the dtype of `base`, piece by piece.

    Raises:
        OverflowError: if that is not finite where the base is.
    """
    if not (base.is_floating_point() or base.is_complex()):
        return base.clone()
    wide = torch.complex128 if base.is_complex() else torch.float64
    found = torch.empty(base.shape, dtype=base.dtype)
    tensors = (found, base, *(one for one, _ in terms))
    flat = [torch.split(one.reshape(-1), PIECE) for one in tensors]
    for into, start, *parts in zip(*flat, strict=True):
        exact = start.to(wide)
        moved = exact.clone()
        for part, (_, weight) in zip(parts, terms, strict=True):
            moved += weight * (part.to(wide) - exact)
        into.copy_(moved)
        if not bool((into.to(wide).isfinite() | ~exact.isfinite()).all()):
            raise OverflowError(f"is not finite in {base.dtype}")
    return found


def _weight(weight: Weight, name: str, place: Place) -> float:
    found = float(weight(name) if callable(weight) else weight)
    if not math.isfinite(found):
        raise CheckpointError(f"{place}: the weight of {name} is {found}")
    return found


def _check(base: dict[str, Tensor], term: dict[str, Tensor], place: Place) -> None:
    for names, what in (
        (base.keys() - term, "lacks"),
        (term.keys() - base, "has, and the base lacks,"),
    ):
        if names:
            raise CheckpointError(f"{place} {what} {min(names)}")
    for name, one in term.items():
        if one.shape != base[name].shape:
            raise CheckpointError(f"{place}: {name} has the shape {tuple(one.shape)}, expected that of the "
                                  f"base, {tuple(base[name].shape)}")  # fmt: skip
        if one.is_floating_point() != base[name].is_floating_point():
            raise CheckpointError(f"{place}: {name} is {one.dtype}, in the base {base[name].dtype}")
