"""Patterns with numbers for sizes, as PyTorch code that runs.

The prover's patterns say what a rewrite looks at; an instance of one fixes sizes, numbers, dtype and
what surrounds it, and is a module in plain PyTorch: what a counterexample is reported as.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import sympy as sp
import torch
from torch import nn

from graphopt.ir.value import Value
from graphopt.verify.proof.algebra import sym
from graphopt.verify.proof.pattern import Infeasible, find, inputs
from graphopt.verify.proof.sizes import Flag, Real, Size
from graphopt.verify.proof.symbols import Symbols

Draw = Callable[[str], Any]


@dataclasses.dataclass(frozen=True)
class Around:
    """What surrounds a pattern in a test.

    `twice`: the same code with the same parameters runs on two inputs. `read`: how many of the
    pattern's values are read by something else too. `keywords`: arguments are passed by keyword.
    """

    dtype: torch.dtype = torch.float64
    twice: bool = False
    read: int = 0
    keywords: bool = False


class Numbers:
    """Numbers for the symbols of a pattern, drawn and then adjusted to what the pattern demands."""

    def __init__(self, pattern: Symbols, size: Draw, number: Draw) -> None:
        self.pattern = pattern
        self._size, self._number = size, number
        self.values: dict[Any, Any] = {}
        for out, stride, dilation, extra in pattern.spreads:
            self._spread(out, stride, dilation, extra)
        for whole, reach, stride, out in reversed(pattern.covers):
            self._cover(whole, reach, stride, out)
        for _, reach, stride, out in pattern.covers:
            if self(reach) // self(stride) + 1 != self(out):
                raise Infeasible("sizes do not fit")

    def _cover(self, whole: Any, reach: Any, stride: Any, out: Any) -> None:
        """A size that a window covers is drawn so that the window's output has its size."""
        whole = self.pattern.space.resolve(whole)
        if whole.is_Symbol and whole not in self.values:
            rest = sp.expand(self.pattern.space.resolve(reach) - whole)
            if not rest.has(whole):
                found = (self(out) - 1) * self(stride) - self(rest)
                if found < 1:
                    raise Infeasible("a window larger than its input")
                self.values[whole] = found

    def _spread(self, out: Any, stride: Any, dilation: Any, extra: Any) -> None:
        """The output of a transposed convolution has the size that its output padding leaves."""
        out, base = self.pattern.space.resolve(out), self.pattern.space.resolve(out - extra)
        if out.is_Symbol and out not in self.values and not base.has(out):
            room = max(self(stride), self(dilation))
            self.values[out] = self(base) + min(self._size("extra"), room - 1)
        if not 0 <= self(extra) < max(self(stride), self(dilation)):
            raise Infeasible("output padding does not fit")

    def __call__(self, expr: Any) -> Any:
        expr = self.pattern.space.resolve(sym(expr)) if not isinstance(expr, float) else sym(expr)
        for symbol in sorted(expr.free_symbols, key=lambda s: s.name):
            if symbol not in self.values:
                if symbol.is_integer:
                    least = 1 if symbol.is_positive else 0
                    self.values[symbol] = max(least, self._size(symbol.name))
                else:
                    drawn = self._number(symbol.name)
                    self.values[symbol] = abs(drawn) + 0.125 if symbol.is_positive else drawn
        found = sp.sympify(expr.xreplace(self.values))
        if found.is_Integer:
            return int(found)
        if not found.is_number:
            raise Infeasible(f"no number for {expr}")
        return float(found)

    @property
    def as_asked(self) -> bool:
        """Whether the answers the pattern was made with hold for these numbers."""
        for kind, a, b, answer in self.pattern.asked:
            left, right = self(a), self(b)
            if ((left == right) if kind == "=" else (left < right)) != answer:
                return False
        return True


