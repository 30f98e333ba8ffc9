"""Real spiking networks on digits: plain PyTorch, SpikingJelly and snnTorch, in Deploy mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from benchmarks.digits import Digits
from benchmarks.spiking.libraries import SPIKES, Snn, jelly_vgg, mpbn
from benchmarks.spiking.nets import Neuron, Recorded, Style, vgg
from benchmarks.spiking.train import accuracy, encode, mix_signs, train, upsampled
from graphopt.ir.source import copy_module
from tests.helpers import assert_equal, norms_left

STEPS = 3
UNROLLED = "canonicalize,drop-gradients,fold-thresholds"
NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: vgg(Style(steps=STEPS), (4, 0, 6, 0), size=8),
    "plain by steps, straight-through": lambda: vgg(
        Style(steps=STEPS, reset="soft", surrogate="straight through"), (4, 0, 6, 0), 8, "steps"
    ),
    "SpikingJelly": lambda: jelly_vgg("lif", "s", STEPS, 8, (6, 0, 8, 0)),
    "snnTorch": lambda: Snn("synaptic", STEPS),
}


@pytest.fixture(scope="module")
def data() -> Digits:
    return upsampled(8)


def calibrated(make: Callable[[], nn.Module], x: Tensor) -> nn.Module:
    """A model in float64 with statistics of its own, and no state of a run."""
    torch.manual_seed(0)
    model, made = make(), make()
    for norm in model.modules():
        if hasattr(norm, "momentum"):
            norm.momentum = 1.0
    model.train()(x.float())
    made.load_state_dict(model.state_dict())
    return made.double().eval()


def spikes_differ(source: nn.Module, fast: Any, x: Tensor) -> int:
    """Of all layers; a straight-through estimator's spike is one but for rounding."""
    with torch.no_grad():
        truth, found = source(x), fast(x)
    assert len(truth) == len(found) > 1
    varied = [bool(one.std(int(one.shape[0] == STEPS)).any()) for one in truth[1:]]
    assert sum(varied) > len(varied) / 2
    return sum(
        int(((a > 0.5) != (b > 0.5)).sum()) for a, b in zip(truth[1:], found[1:], strict=True)
    )


@pytest.mark.parametrize("name", NETS)
def test_spikes_of_all_layers_are_those_of_the_source(name: str, data: Digits) -> None:
    """In float64, for a batch of another size than the example's, with scales of both signs and zeros."""
    x = upsampled(16 if name == "snnTorch" else 8).test_x[:40].double()
    source = Recorded(mix_signs(calibrated(NETS[name], x), size=2.0), (Neuron, *SPIKES))
    fast = graphopt.optimize(source, (x[:3],))
    assert fast.report.rolled_back == [] and norms_left(fast) == 0
    assert spikes_differ(source, fast, x) == 0


def test_accuracy_stays(data: Digits) -> None:
    torch.manual_seed(0)
    model = NETS["plain"]()
    some = data._replace(x=data.x[:640], y=data.y[:640])
    train(model, some, epochs=3, batch=32)
    fast = graphopt.optimize(copy.deepcopy(model), (data.test_x[:3],))
    found = [accuracy(one, data.test_x, data.test_y, 90) for one in (model, fast)]
    assert found[0] == found[1] > 40


def test_spikes_as_input(data: Digits) -> None:
    """Rate encoding: another input at every step."""
    x = encode(data.test_x[:20].double(), "rate", STEPS, torch.Generator().manual_seed(0))
    source = Recorded(mix_signs(calibrated(NETS["plain"], x)))
    assert spikes_differ(source, graphopt.optimize(source, (x[:3],)), x) == 0


@pytest.mark.parametrize("reset", ["hard", "soft"])
def test_a_state_that_the_norm_overwrites_needs_the_norm(reset: str) -> None:
    """SpikingJelly's MPBN neuron: no threshold replaces its norm where the next step reads what it made."""
    node = "mpbn" if reset == "hard" else "soft mpbn"
    x = upsampled(8).test_x[:20].double()
    model = calibrated(lambda: jelly_vgg(node, "m", STEPS, 8, (6, 0)), x)
    source = Recorded(mix_signs(model), SPIKES)
    fast = graphopt.optimize(source, (x[:3],))
    assert spikes_differ(source, fast, x) == 0
    plain = graphopt.optimize(source, (x[:3],), passes=UNROLLED)
    for one in (fast, plain):
        refused = [each for each in one.report.refused if each.rewrite == "fold-threshold"]
        assert any(
            "read elsewhere too, so it has to be computed" in each.reason for each in refused
        )
        assert any("the steps of a loop stay alike" in each.reason for each in refused)
    assert norms_left(plain) == plain.report.after.batch_norms == 1 + STEPS  # the convolution's too
    scans = [node for node in fast.graph_module.graph.nodes if "scan" in str(node.target)]
    assert len(scans) == 1 and norms_left(fast) == 0
    assert fast.report.after.batch_norms == 1  # of the step
    assert fast.report.before.batch_norms == 1 + STEPS


@pytest.mark.parametrize("node", ["if", "soft mpbn"])
def test_step_by_step_every_neuron_is_one_loop(node: str) -> None:
    """With the same image at every step, which tells no steps to the first neuron."""
    x = upsampled(8).test_x[:20].double()
    model = mix_signs(calibrated(lambda: jelly_vgg(node, "s", 4, 8, (6, 0, 8)), x))
    fast = graphopt.optimize(model, (x[:3],))
    scans = [one for one in fast.graph_module.graph.nodes if "scan" in str(one.target)]
    assert [one.args[1] for one in scans] == [4, 4]
    assert_equal(fast(x), model(x))
    live = graphopt.streaming(fast)
    assert_equal(sum(live(x) for _ in range(4)) / 4, model(x))


@pytest.mark.parametrize(("hidden", "reset"), [(False, "zero"), (True, "subtract")])
def test_a_net_that_was_just_trained(hidden: bool, reset: str) -> None:
    """Its states are results of the last batch, which is as large as the example here."""
    torch.manual_seed(0)
    model = Snn("leaky", 4, 12, hidden=hidden, reset=reset)
    x = upsampled(12).test_x[:5]
    model.train()(x).sum().backward()
    model.double().eval()
    fast = graphopt.optimize(model, (x.double(),))
    assert fast.report.capture.notes == [] and fast.report.rolled_back == []
    for rows in (3, 5, 9):
        x = upsampled(12).test_x[:rows].double()
        assert torch.equal(fast(x), copy_module(model)(x))
    live = graphopt.streaming(fast)
    total = sum(live(x) for _ in range(4))
    assert_equal(total / 4, fast(x))


def test_the_library_says_something_else_about_negative_scales() -> None:
    """SpikingJelly's own fold, on one neuron: right for positive scales if it normalizes what is left."""
    torch.manual_seed(0)
    node: Any = mpbn(5)
    node.step_mode = "m"
    x = 2 * torch.randn(4, 50, 5, 3, 3)
    node.train()(x)
    node.reset()
    node.eval()
    truth = node(x)

    def differ(negate: bool, **how: bool) -> float:
        theirs = copy.deepcopy(node)
        theirs.reset()
        if negate:
            with torch.no_grad():
                theirs.vbn.weight[:2] *= -1
        expected = copy.deepcopy(theirs)(x) if negate else truth
        theirs.re_parameterize_v_threshold(**how)
        return float((theirs(x) != expected).double().mean())

    node.reset()
    assert differ(False, normalize_residual=True) < 1e-4
    assert differ(False, normalize_residual=False) > 1e-3
    assert differ(True, normalize_residual=True) > 0.05
