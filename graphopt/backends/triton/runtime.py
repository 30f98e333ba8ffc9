"""Launches generated kernels.

A kernel's source goes to a file (Triton reads it back, and so can you), under
`$XDG_CACHE_HOME/graphopt/triton`. The source for dense inputs is the usual one; inputs with other
strides, or more elements than 32 bits count, get a variant of it on first use. Nothing is launched
for empty tensors: torch computes those.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sympy
import torch

from graphopt.backends.triton import interpreting, loops
from graphopt.backends.triton.blocks import gpu_blocks, grid, interpreted_blocks, power
from graphopt.backends.triton.source import Printed
from graphopt.backends.triton.text import index_text
from graphopt.backends.triton.tune import Cache, Choice, fastest, key_of, measured, unusable

if TYPE_CHECKING:
    from graphopt.backends.triton.generated import Generated

LARGEST = 2**31 - 1
MOST_BATCH = 2**16 - 1  # programs along the second axis of a grid


def cache_home() -> Path:
    """Where sources and measured block shapes are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "graphopt" / "triton"


@cache
def choices() -> Cache:
    """What was measured on this machine."""
    return Cache(cache_home() / "blocks.json")


def load(source: str, name: str) -> Any:
    """The Triton function `name` that a source text defines."""
    return _load(source, name, interpreting())


