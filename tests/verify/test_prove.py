"""What is proved of rewrites, and what is not: the specification of the prover.

True rules are proved for all sizes and values; false ones are refuted with what is left of the
difference; a rule without a precondition that it needs is a false one.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt import rewrite
from graphopt.ir import ops
from graphopt.ir.contracts import Exact
from graphopt.ir.ops import widen
from graphopt.ir.value import Value
from graphopt.passes.base import available
from graphopt.verify.proof import Proof, prove
from graphopt.verify.proof.cache import SHIPPED, code, key

REWRITES = [
    pytest.param(one, id=f"{name}:{one.name}")
    for name, cls in available().items() for one in cls.all_rewrites()
]  # fmt: skip


def refuted(rule: Any, *tensors: str, depth: int = 1, seconds: float = 100.0) -> Proof:
    """The failed proof of a false rule; its residual speaks of these tensors and nothing else."""
    found = prove(rule, depth=depth, seconds=seconds)
    assert not found.proved, f"{rule.name} is false: {found}"
    assert found.pattern, f"{rule.name} should be refuted by an example: {found}"
    named = set(re.findall(r"([A-Za-z_]+)\d*[\[(]", found.residual)) - {"sum"}
    assert set(tensors) <= named, found.residual
    return found


def proved(rule: Any, depth: int = 1, seconds: float = 100.0) -> Proof:
    found = prove(rule, depth=depth, seconds=seconds)
    assert found.proved and found.depth == depth, str(found)
    assert found.cases > 0 and not found.residual
    return found


# -- our own rewrites ----------------------------------------------------------------------------


# Too many cases to enumerate; these files draw them at random, and nothing validates the sites there.
TESTED_INSTEAD = {
    "collect-terms": "passes/test_collect_terms.py",
    "gather-terms": "passes/test_collect_terms.py",
    **dict.fromkeys(
        ("fold-threshold", "fold-sign", "choice-of-numbers", "step-of-step", "step-as-choice",
         "heaviside-as-comparison"), "passes/test_fold_thresholds.py"),
    "choice-as-sign": "passes/test_binary.py",
    "cancel-terms": "passes/test_cancel_terms.py",
    "merge-region": "ir/test_linearity.py",
    "drop-fixed-mask": "passes/test_sink_expands.py",
    "recognize-activation": "passes/test_recognize_activations.py",
    **dict.fromkeys(("recognize-attention", "detach-mask"), "passes/test_recognize_attention.py"),
}  # fmt: skip


@pytest.mark.timeout(1300)  # minutes for laws that go through everything
@pytest.mark.parametrize("one", REWRITES)
def test_every_rewrite_is_proved_or_says_why_not(one):
    """To depth 1 or as deep as it takes to match: every op that a law goes through, between the root
    and anything."""
    if one.unproved:
        if not isinstance(one.contract, Exact):
            text = (Path(__file__).parents[1] / TESTED_INSTEAD[one.name]).read_text()
            assert "@given" in text and "validate=False" in text
        return
    kept = json.loads(SHIPPED.read_text()).get(key(one, 1), {})
    assert kept.get("proved"), "sources have changed; run `python -m benchmarks.proofs`"
    found = prove(one, depth=1, seconds=1200.0)
    assert found.proved and found.depth >= 1 and found.cases > 0, str(found)


def test_a_proof_rests_on_code_and_not_on_docstrings():
    text = 'class A:\n    """One."""\n\n    def f(self):\n        return "One."\n'
    assert code(text) == code(text.replace('"""One."""', '"""One\n    and more."""'))
    assert code(text) != code(text.replace('return "One."', 'return "Two."'))


# -- false rules ----------------------------------------------------------------------------------


@rewrite
def scales_axis_0_of_a_transposed_convolution(norm: ops.BatchNorm, rw):
    conv = rw.producer(norm.input, ops.Conv)
    rw.require(conv.transposed, "not transposed")
    rw.require(not norm.uses_batch_statistics, "it normalizes with batch statistics")
    rw.require(conv.channel_axis == 1 and conv.groups == 1, "unbatched or grouped")
    scale, shift = norm.scale_and_shift()
    weight = conv.weight * scale.reshape(-1, *(1,) * (conv.rank + 1))
    bias = shift if conv.bias is None else conv.bias * scale + shift
    return rw.conv_like(conv, weight=weight, bias=bias)


@rewrite
def folds_a_norm_over_axis_1_into_a_linear(norm: ops.BatchNorm, rw):
    linear = rw.producer(norm.input, ops.Linear)
    rw.require(not norm.uses_batch_statistics, "it normalizes with batch statistics")
    scale, shift = norm.scale_and_shift()
    bias = shift if linear.bias is None else linear.bias * scale + shift
    return rw.emit_like(linear, weight=linear.weight * scale.reshape(-1, 1), bias=bias)


@rewrite
def does_not_scale_the_mean(norm: ops.BatchNorm, rw):
    conv = rw.producer(norm.input, ops.Conv)
    rw.require(not norm.uses_batch_statistics, "it normalizes with batch statistics")
    rw.require(conv.channel_axis == 1 and not conv.transposed, "unbatched or transposed")
    scale, _ = norm.scale_and_shift()
    shift = -norm.running_mean if norm.bias is None else norm.bias - norm.running_mean
    bias = shift if conv.bias is None else conv.bias * scale + shift
    return rw.conv_like(conv, weight=conv.scale_out(scale), bias=bias)


def plain(conv: ops.Conv) -> bool:
    return bool(conv.channel_axis == 1 and conv.rank == 1 and not conv.transposed
                and conv.groups == 1 and conv.bias is None)  # fmt: skip


def merge_branches(tap: int) -> Any:
    """RepVGG: a 3-tap convolution, a 1-tap one and the identity, added to tap `tap` of 0, 1, 2."""

    @rewrite(name=f"merge-branches-{tap}")
    def rule(add: ops.Add, rw):
        inner = rw.producer(add.left, ops.Add)
        big = rw.producer(inner.left, ops.Conv)
        rw.require(plain(big) and big.stride == (1,) and big.dilation == (1,), "the large one")
        rw.require(big.kernel == (3,) and big.padding == (1,), "the large one is not 3 taps")
        small = rw.producer(inner.right, ops.Conv)
        rw.require(
            plain(small) and small.stride == (1,) and small.dilation == (1,), "the small one"
        )
        rw.require(small.kernel == (1,) and small.padding == (0,), "the small one is not 1 tap")
        rw.require(big.input == small.input, "the branches read different inputs")
        rw.require(add.right == big.input, "there is no identity branch")
        out, into = big.weight.shape[:2]
        rw.require(out == into, "the identity changes the channels")
        eye = rw.emit(ops.Eye(out, out, big.weight.dtype, big.weight.meta.device))
        one = small.weight + eye.reshape(out, out, 1)
        return rw.conv_like(big, weight=big.weight + rw.emit(ops.Pad(one, (tap, 2 - tap))))

    return rule


def test_the_first_axis_of_a_transposed_weight_is_not_the_output():
    """torch's freezing did this."""
    found = refuted(scales_axis_0_of_a_transposed_convolution, "W", "gamma", "var", "x")
    assert "transposed=True" in found.pattern
    assert found.residual.count("var[") == 2  # once at the output's channel, once at the input's


