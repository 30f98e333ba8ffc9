"""A free-form program under construction: Python source that runs while it is written.

Every statement runs at once on inputs of two batch sizes. What raises, overflows or comes too close
to a discontinuity is not kept, what grows is scaled down: the next statement sees real shapes and
values. Axes whose sizes differ between the two runs are those of the batch, which no statement counts.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.testing.strategies.network import Draw, Shape, normal, settle

ROWS = (3, 5)
MOST = 2048  # elements of a value
LARGE = 20.0  # magnitude beyond which a value is scaled down
GAP = 1e-6  # how far values stay from a discontinuity: rounding is 1e-15


class Program(nn.Module):
    """A module whose forward is `code`; it prints its modules and the code."""

    code = ""

    def __repr__(self) -> str:
        return f"{super().__repr__()}\n{self.code}"


class Sketch:
    """The lines so far, and the two environments in which they ran."""

    def __init__(self, draw: Draw, seed: int) -> None:
        self.draw = draw
        self.module = Program().eval()
        self.seed = seed
        self.lines: list[str] = []
        self.pool: list[str] = []
        self.envs: tuple[dict[str, Any], ...] = tuple(
            {"torch": torch, "F": F, "math": math, "self": self.module} for _ in ROWS
        )
        self.count = 0

    # -- drawing ------------------------------------------------------------------------------

    def choose(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))  # type: ignore[no-any-return]

    def flag(self) -> bool:
        return self.draw(st.booleans())  # type: ignore[no-any-return]

    def pick(self, fits: Callable[[str], bool] | None = None, floating: bool = True) -> str | None:
        """A value, newest first when shrunk; None if none fits."""
        good = [
            name
            for name in reversed(self.pool)
            if (not floating or self.value(name).is_floating_point()) and (not fits or fits(name))
        ]
        return self.choose(good) if good else None

    def integer(self) -> str | None:
        """A value of integers, made if there is none."""
        kinds = (torch.int64, torch.int32)
        found = self.pick(lambda one: self.value(one).dtype in kinds, floating=False)
        if found is not None and self.flag():
            return found
        return self.let(
            self.choose(["torch.arange(4)", "torch.tensor([2, 0, 1])", "torch.ones(3).long()"])
        )

    # -- reading ------------------------------------------------------------------------------

    def value(self, name: str) -> Any:
        return self.envs[0][name]

    def shape(self, name: str) -> Shape:
        return tuple(self.value(name).shape)

    def fixed(self, name: str) -> list[int]:
        """The axes whose size does not depend on the batch, counted from the back as -1, -2."""
        one, two = (env[name].shape for env in self.envs)
        return [i - len(one) for i in range(len(one)) if one[i] == two[i]]

    def axis(self, name: str, least: int = 1) -> int | None:
        """One such axis of at least `least`, counted from either end."""
        good = [one for one in self.fixed(name) if self.shape(name)[one] >= least]
        if not good:
            return None
        one: int = self.choose(good)
        return one + len(self.shape(name)) if self.flag() else one

    def batched(self, name: str) -> bool:
        """Whether the first axis, and no other, is the batch."""
        one, two = (env[name].shape for env in self.envs)
        return len(one) > 0 and one[0] != two[0] and one[1:] == two[1:]

    def far_from(self, name: str, *points: float) -> bool:
        """Whether rounding cannot move any element across a point."""
        return all(
            bool(((env[name].double() - point).abs() > GAP).all())
            for env in self.envs
            for point in points
        )

    # -- writing ------------------------------------------------------------------------------

    def let(self, expression: str | None) -> str | None:
        """`vK = expression`; the name, or None if it does not run or gives nothing of use."""
        if expression is None:
            return None
        name = f"v{self.count}"
        if not self.run(f"{name} = {expression}"):
            return None
        self.count += 1
        results = [env[name] for env in self.envs]
        if not all(isinstance(one, Tensor) and 0 < one.numel() <= MOST for one in results):
            self._undo(name)
            return None
        if results[0].is_complex() or not all(bool(one.isfinite().all()) for one in results):
            self._undo(name)
            return None
        size = max(float(one.double().abs().max()) for one in results)
        if results[0].is_floating_point() and size > LARGE:
            shrunk = f"torch.tanh({name})" if size < 1e3 else f"{name} / {round(size)}"
            self.run(f"{name} = {shrunk}")
        self.pool.append(name)
        return name

    def run(self, line: str) -> bool:
        """Append a line, unless it raises."""
        try:
            with torch.no_grad():
                for env in self.envs:
                    exec(line, env)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            return False
        self.lines.append(line)
        return True

    def _undo(self, name: str) -> None:
        self.lines.pop()
        for env in self.envs:
            del env[name]

    def attach(self, kind: str, thing: nn.Module | Tensor) -> str:
        """Give the program a module, parameter or buffer of its own; how the code refers to it."""
        taken = (*self.module._modules, *self.module._parameters, *self.module._buffers)
        name = f"{kind}{sum(one.startswith(kind) for one in taken)}"
        if isinstance(thing, nn.Module):
            self.seed += 1
            settle(thing.double(), self.seed)
            self.module.add_module(name, thing)
        elif isinstance(thing, nn.Parameter):
            self.module.register_parameter(name, thing)
        else:
            self.module.register_buffer(name, thing)
        return f"self.{name}"

    def random(self, *shape: int) -> Tensor:
        """Uniform numbers in [-1.5, 1.5]."""
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        return 3 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1.5

    def parameter(self, *shape: int) -> str:
        return self.attach("p", nn.Parameter(self.random(*shape)))

    def input(self, name: str, shape: Shape) -> None:
        """An input `[rows, *shape]`."""
        self.seed += 1
        for rows, env in zip(ROWS, self.envs, strict=True):
            env[name] = normal((rows, *shape), self.seed)
        self.pool.append(name)

    def define(self, name: str, value: Any) -> None:
        """An input that is no tensor."""
        for env in self.envs:
            env[name] = value

    def finish(self, signature: str, result: str) -> Program:
        """The program that returns `result`."""
        code = f"def forward(self, {signature}):\n"
        code += textwrap.indent("\n".join([*self.lines, f"return {result}"]), "    ")
        scope: dict[str, Any] = {"torch": torch, "F": F, "math": math}
        exec(code, scope)
        forward = scope["forward"]
        self.module.__class__ = type("Program", (Program,), {"forward": forward, "code": code})
        return self.module


Statement = Callable[[Sketch], Any]
STATEMENTS: dict[str, Statement] = {}  # name -> what writes one statement, or none where none fits


def statement(make: Statement) -> Statement:
    """Enter a writer of statements into the table."""
    STATEMENTS[make.__name__] = make
    return make
