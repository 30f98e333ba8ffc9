"""A step as text: what a scan repeats.

    def step(x0, v0, w0):
        mul = aten.mul.Tensor(v0, w0)
        add = aten.add.Tensor(mul, x0)
        ge = aten.ge.Scalar(add, 1.0)
        to = aten.to.dtype(ge, x0.dtype)
        sub = aten.sub.Tensor(add, to)
        return to, sub

Python by its grammar, but never executed: `parse` accepts assignments of calls of operators, with names,
numbers, None, lists and torch's constants as arguments, and nothing else. `x0.dtype` is the dtype of an
operand, so that the same text computes in float64 what is float64; `torch.float32`, a dtype that no operand
has, stands for float64 there too (see `Step.run`). So a step of float64 may be narrower inside only where
that rounds nothing: spikes, and small integers made of them.
"""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Callable, Container, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.ops.base import overload


class BodyError(ValueError):
    """A text that is no step, or a graph that cannot be written as one."""


@dataclasses.dataclass(frozen=True)
class Name:
    """A value by its name."""

    text: str


@dataclasses.dataclass(frozen=True)
class DtypeOf:
    """The dtype of a named value."""

    text: str


@dataclasses.dataclass(frozen=True)
class Line:
    """`name = target(*args, **kwargs)`."""

    name: str
    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()

    def reads(self, kind: type[Name] | type[DtypeOf] = Name) -> list[str]:
        """The values that are computed with (or whose dtype is), in order, as often as they are."""
        found: list[str] = []

        def visit(argument: Any) -> None:
            if isinstance(argument, kind):
                found.append(argument.text)
            elif isinstance(argument, tuple):
                for one in argument:
                    visit(one)

        visit((self.args, self.kwargs))
        return found


