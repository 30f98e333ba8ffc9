"""Activations and other functions of one number."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from graphopt.ir.ops.base import Call, Op, op
from graphopt.ir.ops.pointwise import Unary
from graphopt.ir.value import Value

# More than any rounding error relative to its magnitude: gamma_n below for n up to 2^33.
_FAR = 2.0**-20


def _limited(value: Any, magnitude: Any, low: float | None, high: float | None) -> Any:
    """What rounding leaves of an error after limiting: none where the value is far outside."""
    below = False if low is None else value < low - _FAR * magnitude
    above = False if high is None else value > high + _FAR * magnitude
    return torch.where(torch.as_tensor(below | above), 0.0, magnitude)


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