def test_a_norm_over_axis_1_is_not_over_the_features_of_a_linear():
    found = refuted(folds_a_norm_over_axis_1_into_a_linear, "gamma", "var", "W", "x")
    assert "Linear" in found.pattern and "var[j]" in found.residual and "var[k]" in found.residual


def test_the_mean_is_scaled():
    found = refuted(does_not_scale_the_mean, "mean", "var", "gamma")
    assert "x" not in found.residual and "W" not in found.residual


def test_the_identity_is_the_middle_tap():
    found = refuted(merge_branches(0), "x", "W", depth=2, seconds=10.0)
    assert "k - 1]" in found.residual


# -- true rules ----------------------------------------------------------------------------------


@rewrite
def merge_lora(add: ops.Add, rw):
    base = rw.producer(add.left, ops.Linear)
    scaled = rw.producer(add.right, ops.Mul)
    rw.match(isinstance(scaled.right, float))
    up = rw.producer(scaled.left, ops.Linear)
    rw.require(up.bias is None, "the adapter has a bias")
    down = rw.producer(up.input, ops.Linear)
    rw.require(down.bias is None, "the adapter has a bias")
    rw.require(down.input == base.input, "the adapter reads another input")
    return rw.emit_like(base, weight=base.weight + (up.weight @ down.weight) * scaled.right)


