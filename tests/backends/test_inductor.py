"""The inductor backend: right where freezing alone is not, and honest about failing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt
from graphopt.backends import inductor
from tests.helpers import randomize_norms


class Scaled(nn.Module):
    """A transposed convolution with as many input as output channels, then a constant factor:
    frozen by itself, torch 2.13 scales the wrong axis of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(4, 4, 3, bias=False)
        self.register_buffer("factor", torch.tensor([1.0, -2.0, 3.0, 0.5]).reshape(4, 1, 1))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(self.conv(x) * self.factor))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = Scaled()
    randomize_norms(model)
    return model.eval()


@pytest.mark.parametrize("passes", ["deploy", "canonicalize"])
def test_transposed_convolutions_are_right(model, passes):
    x = torch.randn(2, 4, 6, 6)
    fast = graphopt.optimize(model, (x,), passes=passes, backend="inductor")
    assert fast.report.backend == "inductor"
    assert bool(inductor.lower(fast.graph_module, False).freezings) == (passes == "deploy")
    for rows in (2, 3):
        x = torch.randn(rows, 4, 6, 6)
        with torch.no_grad():
            error = (fast(x) - model(x)).norm() / model(x).norm()
        assert error < 1e-5


def test_gradients_flow_through_a_deployed_model(model):
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    fast = graphopt.optimize(model, (x.detach(),), backend="inductor")
    fast(x).sum().backward()
    expected = torch.autograd.grad(model(x).sum(), x)[0]
    assert torch.allclose(x.grad, expected, atol=1e-4)


def test_a_backend_that_fails_or_lies_is_not_used(monkeypatch):
    def wrong(module, trainable):
        return lambda *args: module(*args) + 1

    monkeypatch.setattr(inductor, "BACKEND", graphopt.backends.base.Backend("inductor", wrong))
    x = torch.randn(2, 4)
    fast = graphopt.optimize(nn.Linear(4, 4), (x,), backend="inductor")
    assert fast.report.backend == "eager"
    assert "not used: its outputs differ" in fast.report.backend_notes[0]
    assert "running eager" in str(fast.report)

    def broken(module, trainable):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(inductor, "BACKEND", graphopt.backends.base.Backend("inductor", broken))
    fast = graphopt.optimize(nn.Linear(4, 4), (x,), backend="inductor")
    assert "failed: RuntimeError: no compiler" in fast.report.backend_notes[0]
