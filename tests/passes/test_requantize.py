"""The specification of `requantize`: weights stored as integers stay integers where adapters are merged.

The truth is what the unmerged model computes, in float64; the error that is reported is measured again
here, by the model's own decoding of the codes that are stored.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.passes.base import PassError
from graphopt.pipeline import Pipeline
from tests.helpers import assert_equal, calls, output_of, prepare, reasons, tensor

OUT, IN, GROUP, RANK = 24, 32, 8, 4
X = tensor(3, IN, dtype=torch.float32)
ANY = "requantize{budget=10},deploy"


def groups(weight: Tensor) -> Tensor:
    return weight.reshape(OUT, IN // GROUP, GROUP)


def quantized(values: Tensor, dims: int | tuple[int, ...], top: int) -> tuple[Tensor, Tensor]:
    """Signed codes and the scales that they have in common along some axes."""
    scale = values.abs().amax(dims, keepdim=True) / top
    return (values / scale).round(), scale


def ranged(values: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unsigned codes along the last axis, their scales, and the codes of zero."""
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    scale = (high - low) / top
    zero = (-low / scale).round()
    return (values / scale + zero).round().clamp(0, top), scale, zero


def nibbles(codes: Tensor) -> Tensor:
    """Pairs of codes of the last axis in one byte."""
    low, high = codes.to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return low | (high << 4)


def unpacked(codes: Tensor) -> Tensor:
    return torch.stack([codes & 15, codes >> 4], -1).flatten(-2)


class Base(nn.Module):
    """A weight `[OUT, IN]` as it is stored; `decode` makes one of what `encode` stored."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        for name, one in ENCODE[form](tensor(OUT, IN, seed=3, dtype=torch.float32) / 6).items():
            self.register_buffer(name, one.contiguous())

    def weight(self) -> Tensor:
        return DECODE[self.form](self)


def per_row(w: Tensor) -> dict[str, Tensor]:
    codes, scale = quantized(w, 1, 127)
    return {"codes": codes.to(torch.int8), "scale": scale}


def per_tensor(w: Tensor) -> dict[str, Tensor]:
    codes, scale = quantized(w, (0, 1), 127)
    return {"codes": codes.to(torch.int8), "scale": scale[0, 0]}


def per_group(w: Tensor) -> dict[str, Tensor]:
    codes, scale = quantized(groups(w), -1, 127)
    return {"codes": codes.reshape(OUT, IN).to(torch.int8), "scale": scale[..., 0]}


def transposed(w: Tensor) -> dict[str, Tensor]:
    codes, scale = quantized(w.T, 0, 127)
    return {"codes": codes.to(torch.int8), "scale": scale.half()}


def with_zeros(w: Tensor) -> dict[str, Tensor]:
    codes, scale, zero = ranged(w, 255)
    return {"codes": codes.to(torch.uint8), "scale": scale, "zero": zero.to(torch.uint8)}


def packed(w: Tensor) -> dict[str, Tensor]:
    codes, scale = quantized(groups(w), -1, 7)
    return {"codes": nibbles(codes.reshape(OUT, IN) + 8), "scale": scale[..., 0]}


def packed_signs(w: Tensor) -> dict[str, Tensor]:
    codes, scale = quantized(groups(w), -1, 7)
    return {"codes": nibbles(codes.reshape(OUT, IN).int() & 15), "scale": scale[..., 0]}


def packed_zeros(w: Tensor) -> dict[str, Tensor]:
    codes, scale, zero = ranged(groups(w), 15)
    halves = codes.reshape(OUT, IN).to(torch.uint8).chunk(2)
    return {"codes": halves[0] << 4 | halves[1], "scale": scale, "zero": zero}


def double(w: Tensor) -> dict[str, Tensor]:
    codes, scale = quantized(groups(w), -1, 127)
    inner, outer = quantized(scale[..., 0], (0, 1), 127)
    return {"codes": codes.reshape(OUT, IN).to(torch.int8), "inner": inner.to(torch.uint8),
            "outer": outer[0, 0]}  # fmt: skip


def spread(scale: Tensor) -> Tensor:
    return scale.repeat_interleave(GROUP, -1)


ENCODE: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
    "rows": per_row, "tensor": per_tensor, "groups": per_group, "transposed": transposed,
    "zeros": with_zeros, "nibbles": packed, "signed nibbles": packed_signs,
    "nibbles with zeros": packed_zeros, "scales in codes": double, "fractions": per_row,
}  # fmt: skip
DECODE: dict[str, Callable[[Any], Tensor]] = {
    "rows": lambda m: m.codes.to(m.scale.dtype) * m.scale,
    "tensor": lambda m: m.codes * m.scale,
    "groups": lambda m: (groups(m.codes.float()) * m.scale[..., None]).reshape(OUT, IN),
    "transposed": lambda m: (m.codes.to(torch.float16) * m.scale).T.float(),
    "zeros": lambda m: (m.codes.to(torch.int16) - m.zero.to(torch.int16)) * m.scale,
    "nibbles": lambda m: (unpacked(m.codes).float() - 8) * spread(m.scale),
    "signed nibbles": lambda m: (
        ((unpacked(m.codes) ^ 8).to(torch.int8) - 8) * spread(m.scale)
    ),
    "nibbles with zeros": lambda m: (
        (groups(torch.cat([m.codes >> 4, m.codes & 15])) - m.zero) * m.scale
    ).flatten(1),
    "fractions": lambda m: m.codes / 127 * (m.scale * 127),
    "scales in codes": lambda m: m.codes.float() * spread(m.inner * m.outer),
}  # fmt: skip


def with_update(model: Base, size: float) -> None:
    """An update of low rank, `size` times as large as the weight."""
    model.down = nn.Parameter(tensor(RANK, IN, seed=4, dtype=torch.float32))
    model.up = nn.Parameter(tensor(OUT, RANK, seed=5, dtype=torch.float32))
    with torch.no_grad():
        model.up *= size * model.weight().norm() / (model.up @ model.down).norm()


class Adapted(Base):
    """A base with an adapter beside it."""

    def __init__(self, form: str, size: float = 0.3) -> None:
        super().__init__(form)
        with_update(self, size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.weight()) + F.linear(F.linear(x, self.down), self.up))


class Summed(Adapted):
    """The same, of one weight that the model itself adds up."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.weight() + self.up @ self.down))


