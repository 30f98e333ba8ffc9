"""The index notation of every op against torch: what a proof trusts.

Each case draws a call of torch, reads it as an op view, and evaluates the notation by brute force:
over all values of all indices, in float64. The normal form must have the same values.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import pytest
import sympy as sp
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import fx

from graphopt.ir import ops
from graphopt.ir.builder import Builder
from graphopt.ir.ops.base import TABLE, Op, view
from graphopt.ir.value import Value
from graphopt.verify.proof import algebra, notation
from graphopt.verify.proof.algebra import Call, Delta, Element, Expr, Inside, Space, quot, rem

EXACT = 1e-12
EXAMPLES = 30

# -- what a formula is worth ---------------------------------------------------------------------


class Numbers:
    """Evaluates expressions with numbers for sizes, and arrays for tensors.

    Elements outside a tensor have some value too, always the same: splitting a sum may write them.
    """

    def __init__(
        self, space: Space, read: Callable[[str, tuple[Any, ...]], Any],
        functions: Callable[..., Any], numbers: dict[Any, Any] | None = None,
    ) -> None:  # fmt: skip
        self.space, self.read, self.functions = space, read, functions
        self.numbers = numbers or {}

    def over(self, at: tuple[sp.Symbol, ...], expr: Expr) -> np.ndarray:
        """The values of `expr` at all values of the indices `at`."""
        shape = tuple(int(self.index(self.space.range[v], {})) for v in at)
        places = dict(zip(at, np.indices(shape) if at else (), strict=True))
        self.split(at, places)
        return np.broadcast_to(self.expr(expr, places), shape)

    def split(self, indices: Any, places: dict[Any, Any]) -> None:
        """Put in the digits of indices that were split."""
        for v in indices:
            if v in self.space.digits:
                high, low, radix = self.space.digits[v]
                places[high], places[low] = np.divmod(places[v], self.index(radix, places))
                self.split((high, low), places)

    def expr(self, expr: Expr, places: dict[Any, Any]) -> Any:
        return sum((self.term(term, places) for term in expr.terms), start=np.zeros(()))

    def term(self, term: algebra.Term, places: dict[Any, Any]) -> Any:
        count = len(term.bound)
        inside = {v: np.asarray(i)[(..., *(None,) * count)] for v, i in places.items()}
        shape = [int(self.index(self.space.range[v], places)) for v in term.bound]
        for axis, v in enumerate(term.bound):
            inside[v] = np.arange(shape[axis]).reshape(-1, *(1,) * (count - 1 - axis))
        self.split(term.bound, inside)
        value: Any = np.broadcast_to(np.ones(()), shape)
        value = value * np.asarray(self.index(term.coefficient, inside), dtype=float)
        masked: Any = np.ones(())
        with np.errstate(all="ignore"):
            for one, exponent in term.factors:
                found = self.factor(one, inside)
                if isinstance(one, (Inside, Delta)):
                    masked = masked * found
                else:
                    value = value * np.power(np.asarray(found, dtype=float), float(exponent))
        value = np.where(masked == 0, 0.0, value)
        return value.sum(axis=tuple(range(value.ndim - count, value.ndim))) if count else value

    def factor(self, one: algebra.Factor, places: dict[Any, Any]) -> Any:
        if isinstance(one, Element):
            return self.read(one.name, tuple(self.index(i, places) for i in one.at))
        if isinstance(one, Inside):
            at, size = self.index(one.at, places), self.index(one.size, places)
            return ((np.asarray(at) >= 0) & (np.asarray(at) < size)).astype(float)
        if isinstance(one, Delta):
            return (np.asarray(self.index(one.at, places)) == 0).astype(float)
        if isinstance(one, algebra.Base):
            return self.expr(one.expr, places)
        assert isinstance(one, Call)
        parameters = [
            self.index(p, places) if isinstance(p, sp.Basic) else p for p in one.parameters
        ]
        return self.functions(one.name, parameters, [self.expr(a, places) for a in one.args])

    def index(self, e: Any, places: dict[Any, Any]) -> Any:
        e = sp.sympify(e)
        if e.is_Integer:
            return int(e)
        if e.is_Symbol:
            if e in places:
                return places[e]
            if e in self.numbers:
                return self.numbers[e]
            return self.index(self.space.known[e], places)
        if not e.args:
            return float(e)
        values = [self.index(one, places) for one in e.args]
        if e.is_Add:
            return reduce(lambda a, b: a + b, values)
        if e.is_Mul:
            return reduce(lambda a, b: a * b, values)
        if e.is_Pow:
            return np.asarray(values[0], dtype=float) ** values[1]
        return _INDEX[type(e).__name__](*values)


def _reflect(i: Any, size: Any) -> Any:
    i = np.abs(i)
    return np.where(i >= size, 2 * (size - 1) - i, i)


_INDEX: dict[str, Callable[..., Any]] = {
    "quot": np.floor_divide,
    "rem": np.mod,
    "reflect": _reflect,
    "replicate": lambda i, size: np.clip(i, 0, size - 1),
}
assert {quot.__name__, rem.__name__} < _INDEX.keys()


def beyond(name: str, at: tuple[Any, ...]) -> Any:
    """Some value that depends on the name and the place alone."""
    seed = sum(ord(c) * (i + 1) for i, c in enumerate(name)) % 997
    spots = np.asarray(float(seed))
    for i, slope in zip(at, (1.37, 2.11, 3.83, 5.59, 7.1), strict=False):
        spots = spots + np.asarray(i) * slope
    return 1.5 + np.sin(spots * 12.9898)


def reading(arrays: dict[str, np.ndarray]) -> Callable[[str, tuple[Any, ...]], Any]:
    """Elements of arrays; indices outside read `beyond`."""

    def read(name: str, at: tuple[Any, ...]) -> Any:
        array = arrays[name]
        at = tuple(np.asarray(i) for i in at)
        if array.ndim == 0:
            return array[()]
        inside = reduce(np.logical_and, [
            (i >= 0) & (i < n) for i, n in zip(at, array.shape, strict=True)
        ])  # fmt: skip
        if 0 in array.shape:
            return beyond(name, at)
        spots = tuple(np.clip(i, 0, n - 1) for i, n in zip(at, array.shape, strict=True))
        return np.where(inside, array[spots], beyond(name, at))

    return read


_CALLS = {
    cls.__name__.lower(): cls
    for found in TABLE.values() for cls in found if issubclass(cls, ops.Activation)
}  # fmt: skip


def torch_function(name: str, parameters: list[Any], args: list[Any]) -> Any:
    """What a symbolic call of a function of the op table is worth."""
    tensors = [torch.as_tensor(np.asarray(one, dtype=float)) for one in args]
    if name in ("eq", "ne", "lt", "le", "gt", "ge"):
        return getattr(torch, name)(*tensors).double().numpy()
    if name == "pow":
        return torch.pow(*tensors, *parameters).numpy()
    if name == "1/0":
        return np.inf
    if name == "gelu":
        return torch.nn.functional.gelu(tensors[0], approximate=parameters[0]).numpy()
    return _CALLS[name].targets[0](*tensors, *parameters).numpy()


# -- calls of torch ------------------------------------------------------------------------------


class Draw:
    """Sizes, options and tensors of one example."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.count = 0

    def int(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def sizes(self, low: int, high: int, rank: tuple[int, int]) -> tuple[int, ...]:
        return tuple(self.int(low, high) for _ in range(self.int(*rank)))

    def flag(self) -> bool:
        return self.draw(st.booleans())

    def pick(self, options: Any) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def order(self, count: int) -> list[int]:
        return list(self.draw(st.permutations(range(count))))

    def dim(self, ndim: int) -> int:
        """An axis, counted from either end."""
        return self.int(-ndim, ndim - 1)

    def tensor(self, *shape: int, positive: bool = False, whole: bool = False) -> torch.Tensor:
        self.count += 1
        generator = torch.Generator().manual_seed(self.count)
        found = torch.randn(shape, generator=generator, dtype=torch.float64)
        if whole:
            return (2 * found).round()
        return found.abs() + 0.2 if positive else found

    def maybe(self, *shape: int) -> torch.Tensor | None:
        return self.tensor(*shape) if self.flag() else None


@dataclasses.dataclass
class Drawn:
    op: Op
    truth: Any
    arrays: dict[str, np.ndarray]


def read_call(name: str, *args: Any, **kwargs: Any) -> Drawn:
    """The op view of a call of torch, and what the call computes."""
    target = getattr(*_packet(name))
    graph, builder, arrays = fx.Graph(), Builder(None, None), {}  # type: ignore[arg-type]

    def node(tensor: Any) -> Any:
        if isinstance(tensor, (list, tuple)):
            return [node(one) for one in tensor]
        if not isinstance(tensor, torch.Tensor):
            return tensor
        made = graph.placeholder(f"x{len(arrays)}")
        made.meta["val"] = tensor
        arrays[made.name] = tensor.detach().double().numpy()
        return made

    truth = target(*args, **kwargs)
    out = graph.call_function(
        target, tuple(map(node, args)), {key: node(one) for key, one in kwargs.items()}
    )
    out.meta["val"] = truth
    op = view(out, builder)
    assert op is not None, f"{name} has no op view"
    return Drawn(op, truth, arrays)


def _packet(name: str) -> tuple[Any, str]:
    packet, _, kind = name.partition(".")
    return getattr(torch.ops.aten, packet), kind or "default"


CASES: dict[type[Op], list[Callable[[Draw], Drawn]]] = {}


def case(*classes: type[Op]) -> Callable[[Any], Any]:
    def enter(make: Any) -> Any:
        for cls in classes:
            CASES.setdefault(cls, []).append(make)
        return make

    return enter


# -- convolution and products


def _convolution(d: Draw, rank: int, transposed: bool, same: bool = False) -> Drawn:
    large = 3 if rank == 1 else 2
    groups = d.int(1, large)
    per_in, per_out = d.int(1, 2), d.int(1, 2)
    kernel = [d.int(1, 4 if rank == 1 else 2) for _ in range(rank)]
    dilation = [d.int(1, 2) for _ in range(rank)]
    stride = [1 if same else d.int(1, 3) for _ in range(rank)]
    padding = [d.int(0, 2) for _ in range(rank)]
    image = [max(d.int(1, 5 if rank == 1 else 3), a * (k - 1) + 1 - 2 * p)
             for a, k, p in zip(dilation, kernel, padding, strict=True)]  # fmt: skip
    batch = () if d.flag() else (d.int(1, 2),)
    x = d.tensor(*batch, groups * per_in, *image)
    bias = d.maybe(groups * per_out)
    if not transposed:
        weight = d.tensor(groups * per_out, per_in, *kernel)
        name = f"conv{rank}d.{'padding' if same else 'default'}"
        return read_call(
            name, x, weight, bias, stride, "same" if same else padding, dilation, groups
        )
    weight = d.tensor(groups * per_in, per_out, *kernel)
    extra = [d.int(0, max(s, a) - 1) for s, a in zip(stride, dilation, strict=True)]
    padding = [min(p, ((n - 1) * s + a * (k - 1) + e) // 2)
               for p, n, s, a, k, e in
               zip(padding, image, stride, dilation, kernel, extra, strict=True)]  # fmt: skip
    name = f"conv_transpose{rank}d.{'default' if rank == 1 else 'input'}"
    return read_call(name, x, weight, bias, stride, padding, extra, groups, dilation)


@case(ops.Conv)
def _(d: Draw) -> Drawn:
    return _convolution(d, d.pick((1, 1, 2)), False)


@case(ops.Conv)
def _(d: Draw) -> Drawn:
    return _convolution(d, d.pick((1, 1, 2)), True)


@case(ops.Conv)
def _(d: Draw) -> Drawn:
    return _convolution(d, d.pick((1, 1, 2)), False, same=True)


@case(ops.Conv)
def _(d: Draw) -> Drawn:
    x, weight = d.tensor(1, 2, 2, 1, 2), d.tensor(2, 2, 2, 1, 2)
    if d.flag():
        return read_call("conv_transpose3d.input", x, weight, None, [1, 2, 1])
    return read_call("conv3d.default", x, weight, None, [1, 1, 1], [1, 0, d.int(0, 1)])


@case(ops.Conv)
def _(d: Draw) -> Drawn:
    x, weight = d.tensor(2, 2, 4), d.tensor(2, 2, 2)
    return read_call("convolution.default", x, weight, None, [d.int(1, 2)], [d.int(0, 1)], [1],
                     d.flag(), [0], 1)  # fmt: skip


@case(ops.Linear)
def _(d: Draw) -> Drawn:
    features, out = d.int(1, 4), d.int(1, 4)
    x = d.tensor(*d.sizes(1, 3, (0, 3)), features)
    return read_call("linear", x, d.tensor(out, features), d.maybe(out))


@case(ops.Matmul)
def _(d: Draw) -> Drawn:
    n, m, k = d.int(1, 3), d.int(1, 3), d.int(1, 3)
    kind = d.pick(("mm", "bmm", "vectors", "rows", "columns", "broadcast"))
    if kind == "mm":
        return read_call("mm", d.tensor(n, m), d.tensor(m, k))
    if kind == "bmm":
        b = d.int(1, 3)
        return read_call("bmm", d.tensor(b, n, m), d.tensor(b, m, k))
    lead = d.sizes(1, 3, (0, 2))
    some = [1 if d.flag() else size for size in lead]
    if kind == "vectors":
        return read_call("matmul", d.tensor(m), d.tensor(m))
    if kind == "rows":
        return read_call("matmul", d.tensor(m), d.tensor(*lead, m, k))
    if kind == "columns":
        return read_call("matmul", d.tensor(*lead, n, m), d.tensor(m))
    pair = (d.tensor(*lead, n, m), d.tensor(*some[d.int(0, len(some)) :], m, k))
    return read_call("matmul", *pair)


@case(ops.Addmm)
def _(d: Draw) -> Drawn:
    n, m, k = d.int(1, 3), d.int(1, 3), d.int(1, 3)
    scale = {"beta": d.pick((1, 0.5, -2)), "alpha": d.pick((1, 3, -0.25))} if d.flag() else {}
    if d.flag():
        b = d.int(1, 3)
        return read_call(
            "baddbmm", d.tensor(b, n, k), d.tensor(b, n, m), d.tensor(b, m, k), **scale
        )
    term = d.tensor(*d.pick(((n, k), (k,), (1, k), (n, 1), (1,))))
    return read_call("addmm", term, d.tensor(n, m), d.tensor(m, k), **scale)


@case(ops.Einsum)
def _(d: Draw) -> Drawn:
    equation = d.pick((
        "ij,jk->ik", "ij,kj -> ik", "bij,bjk->bik", "i,j->ij", "i,i->", "ii->i", "ii->", "ij->ji",
        "ij->", "bhid,bhjd->bhij", "ij,jk,kl->il", "nu,ou->no", "ij,ij->ij", "uu,u->u",
    ))  # fmt: skip
    sizes = {letter: d.int(1, 3) for letter in equation if letter.isalpha()}
    inputs = equation.replace(" ", "").split("->")[0].split(",")
    tensors = [d.tensor(*(sizes[letter] for letter in one)) for one in inputs]
    return read_call("einsum", equation, tensors)


# -- normalization


@case(ops.BatchNorm)
def _(d: Draw) -> Drawn:
    c = d.int(1, 3)
    x = d.tensor(d.int(1, 3), c, *d.sizes(1, 3, (0, 2)))
    return read_call(
        "batch_norm", x, d.maybe(c), d.maybe(c), d.tensor(c), d.tensor(c, positive=True),
        False, 0.1, d.pick((1e-5, 1e-3, 0.3)), True,
    )  # fmt: skip


@case(ops.LayerNorm)
def _(d: Draw) -> Drawn:
    shape = d.sizes(1, 3, (1, 3))
    last = shape[d.int(0, len(shape) - 1) :]
    return read_call("layer_norm", d.tensor(*shape), list(last), d.maybe(*last), d.maybe(*last),
                     d.pick((1e-5, 0.3)))  # fmt: skip


@case(ops.RMSNorm)
def _(d: Draw) -> Drawn:
    shape = d.sizes(1, 3, (1, 3))
    last = shape[d.int(0, len(shape) - 1) :]
    return read_call("rms_norm", d.tensor(*shape), list(last), d.maybe(*last), d.pick((1e-5, 0.3)))


@case(ops.GroupNorm)
def _(d: Draw) -> Drawn:
    groups, per = d.int(1, 3), d.int(1, 2)
    x = d.tensor(d.int(1, 2), groups * per, *d.sizes(1, 2, (0, 2)))
    return read_call("group_norm", x, groups, d.maybe(groups * per), d.maybe(groups * per),
                     d.pick((1e-5, 0.3)))  # fmt: skip


@case(ops.Softmax)
def _(d: Draw) -> Drawn:
    x = d.tensor(*d.sizes(1, 3, (1, 3)))
    return read_call("softmax.int", x, d.dim(x.ndim))


@case(ops.Dropout)
def _(d: Draw) -> Drawn:
    return read_call("dropout", d.tensor(*d.sizes(1, 3, (1, 3))), 0.5, False)


# -- elementwise


def _operands(d: Draw, whole: bool = False) -> tuple[Any, Any]:
    """Two tensors that broadcast, or a tensor and a number."""
    shape = d.sizes(1, 3, (0, 3))
    some = [1 if d.flag() else size for size in shape][d.int(0, len(shape)) :]
    left, right = d.tensor(*shape, whole=whole), d.tensor(*some, whole=whole)
    if d.flag():
        return left, d.pick((2, 0.5, -1.25))
    return (left, right) if d.flag() else (right, left)


@case(ops.Add, ops.Sub, ops.Mul, ops.Div)
def _(d: Draw, cls: Any) -> Drawn:
    left, right = _operands(d)
    kind = "Tensor" if isinstance(right, torch.Tensor) else "Scalar"
    if cls in (ops.Add, ops.Sub) and kind == "Scalar" and d.flag():
        return read_call(f"{cls.name}.{kind}", left, right, alpha=2)
    if cls is ops.Sub and d.flag():
        return read_call(f"rsub.{kind}", left, right)
    return read_call(f"{cls.name}.{kind}", left, right)


@case(ops.Compare)
def _(d: Draw) -> Drawn:
    left, right = _operands(d, whole=True)
    relation = d.pick(("eq", "ne", "lt", "le", "gt", "ge"))
    kind = "Tensor" if isinstance(right, torch.Tensor) else "Scalar"
    return read_call(f"{relation}.{kind}", left, right)


@case(ops.Heaviside)
def _(d: Draw) -> Drawn:
    shape = d.sizes(1, 3, (0, 3))
    at_zero = d.tensor(*[1 if d.flag() else size for size in shape][d.int(0, len(shape)) :])
    return read_call("heaviside", d.tensor(*shape, whole=True), at_zero)


@case(ops.Where)
def _(d: Draw) -> Drawn:
    shape = d.sizes(1, 3, (1, 3))
    condition = d.tensor(*shape[d.int(0, len(shape)) :]) > 0
    kind = d.pick(("self", "ScalarOther", "ScalarSelf"))
    left = 2.0 if kind == "ScalarSelf" else d.tensor(*shape)
    right = -0.5 if kind == "ScalarOther" else d.tensor(*[1 if d.flag() else n for n in shape])
    return read_call(f"where.{kind}", condition, left, right)


@case(ops.Pow)
def _(d: Draw) -> Drawn:
    exponent = d.pick((0, 1, 2, 3, 5, 0.5, 1.5, -1, -2, -0.5, 0.3, 1 / 3))
    return read_call("pow.Tensor_Scalar", d.tensor(2, 3, positive=exponent != 2), exponent)


@case(
    ops.Neg, ops.Rsqrt, ops.Reciprocal, ops.Sqrt, ops.Relu, ops.Silu, ops.Sigmoid, ops.Tanh,
    ops.Hardswish, ops.Hardsigmoid, ops.Mish, ops.Exp, ops.Log, ops.Abs, ops.Erf, ops.Sin, ops.Cos,
    ops.Detach, ops.Sign,
)  # fmt: skip
def _(d: Draw, cls: Any) -> Drawn:
    positive = cls in (ops.Rsqrt, ops.Sqrt, ops.Log)
    x = d.tensor(*d.sizes(1, 4, (0, 3)), positive=positive)
    return read_call(str(cls.targets[0]).removeprefix("aten."), x)


@case(ops.Copy)
def _(d: Draw) -> Drawn:
    return read_call(d.pick(("clone", "contiguous", "alias")), d.tensor(*d.sizes(1, 4, (0, 3))))


@case(ops.LeakyRelu)
def _(d: Draw) -> Drawn:
    return read_call("leaky_relu", d.tensor(3, 4), d.pick((0.01, 0.2, -1, 2)))


@case(ops.Clamp)
def _(d: Draw) -> Drawn:
    x = 3 * d.tensor(3, 4)
    kind = d.pick(("clamp", "min", "max", "hardtanh", "relu6", "clamp_min", "clamp_max"))
    if kind in ("min", "max"):
        return read_call("clamp", x, **{kind: 0.5})
    limits = {"clamp": (-1, 0.5), "hardtanh": (-2, 0.5), "clamp_min": (0.5,), "clamp_max": (0.5,)}
    return read_call(kind, x, *limits.get(kind, ()))


@case(ops.Gelu)
def _(d: Draw) -> Drawn:
    return read_call("gelu", d.tensor(3, 4), approximate=d.pick(("none", "tanh")))


@case(ops.Elu)
def _(d: Draw) -> Drawn:
    return read_call("elu", d.tensor(3, 4), d.pick((1, 0.5)), d.pick((1, 2)), d.pick((1, 0.25)))


@case(ops.Softplus)
def _(d: Draw) -> Drawn:
    return read_call("softplus", 4 * d.tensor(3, 4), d.pick((1, 0.5, 2)), d.pick((20, 3)))


@case(ops.Cast)
def _(d: Draw) -> Drawn:
    x = d.tensor(2, 3).float()
    if d.flag():
        return read_call("to.dtype", x, torch.float64)
    return read_call("_to_copy", x, dtype=torch.float64)


@case(ops.Full)
def _(d: Draw) -> Drawn:
    size, kind = list(d.sizes(1, 3, (0, 3))), d.pick(("full", "ones", "zeros", "full_like"))
    if kind == "full_like":
        return read_call("full_like", d.tensor(*size), d.pick((0, 1.5, -2)))
    numbers = (d.pick((0, 1.5, -2)),) if kind == "full" else ()
    return read_call(kind, size, *numbers, dtype=torch.float64)


@case(ops.Eye)
def _(d: Draw) -> Drawn:
    sizes = [d.int(1, 4) for _ in range(d.int(1, 2))]
    return read_call("eye.m" if len(sizes) > 1 else "eye", *sizes, dtype=torch.float64)


# -- data movement


def _factored(d: Draw) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes with the same number of elements."""
    atoms = [d.int(1, 3) for _ in range(d.int(1, 4))]

    def grouped() -> tuple[int, ...]:
        cuts = [0, *(i for i in range(1, len(atoms)) if d.flag()), len(atoms)]
        return tuple(math.prod(atoms[a:b]) for a, b in itertools.pairwise(cuts))

    return grouped(), grouped()


@case(ops.Reshape)
def _(d: Draw) -> Drawn:
    source, target = _factored(d)
    x, shape = d.tensor(*source), list(target)
    kind = d.pick(("reshape", "view", "unknown", "flatten", "squeeze", "unsqueeze", "unflatten"))
    if kind in ("reshape", "view"):
        return read_call(kind, x, shape)
    if kind == "unknown":
        shape[d.dim(len(shape))] = -1
        return read_call("reshape", x, shape)
    if kind == "flatten":
        a, b = sorted((d.int(0, x.ndim - 1), d.int(0, x.ndim - 1)))
        return read_call("flatten.using_ints", x, a, b - x.ndim if d.flag() else b)
    if kind == "squeeze":
        dim = d.dim(x.ndim)
        return read_call("squeeze.dim", x, dim) if d.flag() else read_call("squeeze", x)
    if kind == "unflatten":
        y = d.tensor(2, math.prod(shape))
        return read_call("unflatten.int", y, -1, shape)
    return read_call("unsqueeze", x, d.int(-x.ndim - 1, x.ndim))


@case(ops.Permute)
def _(d: Draw) -> Drawn:
    x = d.tensor(*d.sizes(1, 3, (2, 4)))
    kind = d.pick(("permute", "transpose.int", "mT", "movedim.int", "movedim.intlist", "t"))
    if kind == "permute":
        dims = [i - x.ndim if d.flag() else i for i in d.order(x.ndim)]
        return read_call(kind, x, dims)
    if kind == "t":
        return read_call(kind, d.tensor(2, 3))
    if kind == "mT":
        return read_call(kind, x)
    if kind == "movedim.intlist":
        return read_call(kind, x, d.order(x.ndim)[:2], d.order(x.ndim)[:2])
    return read_call(kind, x, d.dim(x.ndim), d.dim(x.ndim))


@case(ops.Expand)
def _(d: Draw) -> Drawn:
    shape = d.sizes(1, 3, (1, 4))
    own = [1 if d.flag() else size for size in shape][d.int(0, len(shape)) :]
    keep = len(shape) - len(own)
    size = [-1 if i >= keep and d.flag() else n for i, n in enumerate(shape)]
    return read_call("expand", d.tensor(*own), size)


@case(ops.RepeatInterleave)
def _(d: Draw) -> Drawn:
    x = d.tensor(*d.sizes(1, 3, (1, 3)))
    dim = d.dim(x.ndim) if d.flag() else None
    return read_call("repeat_interleave.self_int", x, d.int(1, 3), dim)


@case(ops.Repeat)
def _(d: Draw) -> Drawn:
    x = d.tensor(*d.sizes(1, 3, (1, 3)))
    return read_call("repeat", x, [d.int(1, 3) for _ in range(x.ndim + d.int(0, 1))])


@case(ops.Slice)
def _(d: Draw) -> Drawn:
    x = d.tensor(*d.sizes(2, 5, (1, 3)))
    dim = d.dim(x.ndim)
    if d.flag():
        start = d.int(0, x.shape[dim] - 1)
        return read_call("narrow", x, dim, start, d.int(1, x.shape[dim] - start))
    start = d.pick((None, 0, 1, -1, -2, -9))
    end = d.pick((None, 4, -1, 2, 99, (1 << 63) - 1))
    return read_call("slice.Tensor", x, dim, start, end, d.int(1, 3))


@case(ops.Select)
def _(d: Draw) -> Drawn:
    x = d.tensor(*d.sizes(1, 3, (1, 3)))
    dim = d.dim(x.ndim)
    return read_call("select.int", x, dim, d.dim(x.shape[dim]))


@case(ops.Cat)
def _(d: Draw) -> Drawn:
    shape = d.sizes(1, 3, (1, 3))
    dim = d.dim(len(shape))
    parts = []
    for _ in range(d.int(1, 3)):
        own = list(shape)
        own[dim] = d.int(1, 3)
        parts.append(d.tensor(*own))
    return read_call("cat", parts, dim)


@case(ops.Stack)
def _(d: Draw) -> Drawn:
    shape = d.sizes(1, 3, (0, 2))
    return read_call("stack", [d.tensor(*shape) for _ in range(d.int(1, 3))], d.dim(len(shape) + 1))


@case(ops.Pad)
def _(d: Draw) -> Drawn:
    x = d.tensor(d.int(1, 2), *d.sizes(3, 4, (1, 2)))
    axes = d.int(1, x.ndim)
    amounts = [d.pick((0, 1, 2, -1)) for _ in range(2 * axes)]
    if d.flag():
        amounts = [max(one, 0) if i < 2 else one for i, one in enumerate(amounts)]
    if any(x.shape[-1 - i // 2] + amounts[i] + amounts[i ^ 1] < 1 for i in range(2 * axes)):
        amounts = [max(one, 0) for one in amounts]
    value = d.pick((None, 0, 1.5))
    if value is not None and d.flag():
        return read_call("constant_pad_nd", x, amounts, value)
    return read_call("pad", x, amounts, "constant", value)


@case(ops.Pad)
def _(d: Draw) -> Drawn:
    axes = d.int(1, 2)
    x = d.tensor(1, d.int(1, 2), *(d.int(3, 4) for _ in range(axes)))
    mode = d.pick(("reflect", "replicate", "circular"))
    return read_call("pad", x, [d.pick((0, 1, 2)) for _ in range(2 * axes)], mode)


@case(ops.PixelShuffle)
def _(d: Draw) -> Drawn:
    r = d.int(1, 3)
    return read_call(
        "pixel_shuffle", d.tensor(*d.sizes(1, 2, (0, 2)), d.int(1, 2) * r * r, 2, 3), r
    )


@case(ops.PixelUnshuffle)
def _(d: Draw) -> Drawn:
    r = d.int(1, 3)
    x = d.tensor(*d.sizes(1, 2, (0, 2)), d.int(1, 2), d.int(1, 2) * r, d.int(1, 2) * r)
    return read_call("pixel_unshuffle", x, r)


@case(ops.ChannelShuffle)
def _(d: Draw) -> Drawn:
    groups = d.int(1, 3)
    return read_call("channel_shuffle", d.tensor(2, groups * d.int(1, 3), 2, 1), groups)


@case(ops.Flip)
def _(d: Draw) -> Drawn:
    x = d.tensor(*d.sizes(1, 3, (1, 3)))
    dims = [i - x.ndim if d.flag() else i for i in d.order(x.ndim)[: d.int(0, x.ndim)]]
    return read_call("flip", x, dims)


@case(ops.Roll)
def _(d: Draw) -> Drawn:
    x = d.tensor(*d.sizes(1, 4, (1, 3)))
    dims = d.order(x.ndim)[: d.int(1, x.ndim)]
    return read_call(
        "roll", x, [d.int(-5, 5) for _ in dims], [i - x.ndim if d.flag() else i for i in dims]
    )


# -- sums and averages


@case(ops.Sum, ops.Mean)
def _(d: Draw, cls: Any) -> Drawn:
    x = d.tensor(*d.sizes(1, 3, (1, 4)))
    name = cls.__name__.lower()
    if d.flag():
        return read_call(name, x)
    dims = [i - x.ndim if d.flag() else i for i in d.order(x.ndim)[: d.int(0, x.ndim)]]
    return read_call(f"{name}.{'dim_IntList' if name == 'sum' else 'dim'}", x, dims, d.flag())


@case(ops.CumSum)
def _(d: Draw) -> Drawn:
    x = d.tensor(*d.sizes(1, 4, (1, 3)))
    return read_call("cumsum", x, d.dim(x.ndim))


@case(ops.VectorNorm)
def _(d: Draw) -> Drawn:
    x = d.tensor(*d.sizes(1, 3, (1, 4)))
    order, dims = d.pick((1, 2, 3.5, math.inf)), d.order(x.ndim)[: d.int(1, x.ndim)]
    name = d.pick(("linalg_vector_norm", "norm.ScalarOpt_dim", "linalg_norm"))
    if name == "linalg_norm":
        return read_call(name, x, None, dims[:1], d.flag())
    return read_call(name, x, order, dims, d.flag())


def _pooled(d: Draw) -> tuple[Any, ...]:
    rank = d.int(1, 2)
    kernel = [d.int(1, 3) for _ in range(rank)]
    stride = [d.int(1, 3) for _ in range(rank)] if d.flag() else []
    padding = [d.int(0, k // 2) for k in kernel] if d.flag() else [0] * rank
    image = [max(k - 2 * a, d.int(1, 5)) for k, a in zip(kernel, padding, strict=True)]
    batch = () if d.flag() else (2,)
    return rank, d.tensor(*batch, d.int(1, 2), *image), kernel, stride, padding


@case(ops.AvgPool)
def _(d: Draw) -> Drawn:
    rank, x, kernel, stride, padding = _pooled(d)
    counted = d.flag()
    divisor = (d.pick((None, 1, 3)),) if rank == 2 else ()
    if d.flag():
        return read_call(f"avg_pool{rank}d", x, kernel, stride, padding)
    return read_call(f"avg_pool{rank}d", x, kernel, stride, padding, False, counted, *divisor)


@case(ops.AdaptiveAvgPool)
def _(d: Draw) -> Drawn:
    rank = d.int(1, 2)
    batch = () if d.flag() else (2,)
    x = d.tensor(*batch, 2, *(d.int(1, 5) for _ in range(rank)))
    return read_call(f"adaptive_avg_pool{rank}d", x, [d.int(1, 4) for _ in range(rank)])


UPSAMPLE = ("nearest1d", "nearest2d", "linear1d", "bilinear2d", "bicubic2d")


@case(ops.Upsample)
def _(d: Draw) -> Drawn:
    kind = d.pick(UPSAMPLE)
    rank = int(kind[-2])
    x = d.tensor(1, 2, *(d.int(1, 4) for _ in range(rank)))
    corners = () if "nearest" in kind else (d.flag(),)
    if d.flag():
        return read_call(
            f"upsample_{kind}.vec", x, [d.int(1, 5) for _ in range(rank)], *corners, None
        )
    scale = [d.pick((1.0, 2.0, 3.0)) for _ in range(rank)]
    return read_call(f"upsample_{kind}.vec", x, None, *corners, scale)


# -- ops of which a proof knows the sizes alone


@case(ops.LogSoftmax)
def _(d: Draw) -> Drawn:
    x = d.tensor(*d.sizes(1, 3, (1, 3)))
    return read_call("log_softmax.int", x, d.dim(x.ndim))


@case(ops.PRelu)
def _(d: Draw) -> Drawn:
    return read_call("prelu", d.tensor(2, 3, 2), d.tensor(d.pick((1, 3))))


@case(ops.InstanceNorm)
def _(d: Draw) -> Drawn:
    x = d.tensor(2, 3, d.int(2, 3))
    return read_call("instance_norm", x, None, None, None, None, True, 0.1, 1e-5, True)


@case(ops.MaxPool)
def _(d: Draw) -> Drawn:
    rank, x, kernel, stride, padding = _pooled(d)
    return read_call(f"max_pool{rank}d", x, kernel, stride, padding)


@case(ops.Attention)
def _(d: Draw) -> Drawn:
    b, h, n, m, k = (d.int(1, 3) for _ in range(5))
    query, key, value = d.tensor(b, h, n, k), d.tensor(b, h, m, k), d.tensor(b, h, m, d.int(1, 3))
    return read_call("scaled_dot_product_attention", query, key, value)


@case(ops.Embedding)
def _(d: Draw) -> Drawn:
    indices = torch.zeros(d.sizes(1, 3, (1, 2)), dtype=torch.int64)
    return read_call("embedding", d.tensor(3, d.int(1, 4)), indices)


@case(ops.IndexSelect)
def _(d: Draw) -> Drawn:
    x = d.tensor(*d.sizes(1, 3, (1, 3)))
    return read_call("index_select", x, d.dim(x.ndim), torch.zeros(d.int(1, 4), dtype=torch.int64))


@case(ops.Gather)
def _(d: Draw) -> Drawn:
    x = d.tensor(3, 3)
    index = torch.zeros(d.int(1, 3), d.int(1, 3), dtype=torch.int64)
    return read_call("gather", x, d.dim(2), index)


@case(ops.Index)
def _(d: Draw) -> Drawn:
    index = torch.zeros(3, dtype=torch.int64)
    return read_call("index.Tensor", d.tensor(3, 3), [None, index])


@case(ops.Fourier)
def _(d: Draw) -> Drawn:
    return read_call("fft_fft", d.tensor(3, 4))


@case(ops.Real, ops.Imag, ops.Conj)
def _(d: Draw, cls: type[Op]) -> Drawn:
    name = {ops.Real: "real", ops.Imag: "imag", ops.Conj: "conj_physical"}[cls]
    return read_call(name, torch.complex(d.tensor(3), d.tensor(3)))


# -- the tests -----------------------------------------------------------------------------------

CLASSES = sorted({cls for found in TABLE.values() for cls in found}, key=lambda cls: cls.__name__)
# An entry of these is an unknown element: operands and options determine it, nothing more is known.
UNKNOWN = {
    ops.Conj, ops.Embedding, ops.Fourier, ops.Gather, ops.Imag, ops.Index, ops.IndexSelect,
    ops.InstanceNorm, ops.LogSoftmax, ops.MaxPool, ops.Real, ops.Scan, ops.Split, ops.VectorNorm,
    ops.WithGradient,
}  # fmt: skip
NO_SIZES = {ops.Scan, ops.Split, ops.WithGradient}  # their output is a list


def has_entry(cls: type[Op]) -> bool:
    return notation.entry.dispatch(cls) is not notation.entry.dispatch(object)


def test_every_op_has_an_entry_or_is_listed_as_unknown():
    without = {cls for cls in CLASSES if not has_entry(cls)} | {ops.MaxPool}  # homogeneous
    assert without == UNKNOWN & set(CLASSES)


def test_every_op_has_a_case():
    assert {cls for cls in CLASSES if cls not in CASES} <= NO_SIZES


def drawn(data: Any, cls: type[Op]) -> Drawn:
    d = Draw(data.draw)
    make = d.pick(CASES[cls])
    with_class = make.__code__.co_argcount == 2
    return make(d, cls) if with_class else make(d)


def evaluate(op: Op, arrays: dict[str, np.ndarray], read: Any = None) -> list[np.ndarray]:
    """The entries of an op, before and after normalization."""
    space = Space()
    at = tuple(space.named(f"i{axis}", n) for axis, n in enumerate(notation.sizes(op)))

    def entry_of(value: Any, index: Any) -> Expr:
        if not isinstance(value, Value):
            return algebra.number(algebra.sym(value))
        return algebra.element(value.node.name, index)

    expr = notation.entry(op, at, notation.Reader(space, entry_of))
    numbers = Numbers(space, read or reading(arrays), torch_function)
    return [numbers.over(at, one) for one in (expr, space.normal(expr))]


def assert_same(found: np.ndarray, truth: Any, what: str) -> None:
    truth = np.asarray(truth, dtype=float)
    assert found.shape == truth.shape
    if truth.size:
        scale = 1 + np.abs(truth[np.isfinite(truth)]).max(initial=0)
        np.testing.assert_allclose(found, truth, rtol=0, atol=EXACT * scale, err_msg=what)


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls in CASES], ids=lambda c: c.__name__)
@settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck),
    derandomize=True, database=None,
)  # fmt: skip
@given(data=st.data())
def test_sizes_and_entries_are_those_of_torch(cls, data):
    one = drawn(data, cls)
    assert type(one.op) is cls
    assert tuple(notation.sizes(one.op)) == tuple(one.truth.shape)
    if cls in UNKNOWN:
        return
    read = weights_of(one) if cls in (ops.AdaptiveAvgPool, ops.Upsample) else None
    before, after = evaluate(one.op, one.arrays, read)
    assert_same(before, one.truth, f"{one.op}")
    assert_same(after, one.truth, f"normal form of {one.op}")


def weights_of(one: Drawn) -> Any:
    """The unknown weights along each axis: what torch makes of unit vectors along it."""
    op, arrays, plain = one.op, one.arrays, reading(one.arrays)
    rank = op.rank  # type: ignore[attr-defined]
    (x,) = arrays.values()
    out = one.truth.shape[-rank:]
    tables: dict[str, np.ndarray] = {}
    for axis, size in enumerate(x.shape[-rank:]):
        unit = [1] * rank
        unit[axis] = size
        eye = torch.eye(size, dtype=torch.float64).reshape(size, 1, *unit)
        target, arguments = op.build()
        arguments = {key: (eye if isinstance(a, Value) else a) for key, a in arguments.items()}
        to = [1] * rank
        to[axis] = out[axis]
        if arguments.get("scale_factors") is not None:
            scale = [1.0] * rank
            scale[axis] = arguments["scale_factors"][axis]
            arguments["scale_factors"] = scale
        else:
            arguments["output_size"] = to
        columns = target(**arguments).reshape(size, out[axis]).T.numpy()
        tables.setdefault(f":{size}->{out[axis]}", columns)
        np.testing.assert_allclose(columns.sum(1), 1, atol=1e-12)

    def read(name: str, at: tuple[Any, ...]) -> Any:
        if name in arrays:
            return plain(name, at)
        return tables[name[name.index(":") :]][tuple(np.asarray(i) for i in at)]

    return read


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(data=st.data(), kind=st.sampled_from(UPSAMPLE))
def test_upsampling_by_any_factor_has_the_sizes_of_torch(data, kind):
    d = Draw(data.draw)
    rank = int(kind[-2])
    x = d.tensor(1, 1, *(d.int(1, 5) for _ in range(rank)))
    scale = [d.pick((1.0, 1.5, 2.5, 2.0, 1.25)) for _ in range(rank)]
    corners = () if "nearest" in kind else (False,)
    one = read_call(f"upsample_{kind}.vec", x, None, *corners, scale)
    assert notation.sizes(one.op) == tuple(one.truth.shape)


def test_weights_of_upsampling_are_of_one_factor():
    """4 -> 5 by output size reads other places than 4 -> 5 by a factor of 1.3."""
    x = torch.arange(4.0, dtype=torch.float64).reshape(1, 1, 4) ** 2
    by_size = read_call("upsample_linear1d.vec", x, [5], False, None)
    by_scale = read_call("upsample_linear1d.vec", x, None, False, [1.3])
    assert not torch.equal(by_size.truth, by_scale.truth)
    assert names(by_size.op).isdisjoint(names(by_scale.op) - {"x0"})


def names(op: Op) -> set[str]:
    """The tensors that an entry reads."""
    space = Space()
    at = tuple(space.named(f"i{axis}", n) for axis, n in enumerate(notation.sizes(op)))
    reader = notation.Reader(space, lambda value, index: algebra.element(value.node.name, index))
    terms = space.normal(notation.entry(op, at, reader)).terms
    return {f.name for term in terms for f, _ in term.factors if isinstance(f, Element)}


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 2])
def test_padding_same_puts_the_odd_zero_behind(kernel, dilation):
    d = Draw(None)
    one = read_call(
        "conv1d.padding", d.tensor(1, 1, 5), d.tensor(1, 1, kernel), None, [1], "same", [dilation]
    )
    for found in evaluate(one.op, one.arrays):
        assert_same(found, one.truth, str(one.op))


def test_training_ops_are_unknown():
    d = Draw(None)
    c = d.tensor(3)
    norm = read_call("batch_norm", d.tensor(2, 3, 4), c, c, c, c.abs(), True, 0.1, 1e-5, True)
    assert all("BatchNorm" in name for name in names(norm.op))
    drop = read_call("dropout", d.tensor(2, 3), 0.5, True)
    assert all("Dropout" in name for name in names(drop.op))
    rounded = read_call("to.dtype", d.tensor(2, 3), torch.int64)
    assert all("Cast" in name for name in names(rounded.op))


def test_an_unknown_function_knows_the_sizes_of_its_operands():
    """log_softmax of n ones is -log(n): operands of the same entries are not the same operands."""
    found = []
    for n in (3, 5):
        space = Space()
        op = read_call("log_softmax.int", torch.ones(2, n, dtype=torch.float64), 1).op
        reader = notation.Reader(space, lambda value, index: algebra.number(1))
        found.append(str(space.normal(notation.entry(op, (sp.Integer(0), sp.Integer(0)), reader))))
    assert found[0] != found[1]


@pytest.mark.parametrize("name", ["sum", "mean", "cat", "slice"])
def test_axes_counted_from_the_end_mean_the_same_in_ops_that_are_written(name):
    """A rewrite may write `x.sum((-1,))`; torch takes it."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    node.meta["val"] = x = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    value = Value(node, None)  # type: ignore[arg-type]
    op, truth = {
        "sum": lambda: (ops.Sum(value, (-1,)), x.sum(-1)),
        "mean": lambda: (ops.Mean(value, (-1,), True), x.mean(-1, keepdim=True)),
        "cat": lambda: (ops.Cat((value, value), -1), torch.cat([x, x], -1)),
        "slice": lambda: (ops.Slice(value, -1, 1, 3), x[:, 1:]),
    }[name]()
    try:
        assert tuple(notation.sizes(op)) == tuple(truth.shape)
    except notation.ShapeError:
        return  # refusing is sound
    for found in evaluate(op, {"x": x.numpy()}):
        assert_same(found, truth, str(op))
