"""Where two modules part: the first value of one that the other does not compute.

Both run in float64, every op leaves a sketch of its results, and values of equal sketches are equal.
Rewritten graphs lack values of their source and have others in between (a convolution that absorbed
a batch norm computes the norm's output), so values are paired by what they are, and module paths
say where they are. From the outputs that differ, walk back through values that the source never
computes, until all that an op reads is known: that op is where the two part. What differs in between
and agrees again later is never reached.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.utils.weak import WeakTensorKeyDictionary

from graphopt.verify.lifted import Lifted, run_lifted

BUCKETS = 64  # the norm of a sketch is that of the value to about 1 / sqrt(BUCKETS)
HUGE = 1e30  # masks hold infinities and the least number of a dtype


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The first value of the optimized module that its source does not compute.

    `where` is its module path and `value` its name; `source_where` and `source_value` are of the
    nearest value of the same module of the source, from which it is off by about `error` (relative,
    2-norm). `reads` are the values of the source that agree with what it was computed from.
    """

    where: str
    value: str
    source_where: str
    source_value: str
    error: float
    reads: list[str]

    def __str__(self) -> str:
        reads = ", ".join(self.reads) or "nothing"
        return (
            f"{_place(self.value, self.where)}; nearest in the source: "
            f"{_place(self.source_value, self.source_where)}, off by {self.error:.1e}; "
            f"what it reads agrees with {reads}"
        )


@dataclasses.dataclass(frozen=True)
class Seen:
    """A value: module path, name, sketch, and the indices of the values it was computed from.

    `size` is its number of elements, `free` says that it does not depend on the inputs.
    """

    where: str
    name: str
    size: int
    sketch: torch.Tensor
    reads: tuple[int, ...]
    free: bool

    def __str__(self) -> str:
        return _place(self.name, self.where)


def _place(value: str, where: str) -> str:
    return f"{value} ({where})" if where else value