def merged(model: nn.Module, passes: str = ANY) -> graphopt.OptimizedModule:
    """A model with nothing but its base left, the codes' error below the budget."""
    fast = graphopt.optimize(model.eval(), (X,), passes=passes)
    assert fast.report.rolled_back == []
    assert calls(fast)[-2:] == ["linear", "tanh"]
    assert {"add", "linear", "matmul"}.isdisjoint(calls(fast)[:-2])
    return fast


def rounded(fast: graphopt.OptimizedModule) -> list[Any]:
    """The records of the weights that were rounded again."""
    return [one for one in fast.report.applied if one.rewrite == "requantize"]


def rounding(fast: graphopt.OptimizedModule) -> Any:
    (found,) = rounded(fast)
    return found


def measured(model: Adapted, stored: dict[str, Tensor]) -> float:
    """The error of the new weight over the effect of the adapter, decoded as the model does."""
    again = copy.deepcopy(model).double()
    wanted = again.weight().double() + (again.up @ again.down).detach()
    effect = wanted - again.weight().double()
    for name, one in stored.items():
        old = getattr(again, name)
        assert (one.dtype, one.shape) == (getattr(model, name).dtype, old.shape)
        setattr(again, name, one.to(old.dtype))
    return float((again.weight().double() - wanted).norm() / effect.norm())