@rewrite
def merge_linears(outer: ops.Linear, rw):
    inner = rw.producer(outer.input, ops.Linear)
    bias = outer.bias
    if inner.bias is not None:
        moved = (outer.weight * inner.bias.reshape(1, -1)).sum((1,))
        bias = moved if bias is None else bias + moved
    return rw.emit_like(outer, input=inner.input, weight=outer.weight @ inner.weight, bias=bias)


@rewrite
def move_rms_weight_into_linear(linear: ops.Linear, rw):
    norm = rw.producer(linear.input, ops.RMSNorm)
    rw.require(norm.weight is not None, "the norm has no weight")
    rw.require(len(norm.normalized_shape) == 1, "the norm is over several axes")
    weight = linear.weight * norm.weight.reshape(1, -1)
    return rw.emit_like(linear, input=rw.emit_like(norm, weight=None), weight=weight)


def merge_pointwise(check_kernel: bool = True, check_padding: bool = True) -> Any:
    """A convolution, then a 1x1 one. Without the check of its padding, the first one pads more:
    the border then sees pixels where it should see zeros."""

    @rewrite(name="merge-pointwise")
    def rule(outer: ops.Conv, rw):
        rw.require(not outer.transposed and outer.channel_axis == 1 and outer.rank == 1, "outer")
        rw.require(
            outer.groups == 1 and outer.stride == (1,), "the outer one is strided or grouped"
        )
        if check_kernel:
            rw.require(outer.kernel == (1,), "the outer one is not 1x1")
        if check_padding:
            rw.require(not outer.pads, "the outer one pads")
        inner = rw.producer(outer.input, ops.Conv)
        rw.require(not inner.transposed and inner.channel_axis == 1, "transposed or unbatched")
        rw.require(inner.groups == 1, "grouped")
        out, middle = outer.weight.shape[:2]
        into = inner.weight.shape[1]
        first = outer.weight if check_kernel else outer.weight.narrow(2, 0, 1)
        flat = first.reshape(out, middle)
        weight = flat @ inner.weight.reshape(middle, -1)
        bias = outer.bias
        if inner.bias is not None:
            moved = (flat * inner.bias.reshape(1, -1)).sum((1,))
            bias = moved if bias is None else bias + moved
        merged = weight.reshape(out, into, *inner.kernel)
        moved = tuple(
            p + s * q for p, s, q in zip(inner.padding, inner.stride, outer.padding, strict=True)
        )
        return rw.conv_like(inner, weight=merged, bias=bias, padding=moved)

    return rule


def fold(check_training: bool = True) -> Any:
    """A batch norm into the convolution before it."""

    @rewrite(name="fold")
    def rule(norm: ops.BatchNorm, rw):
        conv = rw.producer(norm.input, ops.Conv)
        rw.require(conv.channel_axis == 1 and conv.rank == 1, "unbatched")
        rw.require(norm.running_mean is not None and norm.running_var is not None, "no statistics")
        if check_training:
            rw.require(not norm.training, "it normalizes with batch statistics")
        scale, shift = norm.scale_and_shift()
        bias = shift if conv.bias is None else conv.bias * scale + shift
        return rw.conv_like(conv, weight=conv.scale_out(scale), bias=bias)

    return rule


def move_factor_out_of_relu(check_sign: bool = True) -> Any:
    """relu(c x) = c relu(x)."""

    @rewrite(name="move-factor")
    def rule(relu: ops.Relu, rw):
        product = rw.producer(relu.input, ops.Mul)
        rw.match(isinstance(product.right, float))
        if check_sign:
            rw.require(product.right > 0, "the factor is not positive")
        return rw.emit(ops.Relu(product.left)) * product.right

    return rule


@pytest.mark.parametrize(("rule", "depth"), [
    (merge_lora, 3), (merge_linears, 1), (move_rms_weight_into_linear, 1),
], ids=lambda one: getattr(one, "name", ""))  # fmt: skip
def test_true_rules_are_proved(rule, depth):
    proved(rule, depth)


def test_a_pointwise_convolution_after_another_is_proved():
    proved(merge_pointwise())


def test_merged_branches_are_proved():
    found = proved(merge_branches(1), depth=2, seconds=20.0)
    assert "not: the branches read different inputs" in found.conditions


