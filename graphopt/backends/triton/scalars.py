"""The pointwise ops: what torch means by each, and how Triton spells it.

An entry's text is a Triton expression over operands that are names or literals, so it needs no
parentheses of its own around them. Types follow torch's promotion; half types are computed in
float32. What Triton lacks, or means differently (division of integers, rounding, nan in a maximum),
is a function of `device`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as Promotion, elementwise_dtypes

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
Text = Callable[..., str]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One op.

    Attributes:
        operands: the arguments that are computed with, tensors or numbers, in the text's order.
        text: the expression, from the compute dtype, the operands' texts, and the other arguments by
            name.
        promotion: torch's rule for the dtype that it computes in.
        flops: floating-point operations per element.
        typed: which operands have the compute dtype; the others keep their own (a condition).
        only: says why it cannot be generated for some arguments; empty if it can.
    """

    operands: tuple[str, ...]
    text: Text
    promotion: Promotion = Promotion.DEFAULT
    flops: int = 1
    typed: tuple[str, ...] | None = None
    only: Callable[[torch.dtype, Mapping[str, Any]], str] = lambda dtype, arguments: ""

    def compute(self, arguments: Mapping[str, Any]) -> torch.dtype:
        """The dtype that torch computes in, before half types become float32."""
        values = [_value(arguments[name]) for name in self.typed or self.operands]
        dtype: torch.dtype = elementwise_dtypes(
            *[one for one in values if one is not None], type_promotion_kind=self.promotion
        )[0]
        return register(dtype)

    def refuses(self, arguments: Mapping[str, Any], tensors: Sequence[torch.Tensor]) -> str:
        dtype = self.compute(arguments)
        if dtype.is_complex:
            return "no kernels for complex numbers"
        return self.only(dtype, arguments)