class Trace(Lifted):  # type: ignore[no-untyped-call]
    """Everything that a module computes from the inputs of one call, in order."""

    def __init__(self, module: nn.Module, inputs: Any) -> None:
        """Run `module`, which must be a float64 copy that is not needed as it was."""
        super().__init__()
        self.values: list[Seen] = []
        self._index = WeakTensorKeyDictionary()
        self._signs: dict[int, torch.Tensor] = {}
        self._frames = [("", "")]
        with self._watching(module):
            outputs = pytree.tree_leaves(run_lifted(module, inputs, self))
        self.outputs = [self._index[one] for one in _tensors(outputs) if one in self._index]

    def starts(self, inputs: list[Any]) -> None:
        for one in _tensors(inputs):
            self._note(one, "the input", "", (), free=False)

    def saw(self, func: Any, given: Any, found: Any) -> None:
        reads = tuple({self._index[one]: None for one in _tensors(given) if one in self._index})
        free = all(self.values[index].free for index in reads)
        where, name = self._frames[-1]
        for one in _tensors(found):
            self._note(one, name or func.overloadpacket.__name__, where, reads, free)

    def _note(
        self, tensor: torch.Tensor, name: str, where: str, reads: tuple[int, ...], free: bool
    ) -> None:
        self._index[tensor] = len(self.values)
        self.values.append(
            Seen(where, name, tensor.numel(), self._sketch(tensor), reads, free)
        )  # fmt: skip

    def _sketch(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums of the elements under random signs, over BUCKETS classes of positions."""
        tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        flat = tensor.detach().cpu().flatten().double()
        flat = flat.nan_to_num(HUGE, HUGE, -HUGE).clamp(-HUGE, HUGE)
        size = flat.numel()
        if size not in self._signs:
            generator = torch.Generator().manual_seed(size)
            self._signs[size] = 2 * torch.randint(0, 2, (size,), generator=generator).double() - 1
        flat = torch.nn.functional.pad(flat * self._signs[size], (0, -size % BUCKETS))
        return flat.view(-1, BUCKETS).sum(0)

    # -- module paths -------------------------------------------------------------------------

    @contextmanager
    def _watching(self, module: nn.Module) -> Iterator[None]:
        """Know at every op which module it belongs to."""
        handles = []
        for path, one in module.named_modules():
            path = path.removeprefix("_orig_mod").lstrip(".")  # of torch.compile
            handles += [
                one.register_forward_pre_hook(lambda *_, path=path: self._enter(path)),
                one.register_forward_hook(lambda *_: self._leave(), always_call=True),
            ]
            inner = one if isinstance(one, fx.GraphModule) else getattr(one, "graph_module", None)
            if isinstance(inner, fx.GraphModule):
                self._mark(inner, path)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> None:
        self._frames.append((path, ""))

    def _leave(self) -> None:
        self._frames.pop()

    def _mark(self, module: fx.GraphModule, path: str) -> None:
        """Let a graph say which node comes next."""

        def mark(where: str, name: str) -> None:
            self._frames[-1] = (where, name)

        for node in list(module.graph.nodes):
            if node.op in ("call_function", "call_method"):
                where = ".".join(filter(None, (path, _where(node))))
                with module.graph.inserting_before(node):
                    module.graph.call_function(mark, (where, node.name))
        module.recompile()


def _where(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {"": ("",)}
    return str(node.meta.get("where", next(reversed(stack.values()))[0]))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [one for one in pytree.tree_leaves(tree) if isinstance(one, torch.Tensor)]


def first_divergence(source: Trace, optimized: Trace, tolerance: float) -> Divergence | None:
    """Where `optimized` starts to compute what `source` does not; None if that cannot be told.

    `tolerance` is the relative error up to which two values are the same.
    """
    known_values = _by_size(source.values)
    pairs = [_nearest(known_values, one) for one in optimized.values]

    def known(index: int) -> bool:
        return optimized.values[index].free or pairs[index][1] <= tolerance

    stack = list(optimized.outputs)
    apart: set[int] = set()
    while stack:
        index = stack.pop()
        if index not in apart and not known(index):
            apart.add(index)
            stack += optimized.values[index].reads
    if not apart:
        return None
    first = min(apart)
    value = optimized.values[first]
    parent = value.where.rpartition(".")[0]
    siblings = [one for one in source.values if one.where.rpartition(".")[0] == parent]
    found, error = _nearest(_by_size(siblings), value)
    if error > 0.5:  # none of them is anything like it
        found, error = _nearest(_by_size([s for s in siblings if s.where == value.where]), value)
    if found is None:
        found, error = pairs[first]
    reads = [str(pairs[index][0]) for index in value.reads if not optimized.values[index].free]
    return Divergence(
        value.where, value.name, found.where if found else "", found.name if found else "",
        error, list(dict.fromkeys(reads)),
    )  # fmt: skip


BySize = dict[int, tuple[list[Seen], torch.Tensor]]


def _by_size(values: list[Seen]) -> BySize:
    """Values and their stacked sketches by number of elements."""
    groups: dict[int, list[Seen]] = {}
    for one in values:
        groups.setdefault(one.size, []).append(one)
    return {size: (same, torch.stack([one.sketch for one in same]))
            for size, same in groups.items()}  # fmt: skip


def _nearest(values: BySize, to: Seen) -> tuple[Seen | None, float]:
    """The value nearest to another, and its relative distance; None, inf if none has its size."""
    if to.size not in values:
        return None, float("inf")
    same, sketches = values[to.size]
    away = (sketches - to.sketch).norm(dim=1)
    error = torch.where(away == 0, 0.0, away / sketches.norm(dim=1))
    index = int(error.argmin())
    return same[index], float(error[index])


def find_divergence(
    source: nn.Module, optimized: nn.Module, inputs: Any, tolerance: float
) -> Divergence | None:
    """`first_divergence` of two float64 copies, which are used up."""
    return first_divergence(Trace(source, inputs), Trace(optimized, inputs), tolerance)


__all__ = ["Divergence", "find_divergence"]