def test_what_a_proof_needs_is_said():
    found = proved(fold())
    assert "var + eps > 0" in found.conditions
    assert "not: it normalizes with batch statistics" in found.conditions
    found = proved(move_factor_out_of_relu())
    assert "relu(c x) = c relu(x) for c > 0" in found.conditions
    assert "not: the factor is not positive" in found.conditions


@rewrite
def divide_by_itself(op: ops.Div, rw):
    rw.match(op.left == op.right)
    return rw.emit(ops.Full(op.out.shape, 1.0, op.out.dtype, op.out.meta.device))


@rewrite
def cancel_number(op: ops.Div, rw):
    product = rw.producer(op.left, ops.Mul)
    rw.match(isinstance(op.right, float) and isinstance(product.right, float))
    rw.match(product.right == op.right)
    return product.left


@pytest.mark.parametrize("rule", [divide_by_itself, cancel_number], ids=lambda rule: rule.name)
def test_a_division_by_what_may_be_zero_is_a_condition(rule):
    found = prove(rule, depth=1, seconds=5.0)
    assert not found.proved or any("!= 0" in one for one in found.conditions), str(found)


@rewrite
def square_of_root(op: ops.Pow, rw):
    rw.match(op.exponent == 2)
    return rw.producer(op.input, ops.Sqrt).input


def test_a_root_is_of_what_is_not_negative():
    found = prove(square_of_root, depth=1, seconds=5.0)
    assert not found.proved or found.conditions, str(found)


# -- preconditions -------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "tensors"), [
    (fold(check_training=False), ("BatchNorm", "W", "x")),
    (move_factor_out_of_relu(check_sign=False), ("relu", "x")),
    (merge_pointwise(check_padding=False), ("W", "x")),
], ids=["training", "sign", "padding"])  # fmt: skip
def test_without_a_precondition_that_it_needs_a_rule_is_refuted(rule, tensors):
    refuted(rule, *tensors)


def test_without_a_precondition_on_sizes_the_shape_is_wrong():
    found = refuted(merge_pointwise(check_kernel=False))
    assert found.residual.startswith("shape [N, M,") and "K != 1" in found.pattern


# -- the way a rule asks does not hide a case ----------------------------------------------------


def except_where(root: type, looks: Any) -> Any:
    """Right, but where `looks(op, rw)` says so: there it returns the negative."""

    @rewrite(name="except-where", root=root)
    def rule(op, rw):
        if looks(op, rw):
            return rw.emit(ops.Neg(op.out))
        return rw.emit_like(op)

    return rule


def _grouped(outer: ops.Conv, rw: Any) -> bool:
    """Asks for the inner convolution before it says that the outer one must not be grouped."""
    inner = rw.producer(outer.input, ops.Conv)
    rw.require(not outer.transposed and outer.channel_axis == 1 and outer.rank == 1, "outer")
    rw.require(not inner.transposed and inner.channel_axis == 1 and outer.groups == 1, "inner")
    return bool(inner.groups != 1)


def _same_weight(outer: ops.Linear, rw: Any) -> bool:
    return bool(outer.weight == rw.producer(outer.input, ops.Linear).weight)


def _same_branch(add: ops.Add, rw: Any) -> bool:
    """relu(x) + relu(x), where the operands are one node."""
    return bool(rw.producer(add.left, ops.Relu).out == rw.producer(add.right, ops.Relu).out)


def _no_bias(add: ops.Add, rw: Any) -> bool:
    conv = rw.producer(add.left, ops.Conv)
    rw.require(conv.channel_axis == 1, "unbatched")
    return conv.bias is None


def _dilated_pixel(conv: ops.Conv, rw: Any) -> bool:
    rw.require(conv.rank == 1 and conv.channel_axis == 1 and not conv.transposed, "rank")
    rw.require(conv.input.shape[2] == 1, "more than one pixel")
    rw.require(not conv.pads, "pads")
    rw.require(conv.stride == (1,), "strided")
    return bool(conv.dilation[0] != 1)


def _number(ask: Any) -> Any:
    return lambda op, rw: isinstance(op.right, float) and ask(op.right)


