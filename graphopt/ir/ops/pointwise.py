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


@op("pow.Tensor_Scalar")
class Pow(Op):
    """`input ** exponent` for a number `exponent`."""

    input: Value
    exponent: float


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


# More than any rounding error relative to its magnitude: gamma_n below for n up to 2^33.
_FAR = 2.0**-20


def _limited(value: Any, magnitude: Any, low: float | None, high: float | None) -> Any:
    """What rounding leaves of an error after limiting: none where the value is far outside."""
    below = False if low is None else value < low - _FAR * magnitude
    above = False if high is None else value > high + _FAR * magnitude
    return torch.where(torch.as_tensor(below | above), 0.0, magnitude)


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


class Activation(Unary):
    """Elementwise nonlinearity. `positively_homogeneous`: f(c x) = c f(x) for every c > 0;
    `idempotent`: f(f(x)) = f(x).

    `slope` bounds |f'|, which is what rounding in the input is multiplied by; None if unbounded.
    """

    positively_homogeneous: ClassVar[bool] = False
    idempotent: ClassVar[bool] = False
    slope: ClassVar[float | None] = None

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        if self.slope is None:
            return None
        return self.slope * magnitude(self.input) + run(value).abs()


@op("relu.default")
class Relu(Activation):
    """`max(input, 0)`."""

    positively_homogeneous = True
    idempotent = True
    slope = 1.0
    input: Value

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        return _limited(value(self.input), magnitude(self.input), 0.0, None)


@op("leaky_relu.default")
class LeakyRelu(Activation):
    """`input` where positive, else `negative_slope * input`."""

    positively_homogeneous = True
    input: Value
    negative_slope: float = 0.01

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        return max(1.0, abs(self.negative_slope)) * magnitude(self.input)


@op("prelu.default")
class PRelu(Activation):
    """`input` where positive, else `weight * input`, `weight` per channel or scalar."""

    positively_homogeneous = True
    input: Value
    weight: Value

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        return magnitude(self.input) * magnitude(self.weight).max().clamp(min=1.0)


@op("clamp.default", "hardtanh.default", "relu6.default", "clamp_min.default",
    "clamp_max.default", "clip.default")  # fmt: skip
class Clamp(Activation):
    """`input` limited to `[min, max]`, numbers or None; covers hardtanh and relu6."""

    input: Value
    min: float | None = None
    max: float | None = None

    @classmethod
    def parse(cls, call: Call) -> Op | None:
        if call.target._schema.name == "aten::relu6":
            return cls(call["self"], 0.0, 6.0, out=call.out)
        limits = [
            call.arguments.get(name, call.arguments.get(f"{name}_val")) for name in ("min", "max")
        ]
        return cls(call["self"], *limits, out=call.out)

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        bound = torch.maximum(magnitude(self.input), run(value).abs())
        return _limited(value(self.input), bound, self.min, self.max)


@op("gelu.default")
class Gelu(Activation):
    """`input * Phi(input)`; `approximate` is "none" or "tanh"."""

    slope = 1.2
    input: Value
    approximate: str = "none"


@op("silu.default")
class Silu(Activation):
    """`input * sigmoid(input)`."""

    slope = 1.1
    input: Value


@op("sigmoid.default")
class Sigmoid(Activation):
    """`1 / (1 + exp(-input))`."""

    slope = 0.25
    input: Value


@op("tanh.default")
class Tanh(Activation):
    """Hyperbolic tangent."""

    slope = 1.0
    input: Value


@op("hardswish.default")
class Hardswish(Activation):
    """`input * relu6(input + 3) / 6`."""

    slope = 1.5
    input: Value


@op("hardsigmoid.default")
class Hardsigmoid(Activation):
    """`relu6(input + 3) / 6`."""

    slope = 0.2
    input: Value


@op("elu.default")
class Elu(Activation):
    """`input` where positive, else `alpha * (exp(input) - 1)`."""

    input: Value
    alpha: float = 1
    scale: float = 1
    input_scale: float = 1

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        limit = abs(self.alpha * self.scale)  # exp(x) - 1 may cancel
        slope = max(abs(self.scale), limit * abs(self.input_scale))
        return slope * magnitude(self.input) + run(value).abs() + limit


@op("mish.default")
class Mish(Activation):
    """`input * tanh(softplus(input))`."""

    slope = 1.1
    input: Value


@op("softplus.default")
class Softplus(Activation):
    """`log(1 + exp(beta * input)) / beta`."""

    slope = 1.0
    input: Value
    beta: float = 1
    threshold: float = 20


@op("exp.default")
class Exp(Activation):
    """`e ** input`."""

    input: Value

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        return run(value) * (1 + magnitude(self.input))


@op("log.default")
class Log(Activation):
    """Natural logarithm."""

    input: Value

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        return magnitude(self.input) / value(self.input).abs() + run(value).abs()


@op("abs.default")
class Abs(Activation):
    """`|input|`."""

    positively_homogeneous = True
    idempotent = True
    slope = 1.0
    input: Value


@op("erf.default")
class Erf(Activation):
    """The error function."""

    slope = 1.2
    input: Value


@op("sin.default")
class Sin(Activation):
    """Sine."""

    slope = 1.0
    input: Value


@op("cos.default")
class Cos(Activation):
    """Cosine."""

    slope = 1.0
    input: Value


@op("sign.default", "sgn.default")
class Sign(Activation):
    """-1, 0 or 1 as `input` is negative, zero (or nan), or positive."""

    idempotent = True
    input: Value

    @classmethod
    def parse(cls, call: Call) -> Op | None:
        return None if call.out.dtype.is_complex else cls(call["self"], out=call.out)

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        return run(value).abs()  # exact where its input is not within rounding of zero


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
    "zeros_like.default")  # fmt: skip
class Full(Op):
    """A tensor of `size` filled with the number `fill_value`."""

    size: tuple[int, ...]
    fill_value: float
    dtype: torch.dtype | None = None
    device: torch.device | None = None

    @classmethod
    def parse(cls, call: Call) -> Op | None:
        name = call.target._schema.name.removeprefix("aten::").removesuffix("_like")
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