class Code:
    """The source of a module that computes a pattern."""

    def __init__(self, pattern: Symbols, root: Value, numbers: Numbers, around: Around) -> None:
        self.pattern, self.numbers, self.around = pattern, numbers, around
        self.lines: list[str] = []
        self.states: dict[str, tuple[int, ...]] = {}
        self.arguments: dict[str, tuple[int, ...]] = {}
        self.names: dict[Any, str] = {}
        self.computed: list[str] = []
        self.result = self.value(root)
        if not self.arguments:
            raise Infeasible("nothing depends on an input")

    def value(self, value: Value) -> str:
        node = find(value.node)
        if node in self.names:
            return self.names[node]
        name = node.name
        if not node.computed:
            shape = tuple(self.size(one) for one in node.meta["val"].shape)
            if node.constant:
                self.states[name] = shape
                name = f"self.{name}"
            else:
                self.arguments[name] = shape
        else:
            for one in inputs(node.view):
                self.value(Value(one, self.pattern))  # type: ignore[arg-type]
            target, arguments = node.view.build()
            call = f"torch.ops.{target._schema.name.replace('::', '.')}.{target._overloadname}"
            text = [
                (schema.name, self.literal(arguments[schema.name]), schema.kwarg_only)
                for schema in target._schema.arguments if schema.name in arguments
            ]  # fmt: skip
            spelled = [
                f"{key}={item}" if kwarg_only or self.around.keywords else item
                for key, item, kwarg_only in text
            ]
            self.lines.append(f"{name} = {call}({', '.join(spelled)})")
            self.computed.append(name)
        self.names[node] = name
        return name

    def size(self, one: Any) -> int:
        found = self.numbers(one)
        if not isinstance(found, int) or found < 1 or found > 64:
            raise Infeasible(f"size {found}")
        return found

    def literal(self, item: Any) -> str:
        if isinstance(item, Value):
            return self.value(item)
        if isinstance(item, Flag):
            return str(bool(item))
        if isinstance(item, (Size, Real)):
            return repr(self.numbers(item))
        if isinstance(item, (tuple, list)):
            return f"[{', '.join(map(self.literal, item))}]"
        if isinstance(item, torch.device):
            return f"torch.{item!r}".replace("torch.torch", "torch")
        return repr(item)

    def source(self) -> str:
        """The module as a file that defines `model` and `inputs`."""
        dtype = self.around.dtype
        body = "\n        ".join(self.lines) or "pass"
        states = "\n".join(
            f'        self.register_buffer("{name}", {_random(name, shape, i)})'
            if name.startswith(("mean", "var"))
            else f"        self.{name} = nn.Parameter({_random(name, shape, i)})"
            for i, (name, shape) in enumerate(self.states.items())
        )
        outputs = [
            self.result,
            *(f"torch.tanh({name})" for name in self.computed[: self.around.read]),
        ]
        names = ", ".join(self.arguments)
        call = ", ".join(f"torch.tanh({name})" for name in self.arguments)
        again = f", *self.block({call})" if self.around.twice else ""
        drawn = ", ".join(
            f"{_random(name, shape, 100 + i)}.to({dtype})"
            for i, (name, shape) in enumerate(self.arguments.items())
        )
        return f"""import torch
from torch import nn


def draw(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
{states or "        pass"}

    def block(self, {names}):
        {body}
        return {", ".join(outputs)},

    def forward(self, {names}):
        return (*self.block({names}){again},)


model = Model().to({dtype}).eval()
inputs = ({drawn + "," if drawn else ""})
"""


def _random(name: str, shape: tuple[int, ...], seed: int) -> str:
    drawn = f"draw({''.join(f'{size}, ' for size in shape)}seed={seed})"
    return f"{drawn}.abs()" if name.startswith("var") else drawn


def load(source: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The module and the inputs that a source defines."""
    scope: dict[str, Any] = {}
    exec(compile(source, "<counterexample>", "exec"), scope)
    return scope["model"], scope["inputs"]
