"""Tune mode on ResNet-50: the promises of Efficient ConvBN Blocks (arXiv 2305.11624).

The rewritten model trains exactly as the source does with its norms in eval mode, and saves the
convolution outputs that the norms would have kept for backward.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graphopt
from graphopt.sources import load_source


def resnet50(dtype: torch.dtype) -> nn.Module:
    model, _, _ = load_source("torchvision:resnet50")
    return model.to(dtype)


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(x), y)


def batch(size: int, side: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 3, side, side, generator=generator, dtype=dtype)
    return x, torch.randint(0, 1000, (size,), generator=generator)


@pytest.fixture(scope="module")
def source() -> nn.Module:
    return resnet50(torch.float64)


@pytest.fixture(scope="module")
def tuned(source: nn.Module) -> graphopt.OptimizedModule:
    return graphopt.optimize(source, (batch(2, 64, torch.float64)[0],), mode="tune")


def test_every_norm_is_gone_and_every_parameter_keeps_its_name(source, tuned):
    assert tuned.report.after.batch_norms == 0
    assert dict(tuned.named_parameters()).keys() == dict(source.named_parameters()).keys()
    assert tuned.state_dict().keys() == source.state_dict().keys()


def test_gradients_equal_those_of_eval_mode(source, tuned):
    x, y = batch(2, 64, torch.float64)
    ours, theirs = copy.deepcopy(tuned), copy.deepcopy(source)
    loss_of(ours, x, y).backward()
    loss_of(theirs, x, y).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        error = (gradients[name] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-30)
        assert error <= 1e-10, name


def sgd_steps(model: nn.Module, steps: int) -> torch.Tensor:
    """The outputs on fixed inputs after a few steps of SGD, norms in eval mode."""
    x, y = batch(2, 64, torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
    with torch.no_grad():
        return model(x)


def test_ten_sgd_steps_equal_eval_mode_where_deploy_form_does_not(source, tuned):
    expected = sgd_steps(copy.deepcopy(source), 10)
    found = sgd_steps(copy.deepcopy(tuned), 10)
    assert (found - expected).norm() <= 1e-8 * expected.norm()

    x, _ = batch(2, 64, torch.float64)
    deployed = graphopt.optimize(source, (x,), mode="deploy")
    start = source(x)
    assert (deployed(x) - start).norm() <= 1e-10 * start.norm()
    other = sgd_steps(deployed, 10)
    moved = (expected - start).norm()
    assert (other - expected).norm() > 0.01 * moved


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes of distinct activations that autograd keeps for backward."""
    own = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        output = model(x)
    total = sum(kept.values())
    del output
    return total


def test_saves_at_least_thirty_percent_of_the_bytes_for_backward():
    source = resnet50(torch.float32)
    x, _ = batch(8, 224, torch.float32)
    tuned = graphopt.optimize(source, (x[:2],), mode="tune")
    before, after = saved_bytes(source, x), saved_bytes(tuned, x)
    assert after <= 0.7 * before, f"{before / 2**20:.0f} MiB -> {after / 2**20:.0f} MiB"
    print(f"saved for backward: {before / 2**20:.0f} -> {after / 2**20:.0f} MiB")
