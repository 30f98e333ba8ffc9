"""Properties of the whole optimization over generated networks, and proof that they can fail."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

import graphopt
from graphopt.ir import ops
from graphopt.ir.rewrite import Rewriter
from graphopt.ir.value import Value
from graphopt.testing import strategies
from tests.helpers import (
    assert_equal,
    gradient_error,
    gradients,
    norm_nodes,
    norms_left,
    output_of,
    prepare,
    relative_error,
    snapshot,
    tensor,
)

LIMIT = 1e-10


def assert_every_norm_left_has_a_reason(fast: graphopt.OptimizedModule) -> None:
    explained = {
        one.where
        for one in fast.report.refused
        if one.rewrite.startswith("fold-batch-norm") and one.reason.strip()
    }
    left = {node.meta["where"] for node in norm_nodes(fast)}
    assert left <= explained, f"no reason for {left - explained}\n{fast.report}"


def check(network: strategies.Network, mode: str) -> graphopt.OptimizedModule:
    """Everything that must hold for every network."""
    unchanged = snapshot(network.module)
    fast = graphopt.optimize(network.module, network.inputs, mode=mode)
    unchanged()
    assert fast.report.capture.method != "regional", str(fast.report)
    assert fast.report.rolled_back == [], str(fast.report)
    assert_equal(output_of(fast, network.inputs), output_of(network.module, network.inputs), LIMIT)
    assert_every_norm_left_has_a_reason(fast)
    if mode == "tune":
        found, truth = (gradients(one, network.inputs) for one in (fast, network.module))
        assert gradient_error(found, truth) <= LIMIT
    return fast


@given(strategies.networks())
def test_deploy(network: strategies.Network) -> None:
    """Same outputs, nothing rolled back, a reason for every norm that stays, source untouched."""
    check(network, "deploy")


@given(strategies.networks())
def test_tune(network: strategies.Network) -> None:
    """The same, and the gradients of all parameters are those of the source in eval mode."""
    check(network, "tune")


@given(strategies.networks(dtype=torch.float32, max_blocks=2))
def test_float32(network: strategies.Network) -> None:
    """In float32 the weights are rounded once more; the meaning is checked in float64."""
    fast = graphopt.optimize(network.module, network.inputs)
    assert fast.report.rolled_back == [], str(fast.report)
    assert fast.report.check is not None
    assert fast.report.check.float64_error <= LIMIT
    found, truth = (output_of(one, network.inputs) for one in (fast, network.module))
    assert_equal(found, truth, 1e-3)


# -- the generator and the checks can be trusted ------------------------------------------------


def test_the_generator_reaches_folds_and_refusals() -> None:
    """A property that never folds proves nothing, nor does one that never refuses."""
    seen: Counter[str] = Counter()

    @settings(max_examples=60, derandomize=True, database=None, deadline=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(strategies.networks())
    def count(network: strategies.Network) -> None:
        fast = graphopt.optimize(network.module, network.inputs, mode="tune")
        seen.update({f"applied {name}" for name in {one.rewrite for one in fast.report.applied}})
        seen["folded all"] += bool(fast.report.applied) and norms_left(fast) == 0
        seen["refused"] += norms_left(fast) > 0
        seen["refused: batch statistics"] += "batch statistics" in str(fast.report)
        seen["refused: used elsewhere"] += "used elsewhere" in str(fast.report)
        for module in network.module.modules():
            seen[type(module).__name__] += 1
            if getattr(module, "groups", 1) > 1:
                seen["grouped"] += 1
            if getattr(module, "padding_mode", "zeros") != "zeros":
                seen["padding mode"] += 1

    count()
    for what in (
        "applied fold-batch-norm", "applied fold-batch-norm-into-conv",
        "applied fold-batch-norm-into-linear", "applied fold-scale-shift",
        "folded all", "refused", "refused: batch statistics", "refused: used elsewhere",
        "Join", "Shared", "KeywordConv", "FrozenNorm", "Linear", "grouped", "padding mode",
        "Conv1d", "Conv2d", "Conv3d", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d",
    ):  # fmt: skip
        assert seen[what], f"60 networks, and never: {what}\n{seen}"
    assert any(seen[f"ConvTranspose{n}d"] for n in (1, 2, 3))
    assert any(seen[f"InstanceNorm{n}d"] for n in (1, 2, 3))


def test_networks_print_as_the_code_they_are() -> None:
    network = strategies.Network(nn.Conv2d(4, 5, 3), (tensor(2, 4, 6, 6),))
    assert repr(network) == (
        "inputs of [2, 4, 6, 6] into Conv2d(4, 5, kernel_size=(3, 3), stride=(1, 1))"
    )


def test_hypothesis_is_imported_on_use_only() -> None:
    code = (
        "import sys, graphopt, graphopt.testing; assert 'hypothesis' not in sys.modules\n"
        "from graphopt.testing import strategies; assert 'hypothesis' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


# Wrong folds, as they have been shipped. Each is a one-word slip in the right one below.


def folded(norm: ops.BatchNorm, rw: Rewriter, slip: str = "") -> Value:
    conv = rw.producer(norm.input, ops.Conv)
    rw.require(not norm.uses_batch_statistics, "batch statistics")
    rw.require(rw.only_user(conv, norm), "used elsewhere")
    assert norm.weight is not None
    assert norm.bias is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    eps = {"eps dropped": 0.0, "other eps": 1.1 * norm.eps}.get(slip, norm.eps)
    scale = norm.weight * (norm.running_var + eps).rsqrt()
    mean = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
    if slip == "bias lost":
        mean = norm.running_mean
    bias = norm.bias if slip == "mean not folded" else norm.bias - mean * scale
    if slip == "mean not scaled":
        bias = norm.bias - mean
    ones = (1,) * conv.rank
    weight = conv.weight * scale.reshape(-1, 1, *ones)
    if conv.transposed and slip != "scaled along dim 0":
        weight = conv.weight * scale.reshape(1, -1, *ones)
    changes = {"stride": (1,) * conv.rank} if slip == "stride lost" else {}
    return rw.conv_like(conv, weight=weight, bias=bias, **changes)


def wrong(slip: str) -> graphopt.ir.rewrite.Rewrite:
    @graphopt.rewrite(name=f"wrong: {slip}")
    def rewrite(norm: ops.BatchNorm, rw: Rewriter) -> Value:
        """A fold with a slip."""
        return folded(norm, rw, slip)

    return rewrite


def victim(transposed: bool = False) -> nn.Module:
    """Variances near 100: dropping eps then changes the output by 5e-8, below float32's notice."""
    conv = (nn.ConvTranspose2d if transposed else nn.Conv2d)(4, 4, 3, stride=2)
    model = prepare(nn.Sequential(conv, nn.BatchNorm2d(4)))
    nn.init.constant_(model[1].running_var, 100)
    return model