def _value(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


def register(dtype: torch.dtype) -> torch.dtype:
    """The dtype that values of a dtype are held in inside a kernel."""
    return torch.float32 if dtype in HALF else dtype


def spelled(dtype: torch.dtype) -> str:
    """Triton's name of a dtype."""
    return "tl.int1" if dtype == torch.bool else "tl." + str(dtype).removeprefix("torch.")


def literal(value: complex | bool, dtype: torch.dtype) -> str:
    """A number in a kernel."""
    if dtype == torch.bool:
        return str(bool(value))
    if not dtype.is_floating_point:
        return str(int(value))  # type: ignore[arg-type]
    number = float(value)  # type: ignore[arg-type]
    if math.isfinite(number):
        return repr(number)
    return f'float("{number}")'


TABLE: dict[Any, Entry] = {}


def _names(*names: str) -> list[Any]:
    """Overloads by name: `add.Tensor`."""
    found = []
    for name in names:
        packet, _, overload = name.partition(".")
        found.append(getattr(getattr(aten, packet), overload or "default"))
    return found


def _enter(names: str, operands: str, text: str | Text, **more: Any) -> None:
    """`text` may be a pattern with {0}, {1}, ... for the operands."""

    def from_pattern(dtype: torch.dtype, *found: str, **options: Any) -> str:
        assert isinstance(text, str)
        return text.format(*found)

    entry = Entry(tuple(operands.split()), from_pattern if isinstance(text, str) else text, **more)
    TABLE.update(dict.fromkeys(_names(*names.split()), entry))


FLOAT = {"promotion": Promotion.INT_TO_FLOAT}
BOOL = {"promotion": Promotion.ALWAYS_BOOL, "flops": 0}


def _not_bool(dtype: torch.dtype, arguments: Mapping[str, Any]) -> str:
    return "arithmetic of truth values" if dtype == torch.bool else ""


def _scaled(sign: str, flipped: bool = False) -> Text:
    """self + alpha * other, and its relatives."""

    def text(dtype: torch.dtype, a: str, b: str, alpha: Any = 1, **rest: Any) -> str:
        a, b = (b, a) if flipped else (a, b)
        if alpha == 1:
            return f"{a} {sign} {b}"
        factor = literal(alpha, dtype)
        return f"{a} {sign} {b} * {factor}" if not flipped else f"{a} {sign} {factor} * {b}"

    return text


_enter("add.Tensor add.Scalar", "self other", _scaled("+"), only=_not_bool)
_enter("sub.Tensor sub.Scalar", "self other", _scaled("-"), only=_not_bool)
_enter("rsub.Tensor rsub.Scalar", "self other", _scaled("-", flipped=True), only=_not_bool)
_enter("mul.Tensor mul.Scalar", "self other", "{0} * {1}", only=_not_bool)
_enter("neg", "self", "-{0}", only=_not_bool)
_enter("abs", "self", "tl.abs({0})", only=_not_bool)
_enter("square", "self", "{0} * {0}", only=_not_bool)


def _divided(dtype: torch.dtype, a: str, b: str, **rest: Any) -> str:
    # The plain sign may be off in the last places in float32.
    return f"tl.div_rn({a}, {b})" if dtype == torch.float32 else f"{a} / {b}"


def _divided_rounded(
    dtype: torch.dtype, a: str, b: str, rounding_mode: str | None = None, **rest: Any
) -> str:
    if rounding_mode is None:
        return _divided(dtype, a, b)
    if dtype.is_floating_point:
        name = "floor" if rounding_mode == "floor" else "trunc"
        return f"device.{name}_quotient({a}, {b})"
    return f"{a} // {b}" if rounding_mode == "trunc" else f"device.floor_divide({a}, {b})"


def _whole_numbers(dtype: torch.dtype, arguments: Mapping[str, Any]) -> str:
    if arguments.get("rounding_mode") is None:
        return "" if dtype.is_floating_point else "a quotient of integers"
    return "rounding a quotient of floats" if dtype.is_floating_point else ""


_enter("div.Tensor div.Scalar", "self other", _divided, **FLOAT)
_enter("div.Tensor_mode div.Scalar_mode", "self other", _divided_rounded, only=_whole_numbers)
_enter("reciprocal", "self", lambda dtype, x: _divided(dtype, "1.0", x), **FLOAT)


def _integers(dtype: torch.dtype, arguments: Mapping[str, Any]) -> str:
    return "a remainder of floats" if dtype.is_floating_point else _not_bool(dtype, arguments)


_enter("remainder.Tensor remainder.Scalar", "self other", "device.remainder({0}, {1})",
       flops=0, only=_integers)  # fmt: skip
_enter("fmod.Tensor fmod.Scalar", "self other", "{0} % {1}", flops=0, only=_integers)

# -- powers, exponentials, roots ---------------------------------------------------------------

_POWERS = {
    0: "{0} * 0 + 1", 1: "{0}", 2: "{0} * {0}", 3: "{0} * {0} * {0}",
    4: "({0} * {0}) * ({0} * {0})", 0.5: "{1}", -0.5: "tl.rsqrt({0})", -1: "1.0 / {0}",
    -2: "1.0 / ({0} * {0})",
}  # fmt: skip


def _root(dtype: torch.dtype, x: str, **rest: Any) -> str:
    return f"tl.sqrt_rn({x})" if dtype == torch.float32 else f"tl.sqrt({x})"


def _power(dtype: torch.dtype, x: str, exponent: Any = 1, **rest: Any) -> str:
    return _POWERS[exponent].format(x, _root(dtype, x))


def _known_power(dtype: torch.dtype, arguments: Mapping[str, Any]) -> str:
    exponent = arguments["exponent"]
    if isinstance(exponent, fx.Node) or exponent not in _POWERS:
        return "a power with this exponent has no accurate formula"
    if not dtype.is_floating_point and (exponent < 0 or exponent != int(exponent)):
        return "a root or a quotient of integers"
    return ""


_enter("pow.Tensor_Scalar", "self", _power, flops=2, only=_known_power)
_enter("sqrt", "self", _root, **FLOAT)
_enter("rsqrt", "self", "tl.rsqrt({0})", flops=2, **FLOAT)
for _name in ("exp", "exp2", "log", "log2", "sin", "cos", "erf"):
    _enter(_name, "self", f"tl.{_name}({{0}})", **FLOAT)
for _name, _count in (("expm1", 4), ("log1p", 4), ("tanh", 8)):
    _enter(_name, "self", f"device.{_name}({{0}})", flops=_count, **FLOAT)

# -- activations -------------------------------------------------------------------------------


def _float_only(dtype: torch.dtype, arguments: Mapping[str, Any]) -> str:
    return "" if dtype.is_floating_point else "an activation of integers"


def _gelu(dtype: torch.dtype, x: str, approximate: str = "none", **rest: Any) -> str:
    if approximate == "tanh":
        inner = f"{math.sqrt(2 / math.pi)!r} * ({x} + 0.044715 * {x} * {x} * {x})"
        return f"0.5 * {x} * (1.0 + device.tanh({inner}))"
    return f"0.5 * {x} * (1.0 + tl.erf({x} * {math.sqrt(0.5)!r}))"


def _elu(
    dtype: torch.dtype, x: str, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1, **rest: Any
) -> str:
    inner = x if input_scale == 1 else f"{x} * {float(input_scale)!r}"
    low = f"{float(alpha)!r} * device.expm1({inner})"
    if scale == 1:
        return f"tl.where({x} > 0, {x}, {low})"
    return f"{float(scale)!r} * tl.where({x} > 0, {x}, {low})"


def _softplus(dtype: torch.dtype, x: str, beta: Any = 1, threshold: Any = 20, **rest: Any) -> str:
    b, limit = float(beta), float(threshold)
    scaled = x if b == 1 else f"{x} * {b!r}"
    return f"tl.where({scaled} > {limit!r}, {x}, device.log1p(tl.exp({scaled})) / {b!r})"


def _bounded(dtype: torch.dtype, x: str, low: Any, high: Any) -> str:
    """A comparison, unlike tl.clamp, keeps nan."""
    if low is not None:
        x = f"tl.where({x} < {low}, {low}, {x})"
    return x if high is None else f"device.at_most({x}, {high})"


def _hardtanh(dtype: torch.dtype, x: str, min_val: Any = -1, max_val: Any = 1, **rest: Any) -> str:
    return _bounded(dtype, x, literal(min_val, dtype), literal(max_val, dtype))


def _clamp(dtype: torch.dtype, x: str, low: str = "", high: str = "", **rest: Any) -> str:
    return _bounded(dtype, x, low or None, high or None)


_enter("relu", "self", "tl.where({0} < 0, 0, {0})", only=_not_bool)
_enter("sigmoid", "self", "1.0 / (1.0 + tl.exp(-{0}))", flops=4, **FLOAT)
_enter("silu", "self", "{0} / (1.0 + tl.exp(-{0}))", flops=4, only=_float_only)
_enter("gelu", "self", _gelu, flops=8, only=_float_only)
_enter("mish", "self", "{0} * device.tanh(device.log1p(tl.exp({0})))", flops=14, only=_float_only)
_enter("elu", "self", _elu, flops=6, only=_float_only)
_enter("softplus", "self", _softplus, flops=6, only=_float_only)
_enter("hardtanh", "self", _hardtanh, flops=2, only=_not_bool)
_enter("relu6", "self", lambda dtype, x, **rest: _hardtanh(dtype, x, 0, 6), flops=2, only=_not_bool)
_enter("hardsigmoid", "self",
       lambda dtype, x, **rest: f"{_bounded(dtype, f'({x} + 3.0)', '0.0', '6.0')} / 6.0",
       flops=4, only=_float_only)  # fmt: skip
_enter("hardswish", "self",
       lambda dtype, x, **rest: f"{x} * {_bounded(dtype, f'({x} + 3.0)', '0.0', '6.0')} / 6.0",
       flops=5, only=_float_only)  # fmt: skip
_enter("leaky_relu", "self",
       lambda dtype, x, negative_slope=0.01, **rest:
       f"tl.where({x} > 0, {x}, {x} * {float(negative_slope)!r})",
       flops=2, only=_float_only)  # fmt: skip

# -- choices -----------------------------------------------------------------------------------


def _extreme(word: str) -> Text:
    def text(dtype: torch.dtype, a: str, b: str, **rest: Any) -> str:
        nan = ", propagate_nan=tl.PropagateNan.ALL" if dtype.is_floating_point else ""
        return f"tl.{word}({a}, {b}{nan})"

    return text


_enter("clamp", "self min max", _clamp, flops=2, only=_not_bool)
_enter("clamp_min", "self min", _clamp, only=_not_bool)
_enter("clamp_max", "self max", lambda dtype, x, high, **rest: _bounded(dtype, x, None, high),
       only=_not_bool)  # fmt: skip
_enter("maximum", "self other", _extreme("maximum"), only=_not_bool)
_enter("minimum", "self other", _extreme("minimum"), only=_not_bool)
_enter("where.self where.ScalarOther where.ScalarSelf where.Scalar", "condition self other",
       "tl.where({0}, {1}, {2})", typed=("self", "other"), flops=0)  # fmt: skip
_enter("masked_fill.Scalar masked_fill.Tensor", "mask value self", "tl.where({0}, {1}, {2})",
       typed=("self",), flops=0)  # fmt: skip
for _name, _sign in {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items():
    _enter(f"{_name}.Tensor {_name}.Scalar", "self other", f"{{0}} {_sign} {{1}}", **BOOL)

# -- bits and truth values ---------------------------------------------------------------------


def _truths(dtype: torch.dtype, arguments: Mapping[str, Any]) -> str:
    return "" if dtype == torch.bool else "a logical operation on numbers"


def _bits(dtype: torch.dtype, arguments: Mapping[str, Any]) -> str:
    return "" if not dtype.is_floating_point else "bits of floats"


for _name, _sign in {"and": "&", "or": "|", "xor": "^"}.items():
    _enter(f"logical_{_name}", "self other", f"{{0}} {_sign} {{1}}", only=_truths, **BOOL)
    _enter(f"bitwise_{_name}.Tensor bitwise_{_name}.Scalar", "self other",
           f"{{0}} {_sign} {{1}}", flops=0, only=_bits)  # fmt: skip
_enter("logical_not", "self", lambda dtype, x: f"{x} == {literal(0, dtype)}", **BOOL)
_enter("bitwise_not", "self",
       lambda dtype, x: f"{x} == False" if dtype == torch.bool else f"~{x}",
       flops=0, only=_bits)  # fmt: skip
_enter("isnan", "self", "{0} != {0}", **BOOL)

# -- rounding ----------------------------------------------------------------------------------

for _name in ("floor", "ceil"):
    _enter(_name, "self", f"tl.{_name}({{0}})", only=_float_only)
for _name in ("round", "trunc", "sign"):
    _enter(_name, "self", f"device.{_name}({{0}})", only=_float_only)
_enter("_to_copy", "self", "{0}", flops=0)