HIDDEN = {
    "the inner convolution is grouped": (ops.Conv, _grouped),
    "a convolution without a bias": (ops.Add, _no_bias),
    "tied weights": (ops.Linear, _same_weight),
    "two operands are one node": (ops.Add, _same_branch),
    "dilation of a single pixel": (ops.Conv, _dilated_pixel),
    "an even kernel": (ops.Conv, lambda op, rw: op.kernel[0] % 2 == 0),
    "a product of sizes": (ops.Relu, lambda op, rw: op.out.shape[0] * op.out.shape[1] == 12),
    "a square of a number": (ops.Mul, _number(lambda c: c * c == 4)),
    "a size that divides": (ops.Relu, lambda op, rw: 12 % op.out.shape[0] == 0),
    "divmod": (ops.Relu, lambda op, rw: divmod(op.out.shape[0], 2)[1] == 1),
    "bits": (ops.Relu, lambda op, rw: op.out.shape[0] & 1),
    "a size equal to a float": (ops.Relu, lambda op, rw: op.out.shape[0] == 1.0),
    "a rounded number": (ops.Mul, _number(lambda c: int(c) != 0)),
    "a whole number": (ops.Mul, _number(lambda c: c.is_integer())),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_no_case_is_hidden_by_the_way_a_rule_asks(name):
    """Each rule is wrong in one case; a proof must find it, or say that it cannot look."""
    root, looks = HIDDEN[name]
    found = prove(except_where(root, looks), depth=1, seconds=5.0)
    assert not found.proved, str(found)


BEYOND = {
    "training is True": (ops.BatchNorm, lambda op, rw: op.training is True),
    "a negative slope": (ops.LeakyRelu, lambda op, rw: op.negative_slope < 0),
    "a step": (ops.Slice, lambda op, rw: op.step != 1),
    "a negative amount of padding": (ops.Pad, lambda op, rw: any(one < 0 for one in op.pad)),
    "three tensors": (ops.Cat, lambda op, rw: len(op.tensors) == 3),
    "a weight that is no parameter": (ops.Linear, lambda op, rw: not op.weight.is_constant),
    "a bfloat16 input": (ops.Relu, lambda op, rw: op.input.dtype == torch.bfloat16),
    "many axes": (ops.Relu, lambda op, rw: op.out.ndim == 4),
    "both operands broadcast": (
        ops.Add, lambda op, rw: op.left != op.right and isinstance(op.left, Value)
        and isinstance(op.right, Value) and op.out.shape not in (op.left.shape, op.right.shape),
    ),
}  # fmt: skip


@pytest.mark.xfail(reason="the general forms of the prover leave it out", strict=True)
@pytest.mark.parametrize("name", BEYOND)
def test_a_proof_is_about_the_general_forms(name):
    """The limits of `proof.general`: what a rule does here alone, no proof has seen."""
    root, looks = BEYOND[name]
    assert not prove(except_where(root, looks), depth=1, seconds=5.0).proved


@rewrite
def pad_by_reading_on(op: ops.Pad, rw):
    """A slice of a concatenation ends where the concatenation does."""
    rw.match(op.mode == "constant" and op.value is None and op.pad[0] == 0)
    last = op.input.ndim - 1
    joined = rw.emit(ops.Cat((op.input,), last))
    return rw.emit(ops.Slice(joined, last, 0, op.input.shape[-1] + op.pad[1]))


def test_a_slice_does_not_go_on_behind_the_end():
    found = prove(pad_by_reading_on, depth=1, seconds=5.0)
    assert not found.proved, str(found)


@rewrite
def draw_again(op: ops.Add, rw):
    """dropout(x) + x, with other random zeros."""
    drop = rw.producer(op.left, ops.Dropout)
    other = rw.emit(drop.replace())
    return rw.emit(ops.Add(other, op.right))


def test_random_zeros_are_not_equal_to_others():
    found = prove(draw_again, depth=1, seconds=5.0)
    assert not found.proved, str(found)


@rewrite
def sum_of_parts(op: ops.MaxPool, rw):
    """A pooling that is not one: sizes of the output must be right for its shape to be compared."""
    rw.match(op.kernel_size != (1,))
    return rw.emit(ops.Copy(op.input))


def test_a_pooling_changes_the_shape():
    found = prove(sum_of_parts, depth=1, seconds=5.0)
    assert not found.proved and "shape" in found.residual, str(found)


# -- what a proof says ---------------------------------------------------------------------------


@rewrite
def drop_relu(relu: ops.Relu, rw):
    return relu.input


def test_dropping_a_relu_is_refuted():
    found = refuted(drop_relu, "relu", "x")
    assert not found
    assert found.residual.replace(" ", "") in ("relu(x[i,j])-x[i,j]", "-x[i,j]+relu(x[i,j])")
    assert "drop-relu: not proved" in str(found)
    assert "Relu(x)" in str(found)


def test_a_plain_function_can_be_proved():
    def twice(neg: ops.Neg, rw):
        return rw.producer(neg.input, ops.Neg).input

    assert prove(twice, depth=1, seconds=5.0)


def test_a_proof_says_how_deep_it_looked():
    """What was not looked at in the time is not claimed."""
    found = prove(merge_lora, depth=3, seconds=0.0)
    assert not found.proved
    assert prove(merge_linears, depth=2, seconds=10.0).depth == 2


# -- it never raises -----------------------------------------------------------------------------


def _raises(op, rw):
    raise SystemError("no way")


def _recurses(op, rw):
    return _recurses(op, rw)


def _einsum(op, rw):
    return rw.emit(ops.Einsum("...->...", (op.input,)))


def _undecided(op, rw):
    return rw.emit(ops.Relu(op.input.op.input))


ODD = {
    "raises": _raises,
    "recurses": _recurses,
    "returns None": lambda op, rw: None,
    "returns a number": lambda op, rw: 1.0,
    "returns an op": lambda op, rw: op,
    "returns its root": lambda op, rw: op.out,
    "never matches": lambda op, rw: rw.match(False),
    "asks for an op without general form": lambda op, rw: rw.producer(op.input, ops.Embedding).out,
    "reads an op that is not decided": _undecided,
    "emits what has no notation": lambda op, rw: rw.emit(ops.Split(op.input, 1, 0)),
    "emits an einsum with dots": _einsum,
    "permutes wrongly": lambda op, rw: rw.emit(ops.Permute(op.input, (0, 0))),
    "reads an axis that is not there": lambda op, rw: rw.emit(ops.Select(op.input, 7, 0)),
    "reduces an axis that is not there": lambda op, rw: rw.emit(ops.Sum(op.input, (7,))),
    "repeats a tuple": lambda op, rw: rw.emit(
        ops.Reshape(op.input, (1,) * op.input.shape[0])
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_it_never_raises(name):
    odd = rewrite(root=ops.Relu, name="odd")(ODD[name])
    found = prove(odd, depth=1, seconds=3.0)
    assert not found.proved, str(found)
    assert found.residual
    if "general form" in name:
        assert "no general form of Embedding" in found.residual
    if name == "raises":
        assert "SystemError: no way" in found.residual


def test_a_root_without_general_form_is_said():
    found = prove(rewrite(root=ops.Embedding, name="odd")(lambda op, rw: op.weight), seconds=1.0)
    assert not found.proved and "no general form of Embedding" in found.residual


def test_a_loop_over_a_size_ends():
    """A size has no number; a loop over it must not run for the number it stands in for."""

    @rewrite(name="loops")
    def rule(op: ops.Relu, rw):
        start = time.perf_counter()
        for _ in range(op.out.shape[0]):
            if time.perf_counter() > start + 20:
                pytest.fail("the loop would go on for hours")
        return rw.emit_like(op)

    assert not prove(rule, depth=1, seconds=2.0).proved


@rewrite
def mean_as_product(mean: ops.Mean, rw):
    """The mean is the sum times one over the count."""
    count = 1
    for dim in mean.dims:
        count = count * mean.input.shape[dim]
    total = rw.emit(ops.Sum(mean.input, mean.dims, mean.keepdim))
    return total * (1 / count)


def test_one_over_a_size_is_a_number():
    proved(mean_as_product)


def test_axes_counted_from_the_end_are_axes():
    """`sum((-1,))` is what torch takes; a proof says the same of it as of `sum((1,))`."""

    @rewrite(name="matrix-vector")
    def rule(outer: ops.Linear, rw):
        inner = rw.producer(outer.input, ops.Linear)
        rw.require(inner.bias is not None and outer.bias is None, "biases")
        moved = (widen(outer.weight) * inner.bias.reshape(1, -1)).sum((-1,))
        weight = outer.weight @ inner.weight
        return rw.emit_like(outer, input=inner.input, weight=weight, bias=moved)

    proved(rule)
