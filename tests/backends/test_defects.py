"""Known defects of the tools: each is still there in the tool alone, and not in what we make of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch._inductor import config

import graphopt
from graphopt.backends import defects, inductor
from graphopt.backends.base import BackendError
from tests.helpers import Net

EXPIRED = "expired: narrow the versions of this entry of graphopt/backends/defects.py, or remove it"
ENTRIES = {one.name: one for one in defects.DEFECTS}

pytestmark = pytest.mark.skipif(bool(inductor.missing()), reason=inductor.missing())


def compiled(model: nn.Module, x: torch.Tensor, **settings: bool):
    """What torch.compile alone returns."""
    torch._dynamo.reset()
    with torch.no_grad(), config.patch(**settings):
        return torch.compile(model)(x)


def bytes_of(dtype: torch.dtype) -> torch.Tensor:
    """Far from 0, on the side that hides nothing."""
    x = (torch.arange(72) % 50).reshape(4, 18)
    return (x + 3).to(torch.uint8) if dtype is torch.uint8 else (x - 60).to(torch.int8)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(4, 4, 3, bias=False)
        self.register_buffer("factor", torch.tensor([1.0, -2.0, 3.0, 0.5]).reshape(4, 1, 1))

    def forward(self, x):
        return self.conv(x) * self.factor


# -- the tools alone --------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "name"), [(torch.int8, "argmax"), (torch.uint8, "amin")])
def test_extremes_of_bytes_are_wrong_in_inductor(dtype, name):
    if torch.cuda.is_available() or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("seen with AVX-512 only")
    x, function = bytes_of(dtype), getattr(torch, name)
    assert not torch.equal(compiled(Net(lambda net, x: function(x, 1)), x), function(x, 1)), EXPIRED


def test_frozen_transposed_convolutions_are_wrong_in_inductor():
    model, x = Scaled().eval(), torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        assert not torch.allclose(compiled(model, x, freezing=True), model(x), atol=1e-3), EXPIRED
        assert torch.allclose(compiled(model, x), model(x), atol=1e-3)


def test_the_option_of_compile_does_not_freeze():
    """Why `Inductor` uses the setting: with the option nothing is wrong, since nothing is frozen."""
    model, x = Scaled().eval(), torch.randn(2, 4, 6, 6)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(model, options={"freezing": True})(x)
        assert torch.allclose(found, model(x), atol=1e-3), EXPIRED


def test_every_entry_is_tested_here():
    assert {one.name for one in defects.DEFECTS if one.holds()} <= {
        "extremes of bytes", "frozen transposed convolution",
    }  # fmt: skip


# -- ours -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_extremes_of_bytes_are_right_in_ours(dtype):
    def everything(net, x):
        lowest, highest = torch.aminmax(x, dim=1)
        return (
            x.amin(1), x.amax(1), x.min(1), x.max(1), x.min(), x.max(), lowest, highest,
            x.argmin(1), x.argmax(1), x.argmin(), x.amax((0, 1)) - 1, torch.minimum(x, x + 1),
        )  # fmt: skip

    model, x = Net(everything), bytes_of(dtype)
    fast = graphopt.optimize(model, (x,), backend="inductor")
    assert fast.report.backend == "inductor", fast.report.backend_notes
    assert "extremes of bytes" in defects.hits("inductor", fast.graph_module)
    with torch.no_grad():
        found, expected = (torch.utils._pytree.tree_leaves(one(x)) for one in (fast, model))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_what_no_defect_hits_is_left_alone():
    model = Net(lambda net, x: (x.amin(1), torch.minimum(x, x + 1)))
    for x in (torch.randn(2, 3), torch.ones(2, 3, dtype=torch.int16)):
        module = graphopt.optimize(model, (x,)).graph_module
        assert defects.hits("inductor", module) == {}
    module = graphopt.optimize(Net(lambda net, x: x.amin(1)), (bytes_of(torch.int8),)).graph_module
    assert defects.hits("prepacked", module) == {}


def test_frozen_weights_that_change_are_noticed(monkeypatch):
    """Once they are frozen anew, then no more."""
    monkeypatch.setattr(inductor, "FREEZINGS", 2)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU()), torch.randn(3, 4)
    fast = graphopt.optimize(model, (x,), backend="inductor")
    run = fast._lowered()
    assert isinstance(run, inductor.Inductor) and run.freezings == 1
    with torch.no_grad():
        for left in (0, 0):
            for parameter in fast.parameters():
                parameter.mul_(1.5)
            model.load_state_dict(fast.state_dict())
            torch.testing.assert_close(fast(x), model(x))
            assert run.freezings == left


# -- the table --------------------------------------------------------------------------------------


def test_versions_are_half_open():
    entry = dataclasses.replace(ENTRIES["extremes of bytes"], since="2.11", until="2.14.1")
    holds = {"2.10.0": False, "2.11.0": True, "2.14.0+cpu": True, "2.14.1": False, "3.0": False}
    assert {one: entry.holds(one) for one in holds} == holds


def test_a_defect_without_a_remedy_keeps_the_graph_off_the_backend(monkeypatch):
    entry = defects.Defect(
        "cosine", "inductor", "computes cosines of its own", source="here",
        applies=lambda module: next(
            (node for node in module.graph.nodes if defects.op_name(node) == "cos"), None
        ),
    )  # fmt: skip
    monkeypatch.setattr(defects, "DEFECTS", (entry,))
    x = torch.randn(2, 3)
    fast = graphopt.optimize(Net(lambda net, x: x.cos()), (x,), backend="inductor")
    assert fast.report.backend == "eager"
    (note, last) = fast.report.backend_notes
    assert (
        "computes cosines of its own, and the graph has cos at" in note and last == "running eager"
    )
    module = graphopt.optimize(Net(lambda net, x: x.sin()), (x,)).graph_module
    defects.refuse("inductor", module)
    with pytest.raises(BackendError, match=r"inductor is not used: torch 2.* computes cosines"):
        defects.refuse("inductor", fast.graph_module)