@dataclasses.dataclass(frozen=True)
class Step:
    """A function from `inputs` to `results`, by name."""

    inputs: tuple[str, ...]
    lines: tuple[Line, ...]
    results: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"    {one.name} = {_call(one)}" for one in self.lines]
        end = f"    return {', '.join(self.results)}"
        return "\n".join([f"def step({', '.join(self.inputs)}):", *lines, end])

    def run(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The results. Where all floating operands are float64, so is what a floating dtype in the text
        says."""
        wide = all(one.dtype == torch.float64 for one in values if one.is_floating_point())
        return _calls(self, wide)(*values)  # type: ignore[no-any-return]


@lru_cache(maxsize=1024)
def _calls(step: Step, wide: bool) -> Callable[..., Any]:
    """The calls of a step, one after the other; `wide` with float64 for floating dtypes."""
    graph = fx.Graph()
    env: dict[str, fx.Node] = {name: graph.placeholder(name) for name in step.inputs}

    def value(one: Any) -> Any:
        if isinstance(one, Name):
            return env[one.text]
        if isinstance(one, DtypeOf):
            return graph.call_function(getattr, (env[one.text], "dtype"))
        if isinstance(one, (tuple, list)):
            return [value(item) for item in one]
        if wide and isinstance(one, torch.dtype) and one.is_floating_point:
            return torch.float64
        return one

    for line in step.lines:
        args = tuple(map(value, line.args))
        kwargs = {key: value(one) for key, one in line.kwargs}
        env[line.name] = graph.call_function(line.target, args, kwargs)
    graph.output([env[one] for one in step.results])
    forward: Callable[..., Any] = fx.GraphModule(torch.nn.Module(), graph).forward
    return forward


# -- from a graph -------------------------------------------------------------------------------

_RESERVED = {"inf", "nan", "torch", "aten", "step", "None", "True", "False"}


def written(graph: fx.Graph, results: Iterable[fx.Node], inputs: Iterable[fx.Node]) -> Step:
    """The step that a graph of operator calls computes, dead ones left out.

    Raises:
        BodyError: naming a call that cannot be written, or a dtype that would be lost in float64.
    """
    inputs, results = list(inputs), list(results)
    names: dict[fx.Node, str] = {}
    needed: set[fx.Node] = set()
    stack = list(results)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += [] if node in inputs else node.all_input_nodes
    for node in (*inputs, *(one for one in graph.nodes if one in needed)):
        if node not in names:
            name = node.name.strip("_")
            while name in _RESERVED or name in names.values():
                name += "_"
            names[node] = name
    dtypes = {one.meta["val"].dtype: names[one] for one in reversed(inputs)}
    floating = {dtype for dtype in dtypes if dtype.is_floating_point}
    rounds = floating == {torch.float64} and not _exact(graph, needed)

    def argument(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return Name(names[value])
        if isinstance(value, (tuple, list)):
            return tuple(map(argument, value))
        if isinstance(value, torch.dtype) and value in dtypes:
            return DtypeOf(dtypes[value])
        if rounds and isinstance(value, torch.dtype) and value.is_floating_point:
            raise BodyError(f"a step that computes in {value} what is float64")
        if value is None or isinstance(value, (bool, int, float, torch.device, *_CONSTANTS)):
            return value
        raise BodyError(f"an argument of type {type(value).__name__} ({value})")

    lines = []
    for node in graph.nodes:
        if node not in needed or node in inputs:
            continue
        if not isinstance(node.target, torch._ops.OpOverload):
            raise BodyError(f"{node.name} ({node.target}) is no operator")
        kwargs = tuple((key, argument(value)) for key, value in node.kwargs.items())
        lines.append(Line(names[node], node.target, tuple(map(argument, node.args)), kwargs))
    return Step(
        tuple(names[one] for one in inputs), tuple(lines), tuple(names[one] for one in results)
    )


_SUMS = ("aten::add", "aten::sub", "aten::rsub")
_ALIKE = ("aten::neg", "aten::detach", "aten::clone", "aten::alias", "aten::to", "aten::_to_copy")


def _exact(graph: fx.Graph, needed: Container[fx.Node]) -> bool:
    """Whether all that a graph computes in less than float64 are integers that no operation on them
    rounds: what comparisons give, their sums, differences and products, also with integers."""
    sizes: dict[fx.Node, float] = {}

    def size(one: Any) -> float:
        if isinstance(one, fx.Node):
            return 1.0 if one.meta["val"].dtype == torch.bool else sizes.get(one, math.inf)
        whole = isinstance(one, (bool, int, float)) and math.isfinite(one) and one == int(one)
        return abs(float(one)) if whole else math.inf

    for node in graph.nodes:
        if node.op != "call_function" or node not in needed:
            continue
        dtype = node.meta["val"].dtype
        narrow = dtype.is_floating_point and dtype != torch.float64
        if not isinstance(node.target, torch._ops.OpOverload) or not narrow:
            continue
        name = node.target._schema.name
        reads = [one for one in node.args if isinstance(one, fx.Node)]
        if name in _SUMS or name == "aten::mul":
            combined = math.prod if name == "aten::mul" else sum
            found = combined(map(size, node.args[:2]))
            plain = len(node.args) == 2 and not node.kwargs
        else:
            found, plain = max(map(size, reads), default=math.inf), name in _ALIKE
        if not plain or not found < 1 / torch.finfo(dtype).eps:
            return False
        sizes[node] = found
    return True


# -- text ---------------------------------------------------------------------------------------

_CONSTANTS = (torch.dtype, torch.layout, torch.memory_format)


def _call(line: Line) -> str:
    schema = line.target._schema
    name = schema.name.replace("::", ".") + "." + (schema.overload_name or "default")
    parts = [_text(one) for one in line.args]
    parts += [f"{key}={_text(value)}" for key, value in line.kwargs]
    return f"{name}({', '.join(parts)})"


def _text(value: Any) -> str:
    if isinstance(value, Name):
        return value.text
    if isinstance(value, DtypeOf):
        return f"{value.text}.dtype"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    return repr(value)  # inf and nan too: they are no names of values


@lru_cache(maxsize=1024)
def parse(text: str) -> Step:
    """The step that a text describes; the inverse of `str`.

    Raises:
        BodyError: for any other text, naming the line.
    """
    try:
        (function,) = ast.parse(text).body
    except (SyntaxError, ValueError) as error:
        raise BodyError(f"expected one step, found {text[:80]!r} ({error})") from None
    if not isinstance(function, ast.FunctionDef):
        raise BodyError(f"expected def step(...), found {text[:80]!r}")
    inputs = tuple(one.arg for one in function.args.args)
    known, lines = set(inputs), []
    *body, last = function.body
    for one in body:
        line = _parsed_line(one)
        if unknown := {*line.reads(), *line.reads(DtypeOf)} - known:
            raise BodyError(
                f"line {one.lineno} reads {', '.join(sorted(unknown))} before it is there"
            )
        known.add(line.name)
        lines.append(line)
    if not isinstance(last, ast.Return) or last.value is None:
        raise BodyError(f"line {last.lineno}: expected return")
    items = last.value.elts if isinstance(last.value, ast.Tuple) else [last.value]
    results = tuple(one.id for one in items if isinstance(one, ast.Name) and one.id in known)
    if len(results) != len(items):
        raise BodyError(f"line {last.lineno}: expected names of values to return")
    return Step(inputs, tuple(lines), results)


def _parsed_line(one: ast.stmt) -> Line:
    match one:
        case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=func, args=args) as call):
            *space, packet, kind = _dotted(func)
            target = overload(f"{'.'.join(space)}::{packet}.{kind}")
            if target is None:
                raise BodyError(f"line {one.lineno}: unknown operator {'.'.join(_dotted(func))}")
            kwargs = tuple((str(key.arg), _parsed(key.value)) for key in call.keywords)
            return Line(name, target, tuple(map(_parsed, args)), kwargs)
    raise BodyError(f"line {one.lineno}: expected name = operator(...)")


def _dotted(one: ast.expr) -> list[str]:
    if isinstance(one, ast.Attribute):
        return [*_dotted(one.value), one.attr]
    if isinstance(one, ast.Name):
        return [one.id]
    raise BodyError(f"line {one.lineno}: expected a dotted name")


def _parsed(one: ast.expr) -> Any:
    match one:
        case ast.Constant(value=bool() | int() | float() | None as value):
            return value
        case ast.Name(id="inf" | "nan" as text):
            return float(text)
        case ast.Name(id=text):
            return Name(text)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = _parsed(operand)
            if isinstance(value, (int, float)):
                return -value
        case ast.List(elts=items):
            return tuple(map(_parsed, items))
        case ast.Call(args=[ast.Constant(value=str() as text)]) if _dotted(one.func) == [
            "torch",
            "device",
        ]:
            return torch.device(text)
        case ast.Attribute(value=ast.Name(id="torch"), attr=attr):
            found = getattr(torch, attr, None)
            if isinstance(found, _CONSTANTS):
                return found
        case ast.Attribute(value=ast.Name(id=text), attr="dtype"):
            return DtypeOf(text)
    raise BodyError(f"line {one.lineno}: {ast.unparse(one)} is no argument that a step may have")


# -- for reading --------------------------------------------------------------------------------

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "eq": "==", "ne": "!=", "lt": "<", "le": "<=",
          "gt": ">", "ge": ">=", "bitwise_and": "&", "bitwise_or": "|", "logical_and": "&",
          "logical_or": "|"}  # fmt: skip
_LOOSE = {"+": 1, "-": 1, "*": 2, "/": 2}  # how tightly an operator binds; comparisons not at all
_SAME = ("detach", "clone", "alias", "contiguous")


def formulas(step: Step) -> list[str]:
    """The step as formulas: what is read once stands where it is read."""
    count: dict[str, int] = {}
    for name in (*(one for line in step.lines for one in line.reads()), *step.results):
        count[name] = count.get(name, 0) + 1
    inlined: dict[str, tuple[str, int]] = {one: (one, 9) for one in step.inputs}
    printed = []
    for line in step.lines:
        text = _formula(line, inlined)
        if count.get(line.name, 0) > 1 and not text[0].isidentifier():
            printed.append(f"{line.name} = {text[0]}")
            text = line.name, 9
        inlined[line.name] = text
    return [*printed, f"return {', '.join(inlined[one][0] for one in step.results)}"]


def _formula(line: Line, known: dict[str, tuple[str, int]]) -> tuple[str, int]:
    """(text, how tightly it binds) of a line."""

    def operand(value: Any, tight: int = 0) -> str:
        if isinstance(value, Name):
            text, binds = known[value.text]
            return f"({text})" if binds < tight else text
        if isinstance(value, float) and math.isfinite(value):
            return f"{value:.7g}"
        return _text(value).removeprefix("torch.")

    schema = line.target._schema
    name = schema.name.removeprefix("aten::")
    values, kwargs = list(line.args), dict(line.kwargs)
    if name == "rsub" and "alpha" not in kwargs and len(values) == 2:
        name, values = "sub", values[::-1]
    if name in _INFIX and not kwargs and len(values) == 2:
        sign = _INFIX[name]
        binds = _LOOSE.get(sign, 0)
        loose = {"+": 1, "*": 2}.get(sign, binds + 1)
        return f"{operand(values[0], binds or 1)} {sign} {operand(values[1], loose)}", binds
    if name in _SAME and values:
        return operand(values[0]), known[values[0].text][1]
    if name in ("to", "_to_copy"):
        dtype = kwargs.get("dtype", values[1] if len(values) > 1 else None)
        if isinstance(dtype, (DtypeOf, torch.dtype)):
            return f"{operand(values[0], 9)}.to({operand(dtype)})", 9
    if name in ("zeros_like", "ones_like"):
        return ("0" if name == "zeros_like" else "1"), 9
    if name == "full_like":
        return operand(values[1]), 9
    parts = [operand(one) for one in values]
    parts += [f"{key}={operand(one)}" for key, one in kwargs.items()]
    return f"{name}({', '.join(parts)})", 9