# -- the forms of codes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "model"),
    [(one, Adapted) for one in ENCODE]
    + [(one, Summed) for one in ("groups", "nibbles with zeros")],
)
def test_a_base_keeps_its_form_and_the_report_its_error(form: str, model: type[Adapted]) -> None:
    """The error is that of the codes that are stored, and what the model computes is what they say."""
    source = model(form)
    fast = merged(source)
    found = rounding(fast)
    error = measured(source, fast.state_dict())
    assert found.error == pytest.approx(error, rel=1e-6 if form != "transposed" else 1e-2)
    assert found.reason == f"the error of codes is {error:.3f} of what is merged"
    assert found.contract == "Calibrated(error of the weight / effect of what is merged, 10)"
    assert error < (0.25 if "nibbles" in form else 0.03)
    stayed = set(fast.state_dict()) | {"down", "up"}
    assert stayed == set(source.state_dict())
    x = tensor(5, IN, seed=7, dtype=torch.float32)
    away = (output_of(fast, (x,)) - output_of(source, (x,))).norm()
    base = torch.tanh(F.linear(x, source.weight()))
    assert error / 3 < away / (base - output_of(source, (x,))).norm() < 3 * error


@pytest.mark.parametrize("form", ["rows", "nibbles"])
@pytest.mark.parametrize("size", [0.001, 0.1, 3.0])
def test_no_worse_than_scales_that_cover_the_range(form: str, size: float) -> None:
    """The usual way is to quantize the sum as the base once was."""
    source = Adapted(form, size)
    with torch.no_grad():
        wanted = source.weight() + source.up @ source.down
    usual = Base.__new__(Base)
    nn.Module.__init__(usual)
    usual.form = form
    for name, one in ENCODE[form](wanted).items():
        usual.register_buffer(name, one)
    effect = (source.up @ source.down).detach().norm()
    naive = float((usual.weight() - wanted).norm() / effect)
    assert rounding(merged(source, "requantize{budget=1000},deploy")).error < 1.02 * naive


def test_a_tiny_adapter_never_makes_it_much_worse_than_without() -> None:
    """Where the effect is below a step, the old codes are nearest; new scales would move them all."""
    assert rounding(merged(Adapted("nibbles", 0.001))).error <= 1 + 1e-6


def test_codes_of_fewer_bits_than_are_stored() -> None:
    """Codes that mean four bits, in an int8 each, use all eight of them unless that is said."""
    four = {"codes": lambda m: unpacked(m.codes).to(torch.int8) - 8, "scale": lambda m: m.scale}
    source = Adapted("nibbles")
    wide = copy.deepcopy(source)
    for name, one in four.items():
        wide.register_buffer(name, one(source))
    wide.form = "groups"
    assert torch.equal(wide.weight(), source.weight())
    limited = merged(wide, "requantize{budget=10,bits=4},deploy")
    assert limited.codes.min() >= -8
    assert limited.codes.max() <= 7
    assert rounding(limited).error == pytest.approx(rounding(merged(source)).error)
    assert rounding(merged(wide)).error < 0.1 * rounding(limited).error


class Reference(nn.Module):
    """512 x 512, an adapter of rank 16 and alpha / rank = 2, in int8 by row or 4 bits by 64."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        values, top = nn.Linear(512, 512).weight.detach(), 2 ** (bits - 1) - 1
        codes, scale = quantized(values.unflatten(1, (-1, 512 if bits == 8 else 64)), -1, top)
        codes = codes.flatten(1)
        stored = codes.to(torch.int8) if bits == 8 else nibbles(codes + 8)
        self.bits = bits
        self.register_buffer("codes", stored)
        self.register_buffer("scale", scale)
        self.down, self.up = nn.Linear(512, 16, bias=False), nn.Linear(16, 512, bias=False)
        nn.init.normal_(self.up.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        codes = self.codes if self.bits == 8 else unpacked(self.codes).float() - 8
        weight = (codes.unflatten(1, (-1, 512 // self.scale.shape[1])) * self.scale).flatten(1)
        return torch.tanh(F.linear(x, weight) + 2 * self.up(self.down(x)))


@pytest.mark.parametrize(("bits", "low", "high"), [(8, 0.04, 0.07), (4, 0.7, 0.9)])
def test_the_error_at_usual_sizes(bits: int, low: float, high: float) -> None:
    """About what libraries were measured to lose: 0.06 in int8, 0.7 to 0.8 in four bits."""
    model, x = Reference(bits).eval(), tensor(2, 512, dtype=torch.float32)
    plain = graphopt.optimize(model, (x,))
    (said,) = set(re.findall(r"off by (.*) of what is merged", reasons(plain)))
    assert low < float(said) < high
    fast = graphopt.optimize(model, (x,), passes="requantize,deploy")
    if bits == 8:
        assert low < rounding(fast).error < high
        assert "add" not in calls(fast)
    else:
        assert calls(fast).count("linear") == calls(plain).count("linear") == 3
        why = f"rounded to codes again, it would be off by {said} of what is merged"
        assert f"{why}; the budget of requantize is 0.1" in reasons(fast)
        assert_equal(output_of(fast, (x,)), output_of(model, (x,)), 1e-5)


# -- what merges --------------------------------------------------------------------------------


class Layer(Base):
    """`body(layer, x)` over a base in int8 and parameters of its own."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], form: str = "rows") -> None:
        super().__init__(form)
        self.body = body
        with_update(self, 0.3)
        self.rows = nn.Parameter(tensor(OUT, seed=6, dtype=torch.float32))
        self.bias = nn.Parameter(tensor(OUT, seed=8, dtype=torch.float32))
        self.turn = nn.Parameter(
            torch.linalg.qr(tensor(IN, IN, seed=9, dtype=torch.float32)).Q.contiguous()
        )

    def low(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(self, x))


