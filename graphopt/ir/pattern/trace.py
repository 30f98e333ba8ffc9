"""From a plain PyTorch function to the term it computes, by graphopt's own capture.

Every size of the example tensors is dynamic while the function is traced, so that a size in the
term is one the function asked for, and never one that the example happened to have.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from graphopt.ir import ops
from graphopt.ir.builder import Builder
from graphopt.ir.capture import capture
from graphopt.ir.graph import Graph, is_pure
from graphopt.ir.pattern.numbers import Ledger
from graphopt.ir.pattern.terms import (
    Apply,
    Fact,
    Formula,
    Inferred,
    Literal,
    Many,
    Tensor,
    Term,
    field_names,
)
from graphopt.ir.rewrite import RewriteError
from graphopt.ir.source import CaptureError, first_line
from graphopt.ir.value import Value

Examples = Mapping[str, Any]
_KIND = {
    "Add": operator.add, "Mul": operator.mul, "Pow": operator.pow, "FloorDiv": operator.floordiv,
    "Mod": operator.mod, "PythonMod": operator.mod, "CleanDiv": operator.floordiv,
    "IntTrueDiv": operator.truediv, "FloatTrueDiv": operator.truediv,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Traced:
    """The term of a function, the (tensor, axis) that must have size 1, as in the example, and the
    sizes that are equal if the function runs without broadcasting."""

    term: Term
    ones: frozenset[tuple[str, int]]
    equal: tuple[tuple[Fact, Fact], ...]


def trace(function: Callable[..., Any], name: str, examples: Examples) -> Traced:
    """What `function` computes of wildcards called as its parameters.

    `examples` has a tensor or a number for each of them; `name` is what errors call the function.

    Raises:
        RewriteError: if that is not one expression of known ops, for tensors of any size.
    """
    first = second = _Trace(function, name, examples, 0).run()
    if any(not isinstance(one, torch.Tensor) for one in examples.values()):
        second = _Trace(function, name, examples, 1).run()
    if first != second:
        raise RewriteError(
            f"{name} computes with its numbers in a way that cannot be followed "
            f"(it became {first.term} and then {second.term}); expected + - * / // % ** and abs, "
            "and examples in inputs= that are none of its literals"
        )
    return first


class _Call(nn.Module):
    """A function as a module of tensors; numbers are given."""

    def __init__(self, function: Callable[..., Any], names: list[str], numbers: Examples) -> None:
        super().__init__()
        self.function, self.names, self.numbers = function, names, numbers

    def forward(self, *tensors: Any) -> Any:
        return self.function(**dict(zip(self.names, tensors, strict=True)), **self.numbers)


class _Trace:
    """One capture of a function; `turn` chooses other example numbers."""

    def __init__(
        self, function: Callable[..., Any], name: str, examples: Examples, turn: int
    ) -> None:
        self.function, self.name = function, name
        self.ledger = Ledger(name)
        self.tensors = {key: one for key, one in examples.items() if isinstance(one, torch.Tensor)}
        self.numbers = {
            key: self.ledger.wildcard(key, one + turn if isinstance(one, int) else one * 1.5**turn)
            for key, one in examples.items() if key not in self.tensors
        }  # fmt: skip
        self.sizes: dict[Any, Fact] = {}
        self.equal: list[tuple[Fact, Fact]] = []
        self.ones: set[tuple[str, int]] = set()
        self.leaves: dict[fx.Node, Tensor] = {}

    def fail(self, reason: str) -> RewriteError:
        return RewriteError(f"{self.name} {reason}")

    def run(self) -> Traced:
        graph = self.capture()
        for (name, example), node in zip(self.tensors.items(), graph.inputs, strict=True):
            self.enter(name, example, node)
        results: Any = graph.output.args[0]
        values = [Value(one, Builder(graph, graph.output)) for one in results]
        if len(values) != 1 or not values[0].is_tensor:
            raise self.fail(f"returns {len(values)} values; expected one tensor")
        return Traced(self.read(values[0]), frozenset(self.ones), tuple(self.equal))

    def capture(self) -> Graph:
        tensors = tuple(self.tensors.values())
        shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
        for one in tensors:
            shapes[one] = {axis: torch.export.Dim.AUTO for axis in range(one.ndim)}
        try:
            module = _Call(self.function, list(self.tensors), self.numbers)
            return capture(module, tensors, None, shapes).graph
        except RewriteError:
            raise
        except CaptureError as error:
            raise self.fail(f"cannot be traced: {next(iter(error.attempts.values()))}") from error
        except Exception as error:
            raise self.fail(f"does not run on the example inputs: {first_line(error)}") from error

    def enter(self, name: str, example: torch.Tensor, node: fx.Node) -> None:
        """The names of an input's sizes."""
        leaf = self.leaves[node] = Tensor(name)
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt):
                fact = Fact(leaf, "shape", axis)
                known = self.sizes.setdefault(size.node.expr, fact)
                if known != fact:
                    self.equal.append((known, fact))
            elif size == 1:
                self.ones.add((name, axis))
            else:
                raise self.fail(
                    f"holds only where axis {axis} of {name} has the size {size} of the example; "
                    f"expected any size: write {name}.shape[{axis}] or -1 for it"
                )

    # -- terms --------------------------------------------------------------------------------

    def read(self, found: Any) -> Term:
        """The term of a field of an op view."""
        if isinstance(found, (tuple, list)):
            return Many(tuple(map(self.read, found)))
        if isinstance(found, (torch.SymInt, torch.SymFloat)):
            return self.size(found.node.expr)
        if isinstance(found, (torch.dtype, torch.device)):
            return self.kind(found)
        if not isinstance(found, Value):
            return self.ledger.term(found)
        if found.node in self.leaves:
            return self.leaves[found.node]
        if isinstance(found.meta, (torch.SymInt, torch.SymFloat)):
            return self.size(found.meta.node.expr)
        return self.apply(found)

    def apply(self, value: Value) -> Term:
        node, op = value.node, value.op
        if node.op == "get_attr":
            raise self.fail("has a tensor of its own; expected it as a parameter, or as a number")
        if op is None:
            raise self.fail(f"uses {node.target}, for which there is no op view in graphopt.ir.ops")
        if not is_pure(node):
            raise self.fail(f"uses {node.target}, which is random or writes to its arguments")
        fields = {name: self.read(getattr(op, name)) for name in field_names(type(op))}
        if isinstance(op, (ops.Reshape, ops.Expand)):
            fields["shape"] = self.shape(op)
        return Apply(type(op), tuple(fields.values()))

    def shape(self, op: Any) -> Term:
        """A reshape infers what is -1; an expand keeps it."""
        infers = isinstance(op, ops.Reshape)
        given = [
            Inferred() if infers and isinstance(one, int) and one == -1
            else self.read(size if isinstance(one, int) and one == -1 else one)
            for one, size in zip(op.shape, op.out.shape, strict=True)
        ]  # fmt: skip
        return Many(tuple(given))

    def kind(self, found: Any) -> Term:
        """A dtype or device of an example tensor is that of what the tensor stands for."""
        what = "dtype" if isinstance(found, torch.dtype) else "device"
        for name, one in self.tensors.items():
            if getattr(one, what) == found:
                return Fact(Tensor(name), what)
        return Literal(found)

    def size(self, expr: Any) -> Term:
        """A sympy expression of sizes as a term."""
        if expr in self.sizes:
            return self.sizes[expr]
        if expr.is_Integer or expr.is_Float:
            return self.ledger.term(int(expr) if expr.is_Integer else float(expr))
        function = _KIND.get(type(expr).__name__)
        if function is None:
            if type(expr).__name__ == "ToFloat":
                return self.size(expr.args[0])
            raise self.fail(f"computes the size {expr}, which is not an expression of + - * // %")
        term, *others = map(self.size, expr.args)
        for other in others:
            term = Formula(function, (term, other))
        return term