@cache
def _load(source: str, name: str, interpreted: bool) -> Any:
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(
        f"graphopt_kernels.{name}_{digest}", _written(source, f"{name}_{digest}.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


@cache
def _own_folder() -> Path:
    """A new folder that nobody else writes to, for this process alone."""
    return Path(tempfile.mkdtemp(prefix="graphopt-triton-"))


def _written(source: str, name: str) -> Path:
    """A file with this text, in the cache if that can be written."""
    for home in (cache_home, _own_folder):
        try:
            folder = home()
            path = folder / name
            folder.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.read_text() != source:
                fresh = path.with_suffix(f".{os.getpid()}")
                fresh.write_text(source)
                os.replace(fresh, path)  # at once: others may be reading it
            return path
        except OSError:
            continue
    raise OSError(f"cannot write {name} into {cache_home()}")


def checks(source: str) -> dict[str, bool]:
    """The options with which `tl.device_assert` does what it says: it stands for torch's own check
    of positions that are looked up."""
    return {"debug": True, "sanitize_overflow": False} if "tl.device_assert(" in source else {}


def numbers(
    expressions: Sequence[sympy.Expr], symbols: Sequence[sympy.Symbol]
) -> Callable[..., Any]:
    """A function from sizes to the values of expressions in them."""
    names = {symbol.name: f"n{position}" for position, symbol in enumerate(symbols)}
    body = "".join(f"{index_text(one, names)}, " for one in expressions)
    function: Callable[..., Any] = eval(f"lambda {', '.join(names.values())}: ({body})")
    return function


class Launch:
    """The launcher of a generated region: see `Region.launcher`."""

    def __init__(self, region: Generated) -> None:
        self.region = region
        self.__name__ = region.name
        self.__module__ = "graphopt_kernels"
        kernel = region.kernel
        self.count = len(region.inputs)
        self.end = self.count + len(kernel.sizes)  # further sizes are the reference's alone
        self.device = region.outputs[0].meta["val"].device
        self.stores = [store.buffer for store in kernel.stores]
        self.shapes = [numbers(buffer.shape, kernel.sizes) for buffer in self.stores]
        self.extent = numbers(kernel.extent, kernel.sizes)
        self.required = numbers(kernel.required, kernel.sizes)
        self.lookups = [
            (kernel.inputs.index(one.value.buffer), numbers([one.size], kernel.sizes), one.wraps)
            for one in kernel.expressions() if isinstance(one, loops.Position)
        ]  # fmt: skip
        self.failed = False
        self.variants: dict[Any, tuple[Any, Printed]] = {}
        self.choices: dict[Any, Choice] = {}

    def __call__(self, *arguments: Any) -> tuple[torch.Tensor, ...]:
        tensors, sizes = list(arguments[: self.count]), arguments[self.count : self.end]
        shapes = [shape(*sizes) for shape in self.shapes]
        empty = 0 in sizes or any(0 in one.shape for one in tensors) or any(0 in s for s in shapes)
        if empty or self.failed or min(self.required(*sizes), default=0) < 0:
            return self.region.reference(*arguments)  # type: ignore[no-any-return]
        places = sorted(tensors, key=lambda one: one.ndim == 0)  # a scalar may be elsewhere
        device = places[0].device if places else self.device
        tensors = [one if one.device == device else one.to(device) for one in tensors]
        outputs = tuple(
            torch.empty(shape, dtype=buffer.dtype, device=device)
            for shape, buffer in zip(shapes, self.stores, strict=True)
        )
        if interpreting() and self._astray(tensors, sizes):
            self.region.reference(*arguments)  # raises, unless what is astray is not read
        extent = self.extent(*sizes)
        strided = frozenset(k for k, one in enumerate(tensors) if not one.is_contiguous())
        wide = max([*map(math.prod, shapes), *map(_reach, tensors)]) > LARGEST
        function, form = self.variant(strided, wide)
        strides = [tensors[position].stride(axis) for position, axis in form.strides]
        given = [*tensors, *outputs, *sizes, *strides]

        def run(choice: Choice) -> None:
            assert choice.blocks is not None
            launched = function[grid(form, choice.blocks, extent)]
            if device.type == "cuda" and not interpreting():
                with torch.cuda.device(device):
                    launched(*given, **choice.blocks, num_warps=choice.warps, **checks(form.text))
            else:
                launched(*given, **choice.blocks)

        many = form.form == "product" and extent[2] > MOST_BATCH
        try:
            choice = Choice(None) if many else self.choice(form, extent, device, run, arguments)
            if choice.blocks is not None:
                run(choice)
                return outputs
        except Exception as error:
            if not unusable(error):
                raise
            self._given_up(error)
        return self.region.reference(*arguments)  # type: ignore[no-any-return]

    def _astray(self, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> bool:
        """Whether a position to look up is outside of its axis: Triton's interpreter, unlike a
        kernel, does not check."""
        for place, size, wraps in self.lookups:
            (count,), found = size(*sizes), tensors[place]
            if int(found.min()) < (-count if wraps else 0) or int(found.max()) >= count:
                return True
        return False

    def _given_up(self, error: Exception) -> None:
        """Leave the region to the framework from now on."""
        said = (str(error).strip().splitlines() or [""])[-1]
        self.region.notes.append(f"{self.region.name}: torch's own ops: {said}")
        self.failed = True

    def choice(
        self, form: Printed, extent: Sequence[int], device: torch.device,
        run: Callable[[Choice], None], arguments: Sequence[Any],
    ) -> Choice:  # fmt: skip
        """The blocks for an extent: measured on a GPU, fixed in the interpreter."""
        if interpreting():
            return Choice(interpreted_blocks(form, extent))
        key = form.text, device, tuple(map(power, extent))
        if key not in self.choices:
            name = key_of(torch.cuda.get_device_name(device), form.text, extent)
            found = choices().find(name)
            if found is None:
                found = self._measured(form, extent, run, arguments)
                choices().add(name, found)
            self.choices[key] = found
        return self.choices[key]

    def _measured(
        self, form: Printed, extent: Sequence[int], run: Callable[[Choice], None],
        arguments: Sequence[Any],
    ) -> Choice:  # fmt: skip
        """The fastest blocks; for a product, torch's own ops compete."""
        candidates = [Choice(blocks, warps) for blocks, warps in gpu_blocks(form.form, extent[1])]
        candidates = [
            one for one in candidates
            if not form.even or extent[0] % one.blocks["BLOCK"] == 0  # type: ignore[index]
        ]  # fmt: skip
        if form.form == "product":
            candidates.append(Choice(None))

        def either(choice: Choice) -> None:
            self.region.reference(*arguments) if choice.blocks is None else run(choice)

        return fastest(candidates, either, measured)

    def variant(self, strided: frozenset[int], wide: bool) -> tuple[Any, Printed]:
        """The kernel for inputs with strides of their own, or for 64-bit offsets."""
        key = strided, wide
        if key not in self.variants:
            kernel = self.region.described(strided) if strided else self.region.kernel
            if interpreting():
                form = self.region.interpreted(kernel)
            else:
                form = self.region.printed(kernel, wide)
            self.variants[key] = load(form.text, self.region.name), form
        return self.variants[key]


def _reach(tensor: torch.Tensor) -> int:
    """How far the last element is from the first, plus one."""
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