def length(m: Layer) -> Tensor:
    return m.rows / (m.weight() + m.up @ m.down).norm(dim=1).detach()


BODIES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "with biases": lambda m, x: F.linear(x, m.weight(), m.bias) + m.low(x) + m.rows,
    "behind each other": lambda m, x: F.linear(x + F.linear(m.low(x), m.down.T @ m.up.T),
                                               m.weight()),
    "turned": lambda m, x: F.linear(x @ m.turn, m.weight(), m.bias),
    "of a length": lambda m, x: (F.linear(x, m.weight()) + m.low(x)) * length(m) + m.bias,
    "twice": lambda m, x: F.linear(x, m.weight()) + m.low(x) + m.low(x * 2) + m.low(-x),
    "transposed": lambda m, x: x @ m.weight().T + m.low(x),
}  # fmt: skip


@pytest.mark.parametrize("how", BODIES)
def test_what_merges_with_a_plain_base_merges_with_codes(how: str) -> None:
    source = Layer(BODIES[how])
    fast = merged(source)
    assert fast.codes.dtype == torch.int8
    assert rounding(fast).error < 0.05
    x = tensor(5, IN, seed=7, dtype=torch.float32)
    assert_equal(output_of(fast, (x,)), output_of(source, (x,)), 0.05)


def test_scaled_rows_are_scales_and_nothing_is_lost() -> None:
    """A scale of rows goes into the scales that are stored, whatever its sign."""
    source = Layer(lambda m, x: F.linear(x, m.weight(), m.bias) * m.rows)
    fast = merged(source, "requantize{budget=0.000001},deploy")
    assert torch.equal(fast.codes.abs(), source.codes.abs())
    assert_equal(fast.scale.abs(), source.scale * source.rows.detach()[:, None].abs(), 1e-6)
    assert_equal(output_of(fast, (X,)), output_of(source, (X,)), 1e-6)


def test_norms_behind_convolutions_of_codes_are_scales_too() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            codes, scale = quantized(tensor(6, 4, 3, 3, dtype=torch.float32), (1, 2, 3), 127)
            self.register_buffer("codes", codes.to(torch.int8))
            self.register_buffer("scale", scale)
            self.norm = nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.norm(F.conv2d(x, self.codes * self.scale)))

    source, x = prepare(Net()), tensor(2, 4, 7, 7)
    fast = graphopt.optimize(source, (x,), passes="requantize,deploy")
    assert calls(fast) == ["mul", "conv2d", "tanh"]
    assert rounding(fast).error < 1e-12
    gained = source.norm.weight != 0
    assert torch.equal(fast.codes[gained].abs(), source.codes[gained].abs())
    assert_equal(output_of(fast, (x,)), output_of(source, (x,)))