SLIPS = [
    "eps dropped", "other eps", "bias lost", "mean not folded", "mean not scaled",
    "scaled along dim 0", "stride lost",
]  # fmt: skip


@pytest.mark.parametrize("slip", SLIPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_wrong_folds_are_rolled_back(slip: str, dtype: torch.dtype) -> None:
    """Decided in float64 at the site, whatever the dtype of the model."""
    model, x = victim(slip == "scaled along dim 0").to(dtype), tensor(2, 4, 6, 5).to(dtype)
    fast = graphopt.optimize(model, (x,), passes=[wrong(slip)])
    assert [one.rewrite for one in fast.report.rolled_back] == [f"wrong: {slip}"]
    record = fast.report.rolled_back[0]
    assert record.where == "1"
    assert record.reason
    assert slip == "stride lost" or record.error > record.bound
    assert fast.report.applied == []
    assert torch.equal(output_of(fast, (x,)), output_of(model, (x,)))


@pytest.mark.parametrize("slip", SLIPS)
@pytest.mark.parametrize("blank", [torch.zeros, torch.ones], ids=["zeros", "ones"])
def test_wrong_folds_are_seen_on_blank_example_inputs(slip: str, blank: Any) -> None:
    """Zeros as example inputs hide every error in a weight, unless the check draws its own."""
    model, x = victim(slip == "scaled along dim 0"), tensor(2, 4, 6, 5)
    fast = graphopt.optimize(model, (blank(2, 4, 6, 5).double(),), passes=[wrong(slip)])
    assert_equal(output_of(fast, (x,)), output_of(model, (x,)))


def test_the_right_fold_is_not_rolled_back() -> None:
    for transposed in (False, True):
        model, x = victim(transposed), tensor(2, 4, 6, 5)
        fast = graphopt.optimize(model, (x,), passes=[wrong("nothing")])
        assert norms_left(fast) == 0
        assert 0 <= fast.report.applied[0].error <= fast.report.applied[0].bound


def test_a_wrong_site_is_rolled_back_alone() -> None:
    """Wrong for five channels only: the other sites stay folded."""

    @graphopt.rewrite
    def sometimes(norm: ops.BatchNorm, rw: Rewriter) -> Value:
        """A fold that forgets the mean of norms over five channels."""
        return folded(norm, rw, "mean not folded" if norm.out.shape[1] == 5 else "")

    model = prepare(nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5),
        nn.ReLU(), nn.Conv2d(5, 3, 1), nn.BatchNorm2d(3),
    ))  # fmt: skip
    x = tensor(2, 4, 6, 5)
    fast = graphopt.optimize(model, (x,), passes=[sometimes])
    assert [one.where for one in fast.report.applied] == ["1", "7"]
    assert [one.where for one in fast.report.rolled_back] == ["4"]
    assert norms_left(fast) == 1
    assert_equal(output_of(fast, (x,)), output_of(model, (x,)))


def test_a_rewrite_that_raises_leaves_the_graph_as_it_was() -> None:
    @graphopt.rewrite
    def broken(norm: ops.BatchNorm, rw: Rewriter) -> Value:
        """Builds half of the replacement, then fails."""
        folded(norm, rw)
        raise RuntimeError("half way")

    model, x = victim(), tensor(2, 4, 6, 5)
    fast = graphopt.optimize(model, (x,), passes=[broken])
    assert "half way" in fast.report.rolled_back[0].reason
    assert_equal(output_of(fast, (x,)), output_of(model, (x,)), 0)
    fast = graphopt.optimize(model, (x,), passes=[broken, wrong("nothing")])
    assert norms_left(fast) == 0


def test_the_properties_catch_a_wrong_fold() -> None:
    """Without site validation, the comparison of this file finds the slip by itself."""
    model, x = victim(), tensor(2, 4, 6, 5)
    bad = victim()
    bad[1].eps = 0
    assert relative_error(output_of(bad, (x,)), output_of(model, (x,))) > 100 * LIMIT
