"""Twelve models through `optimize(backend="triton")`: right, dynamic, and almost all in kernels."""

from __future__ import annotations

import pytest
import torch

import graphopt
from benchmarks import triton_zoo as zoo
from tests.helpers import relative_error

FLOAT32 = 2e-6  # of the largest output, for sums in another order


def _assert_right(fast, model, inputs, **more):
    assert fast.report.backend == "triton", fast.report.backend_notes
    for rows in (1, 3):
        some = [torch.cat([one, one])[:rows] for one in inputs]
        named = {name: one[:rows] for name, one in more.items()}
        with torch.no_grad():
            assert relative_error(fast(*some, **named), model(*some, **named)) <= FLOAT32
    (program,) = fast._run.programs.values()
    fusible, inside = program.coverage
    assert inside >= 0.95 * fusible > 0, program.outside
    assert not fast._run.notes


@pytest.mark.parametrize("name", zoo.MODELS)
def test_model(name):
    model, inputs = zoo.made(name)
    fast = graphopt.optimize(model, inputs, backend="triton", validate=False)
    _assert_right(fast, model, inputs)


def test_several_adapters_at_once():
    base, adapted, inputs = zoo.adapters()
    fast = graphopt.multi(base, adapted, inputs, backend="triton")
    plain = graphopt.multi(base, adapted, inputs)
    _assert_right(fast, plain, inputs, adapter_ids=torch.tensor([0, 1, -1]))