def test_tables_of_codes() -> None:
    class Table(Adapted):
        def forward(self, tokens: Tensor) -> Tensor:
            rows = F.embedding(tokens, self.weight())
            return torch.tanh(rows + F.embedding(tokens, self.up) @ self.down)

    source, tokens = Table("groups").eval(), torch.tensor([[1, 2, 23], [4, 0, 6]])
    fast = graphopt.optimize(source, (tokens,), passes=ANY)
    assert calls(fast)[-2:] == ["embedding", "tanh"]
    assert "add" not in calls(fast)
    assert rounding(fast).error == pytest.approx(measured(source, fast.state_dict()), rel=1e-6)


# -- what does not ------------------------------------------------------------------------------


def refused(model: nn.Module, passes: str = ANY) -> str:
    """The reasons where nothing is merged and the model is right."""
    fast = graphopt.optimize(model.eval(), (X,), passes=passes)
    assert fast.report.rolled_back == []
    assert rounded(fast) == []
    assert_equal(output_of(fast, (X,)), output_of(model, (X,)), 1e-5)
    return reasons(fast)


def test_unless_asked_for_a_quantized_base_stays_and_the_reason_says_what_it_would_cost() -> None:
    said = refused(Adapted("nibbles"), "deploy")
    assert (
        "codes would be stored as torch.float32 (materialize{dequantize=true} before it allows that); "
        "rounded to codes again (requantize before it), it would be off by 0.23 of what is merged"
    ) in said


@pytest.mark.parametrize("model", [Adapted, Summed])
def test_over_the_budget_it_stays_and_the_reason_has_the_number(model: type[Adapted]) -> None:
    said = refused(model("nibbles"), "requantize{budget=0.2},deploy")
    assert re.search(r"0\.2(3|29) of what is merged; the budget (of requantize )?is 0\.2", said)


def test_codes_looked_up_in_a_table_have_no_affine_form() -> None:
    class Table(Adapted):
        def weight(self) -> Tensor:
            values = torch.linspace(-1, 1, 16) ** 3
            return (values[unpacked(self.codes).int()].unflatten(1, (-1, GROUP))
                    * self.scale[..., None]).flatten(1)  # fmt: skip

    assert "cannot be rounded again" in refused(Table("nibbles"))


def test_codes_of_two_bytes_are_no_integers_of_one() -> None:
    class Pairs(Adapted):
        def weight(self) -> Tensor:
            return (self.codes.float() + self.codes.float().roll(1, 1) * 256) * self.scale / 256

    assert "cannot be rounded again" in refused(Pairs("rows"))


def test_eight_bits_that_are_floats_are_no_codes() -> None:
    class Float8(Adapted):
        def __init__(self) -> None:
            super().__init__("rows")
            self.codes = (self.codes / 127).to(torch.float8_e4m3fn)

        def weight(self) -> Tensor:
            return self.codes.float() * self.scale

    assert "no integers of a byte" in refused(Float8())


def test_codes_that_something_else_reads_stay() -> None:
    """A rounded copy for one reader would store them twice; both have an adapter."""
    source = Layer(
        lambda m, x: (F.linear(x, m.weight()) + m.low(x)) @ (m.weight() + m.rows[:, None])
    )
    said = refused(source)
    assert "would be stored twice" in said or "weights are made of codes" in said


def test_a_scale_that_two_weights_share_stays_as_it_is() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Adapted("tensor"), Adapted("tensor")
            self.second.scale = self.first.scale

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) * self.second(x)

    source = Two().eval()
    fast = graphopt.optimize(source, (X,), passes=ANY)
    assert calls(fast).count("linear") == 2
    assert torch.equal(fast.first.scale, source.first.scale)
    for mine, record in zip(("first", "second"), rounded(fast), strict=True):
        assert record.where == mine
        again = measured(getattr(source, mine), {"codes": getattr(fast, mine).codes})
        assert record.error == pytest.approx(again, rel=1e-6)


def test_without_codes_the_pass_does_nothing() -> None:
    model = nn.Sequential(nn.Linear(IN, 8), nn.ReLU()).eval()
    assert graphopt.optimize(model, (X,), passes="requantize,deploy").report.applied == []


@pytest.mark.parametrize("option", ["budget=-1", "bits=0", "bits=9"])
def test_options_are_checked(option: str) -> None:
    with pytest.raises(PassError, match="expected"):
        Pipeline(f"requantize{{{option}}}")
