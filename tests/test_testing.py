"""`graphopt.testing.check`: what an author of a rewrite hears about it."""

from __future__ import annotations

import pytest
import torch

import graphopt
from graphopt import rewrite
from graphopt.ir import ops
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.fold_batch_norm import FoldBatchNorm, fold_batch_norm_into_linear
from graphopt.passes.materialize import Materialize
from graphopt.testing import Counterexample, check, strategies


@rewrite
def drop_relu(op: ops.Relu, rw):
    return op.input


@rewrite
def pull_factor_out(op: ops.Relu, rw):
    """relu(c x) = c relu(x) for c > 0."""
    product = rw.producer(op.input, ops.Mul)
    rw.match(isinstance(product.right, float))
    rw.require(product.right > 0, "the factor is not positive")
    return rw.emit(ops.Relu(product.left)) * product.right


@rewrite
def pull_any_factor_out(op: ops.Relu, rw):
    product = rw.producer(op.input, ops.Mul)
    rw.match(isinstance(product.right, float))
    return rw.emit(ops.Relu(product.left)) * product.right


@rewrite
def merge_square_linears(outer: ops.Linear, rw):
    """Right for one order of the factors; for square weights the other one runs too."""
    inner = rw.producer(outer.input, ops.Linear)
    rw.require(inner.bias is None, "the inner map has a bias")
    rw.require(inner.weight.shape == outer.weight.shape, "the maps are not square")
    rw.require(inner.weight.shape[0] == inner.weight.shape[1], "the maps are not square")
    return rw.emit_like(outer, input=inner.input, weight=inner.weight @ outer.weight)


@pytest.mark.parametrize("wrong", [drop_relu, pull_any_factor_out, merge_square_linears], ids=str)
def test_a_wrong_rewrite_gets_a_counterexample_that_runs(wrong):
    with pytest.raises(Counterexample, match="is wrong at") as found:
        check(wrong, max_examples=60)
    scope: dict = {}
    exec(found.value.source, scope)
    report = graphopt.optimize(scope["model"], scope["inputs"], passes=[wrong]).report
    assert report.rolled_back
    assert len(found.value.source.splitlines()) < 45


def test_a_plain_function_will_do():
    def drop_tanh(op: ops.Tanh, rw):
        return op.input

    with pytest.raises(AssertionError, match="drop-tanh is wrong"):
        check(drop_tanh, max_examples=20)


def test_a_right_rewrite_passes_and_was_applied():
    assert check(pull_factor_out, max_examples=40) > 5


def test_graphs_cover_dtypes_sharing_users_and_spelling():
    seen: list[str] = []

    @rewrite(name="watch")
    def watch(op: ops.Linear, rw):
        seen.append(str(op.input.dtype))
        seen.append("read elsewhere" if len(op.out.users) > 1 else "read once")
        seen.append("called again" if len(op.weight.users) > 1 else "called once")
        rw.require(op.bias is not None, "no bias")
        return rw.emit(ops.Linear(op.input, op.weight)) + op.bias

    check(watch, max_examples=60)
    assert {"torch.float64", "torch.float32", "torch.bfloat16", "read elsewhere", "read once",
            "called again", "called once"} <= set(seen)  # fmt: skip


def test_a_rewrite_that_raises_is_told_to_require():
    @rewrite(name="raises")
    def raises(op: ops.Relu, rw):
        if op.input.dtype is torch.float64:
            raise ValueError("float64 is not for me")
        return rw.emit_like(op)

    with pytest.raises(AssertionError, match=r"raised a ValueError.*rw\.require"):
        check(raises, max_examples=40)


def test_a_rewrite_that_nothing_matches_fails():
    @rewrite(name="never")
    def never(op: ops.Relu, rw):
        rw.require(False, "never")
        return op.input

    with pytest.raises(AssertionError, match=r"no graph was found that it matches \(never\)"):
        check(never, max_examples=5)


@pytest.mark.parametrize(
    "one", [*FoldBatchNorm.rewrites[:1], fold_batch_norm_into_linear], ids=str
)  # fmt: skip
def test_our_own_rewrites_pass(one):
    assert check(one, max_examples=25, paths=600) > 0


def test_a_pass_is_tested_rewrite_by_rewrite_or_on_graphs():
    assert check(FoldBatchNorm, graphs=strategies.networks(), max_examples=10) > 0
    assert check(Canonicalize(), graphs=strategies.convolutional(), max_examples=5) > 0
    with pytest.raises(TypeError, match="pass graphs="):
        check(Materialize())


def test_a_rewrite_that_fires_on_its_own_result_is_told():
    @rewrite(name="again")
    def again(op: ops.Relu, rw):
        return rw.emit(ops.Relu(op.input))

    with pytest.raises(AssertionError, match="again fired at"):
        check(again, max_examples=5, paths=50)
