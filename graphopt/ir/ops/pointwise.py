"""Elementwise arithmetic, activations, comparisons and casts."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from graphopt.ir.ops.base import Call, Op, numel, op, overload
from graphopt.ir.value import Operand, Value

# Schemas give memory formats as numbers where they are defaults.
_CONTIGUOUS = (0, torch.contiguous_format)
_PRESERVE = (1, torch.preserve_format)


def _size(operand: Operand, magnitude: Any) -> Any:
    return magnitude(operand) if isinstance(operand, Value) else abs(operand)


@dataclasses.dataclass(frozen=True, eq=False)
class Binary(Op):
    """Two operands, tensors or numbers, with broadcasting and type promotion."""

    left: Operand
    right: Operand

    @property
    def operands(self) -> tuple[Operand, Operand]:
        return self.left, self.right

    @property
    def flops(self) -> float:
        return float(numel(self.out))


@dataclasses.dataclass(frozen=True, eq=False)
class _Arithmetic(Binary):
    """Shared reading and writing of the `.Tensor`, `.Scalar` and reversed overloads."""

    name: ClassVar[str]

    @classmethod
    def parse(cls, call: Call) -> Op | None:
        left, right = call["self"], call["other"]
        if "rsub" in str(call.target):
            if call.arguments.get("alpha", 1) != 1:
                return None
            left, right = right, left
        alpha = call.arguments.get("alpha", 1)
        if alpha != 1 and isinstance(right, Value):
            return None
        if alpha != 1:
            right = right * alpha
        if call.arguments.get("rounding_mode") is not None:
            return None
        return cls(left, right, out=call.out)

    def build(self) -> tuple[Any, dict[str, Any]]:
        left, right = self.left, self.right
        if not isinstance(left, Value):
            if self.name == "sub":
                return overload("rsub.Scalar"), {"self": right, "other": left}
            if self.name == "div":
                assert isinstance(right, Value)
                inverse = right.builder.emit(Reciprocal(right))
                return overload("mul.Tensor"), {"self": inverse, "other": left}
            left, right = right, left
        return overload(f"{self.name}.Tensor"), {"self": left, "other": right}


@op("add.Tensor", "add.Scalar")
class Add(_Arithmetic):
    """`left + right`."""

    name = "add"
    left: Operand
    right: Operand

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        return _size(self.left, magnitude) + _size(self.right, magnitude)


@op("sub.Tensor", "sub.Scalar", "rsub.Scalar", "rsub.Tensor", "subtract.Tensor", "subtract.Scalar")
class Sub(_Arithmetic):
    """`left - right`."""

    name = "sub"
    left: Operand
    right: Operand

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        return _size(self.left, magnitude) + _size(self.right, magnitude)


@op("mul.Tensor", "mul.Scalar", "multiply.Tensor", "multiply.Scalar")
class Mul(_Arithmetic):
    """`left * right`."""

    name = "mul"
    left: Operand
    right: Operand

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        return _size(self.left, magnitude) * _size(self.right, magnitude)


@op("div.Tensor", "div.Scalar", "div.Tensor_mode", "div.Scalar_mode", "true_divide.Tensor",
    "true_divide.Scalar", "divide.Tensor", "divide.Scalar")  # fmt: skip
class Div(_Arithmetic):
    """`left / right`, true division."""

    name = "div"
    left: Operand
    right: Operand

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        if not isinstance(self.right, Value):
            return _size(self.left, magnitude) / abs(self.right)
        divisor = value(self.right).abs()
        # A relative error of the divisor is one of the quotient.
        return _size(self.left, magnitude) * magnitude(self.right) / divisor**2


@op("pow.Tensor_Scalar", "square.default")
class Pow(Op):
    """`input ** exponent` for a number `exponent`."""

    input: Value
    exponent: float

    @classmethod
    def parse(cls, call: Call) -> Op | None:
        return cls(call["self"], call.arguments.get("exponent", 2), out=call.out)

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        if not float(self.exponent).is_integer() or self.exponent < 1:
            return None
        x = value(self.input).abs()
        moved = self.exponent * x ** (self.exponent - 1) * magnitude(self.input)
        return moved + self.exponent * x**self.exponent  # by the operand, by its own products


class Unary(Op):
    """One tensor in, one tensor of the same shape out."""

    input: Value

    @property
    def flops(self) -> float:
        return float(numel(self.out))


@op("neg.default", "negative.default")
class Neg(Unary):
    """`-input`."""

    input: Value

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        return magnitude(self.input)


class _Power(Unary):
    """x^-p: a relative error r of the operand becomes p r; both ops here have p <= 1."""

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        operand = value(self.input).abs()
        return run(value).abs() * (magnitude(self.input) / operand).clamp(min=1)


@op("rsqrt.default")
class Rsqrt(_Power):
    """`1 / sqrt(input)`."""

    input: Value


@op("reciprocal.default")
class Reciprocal(_Power):
    """`1 / input`."""

    input: Value


@op("sqrt.default")
class Sqrt(_Power):
    """`sqrt(input)`."""

    input: Value


@op("heaviside.default")
class Heaviside(Binary):
    """0 where `left` is negative (or nan), 1 where it is positive, `right` where it is zero."""

    rename = {"self": "left", "values": "right"}  # noqa: RUF012
    left: Operand
    right: Operand

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        return run(value).abs() + _size(self.right, magnitude)


@op(*(f"{name}.{kind}" for name in ("eq", "ne", "lt", "le", "gt", "ge")
      for kind in ("Tensor", "Scalar")))  # fmt: skip
class Compare(Op):
    """A comparison; `relation` is one of eq, ne, lt, le, gt, ge."""

    left: Operand
    right: Operand
    relation: str

    @classmethod
    def parse(cls, call: Call) -> Op | None:
        relation = call.target._schema.name.removeprefix("aten::")
        return cls(call["self"], call["other"], relation, out=call.out)

    def build(self) -> tuple[Any, dict[str, Any]]:
        kind = "Tensor" if isinstance(self.right, Value) else "Scalar"
        target = overload(f"{self.relation}.{kind}")
        return target, {"self": self.left, "other": self.right}


@op("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
class Where(Op):
    """`left` where `condition`, else `right`."""

    rename = {"self": "left", "other": "right"}  # noqa: RUF012
    condition: Value
    left: Operand
    right: Operand

    def build(self) -> tuple[Any, dict[str, Any]]:
        numbers = not isinstance(self.left, Value), not isinstance(self.right, Value)
        kind = {(False, False): "self", (False, True): "ScalarOther",
                (True, False): "ScalarSelf", (True, True): "Scalar"}[numbers]  # fmt: skip
        return self.call(overload(f"where.{kind}"))

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        left, right = (_size(one, magnitude) for one in (self.left, self.right))
        return torch.where(value(self.condition), left, right)


@op("to.dtype", "to.dtype_layout", "to.other", "to.device", "_to_copy.default", "type_as.default")
class Cast(Op):
    """The same numbers in another dtype, on the same device and in the same layout."""

    input: Value
    dtype: torch.dtype

    @classmethod
    def parse(cls, call: Call) -> Op | None:
        source, found = call["self"].meta, call.out.meta
        if source.device != found.device or source.layout != found.layout:
            return None
        if call.arguments.get("memory_format") not in (None, *_PRESERVE):
            return None
        return cls(call["self"], found.dtype, out=call.out)

    def build(self) -> tuple[Any, dict[str, Any]]:
        return overload("to.dtype"), {"self": self.input, "dtype": self.dtype}

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        return magnitude(self.input)


@op("clone.default", "contiguous.default", "alias.default", "lift_fresh_copy.default",
    "lift_fresh.default", "positive.default")  # fmt: skip
class Copy(Op):
    """The same values, perhaps in fresh or contiguous memory."""

    input: Value

    @classmethod
    def parse(cls, call: Call) -> Op | None:
        if call.arguments.get("memory_format") not in (None, *_CONTIGUOUS, *_PRESERVE):
            return None
        return cls(call["self"], out=call.out)

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        return magnitude(self.input)


@op("detach.default")
class Detach(Op):
    """The same values, cut off from the gradient."""

    input: Value

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        return magnitude(self.input)


@op("full.default", "ones.default", "zeros.default", "full_like.default", "ones_like.default",
    "zeros_like.default", "new_full.default", "new_ones.default", "new_zeros.default")  # fmt: skip
class Full(Op):
    """A tensor of `size` filled with the number `fill_value`."""

    size: tuple[int, ...]
    fill_value: float
    dtype: torch.dtype | None = None
    device: torch.device | None = None

    @classmethod
    def parse(cls, call: Call) -> Op | None:
        name = call.target._schema.name.removeprefix("aten::").removesuffix("_like")
        name = name.removeprefix("new_")
        number = call["fill_value"] if name == "full" else {"ones": 1, "zeros": 0}[name]
        out = call.out.meta
        return cls(call.out.shape, number, out.dtype, out.device, out=call.out)

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        return run(value).abs()


@op("eye.default", "eye.m")
class Eye(Op):
    """The `[n, m]` matrix with ones on its diagonal; `m` is n where None."""

    n: int
    m: int | None = None
    dtype: torch.dtype | None = None
    device: torch.device | None = None

    @classmethod
    def parse(cls, call: Call) -> Op | None:
        out = call.out.meta
        n, m = out.shape
        return cls(n, m, out.dtype, out.device, out=call.out)

    def build(self) -> tuple[Any, dict[str, Any]]:
        return self.call(overload("eye.m"), m=self.n if self.m is None else self.m)

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        return run(value)
