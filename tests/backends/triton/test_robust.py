"""A region that fails is left to the framework, with a note; the others are kernels all the same."""

from __future__ import annotations

import keyword

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.backends.triton import (
    compiled as compiled_module,
    decompose,
    partition,
    rules,
    runtime,
    scalars,
    tune,
)
from graphopt.backends.triton.families import scan
from graphopt.backends.triton.lower import RESERVED, identifier
from tests.backends.triton.helpers import assert_right, compiled, program, values

aten = torch.ops.aten


def two_regions(x):
    """Two reductions over other axes: two kernels."""
    return torch.erf(x).softmax(-1), (x * 2).softmax(0)


@pytest.mark.parametrize("wish", [*keyword.kwlist, *sorted(RESERVED), "", "_", "2d", "add_mul"])
def test_every_name_can_stand_in_a_kernel(wish):
    name = identifier(wish)
    assert name.isidentifier()
    assert not keyword.iskeyword(name)
    assert name not in RESERVED


def test_a_kernel_of_an_op_called_as_a_keyword_is():
    def masks(a, b):
        return a & b

    a, b = (values([3, 4], torch.bool, seed) for seed in (1, 2))
    fast = compiled(masks, a, b)
    assert_right(fast, masks, a, b)
    assert [one.name for one in program(fast).regions] == ["and_"]


@pytest.mark.parametrize("error", [ValueError("no such text"), NotImplementedError("no text")])
def test_one_region_without_text(monkeypatch, error):
    def refuses(dtype, x):
        raise error

    entry = scalars.TABLE[aten.erf.default]
    broken = scalars.dataclasses.replace(entry, text=refuses)
    monkeypatch.setitem(scalars.TABLE, aten.erf.default, broken)
    x = values([4, 6], torch.float64)
    fast = compiled(two_regions, x)
    assert_right(fast, two_regions, x)
    (region,) = program(fast).regions
    assert "mul" in region.name
    (note,) = fast.notes
    assert str(error) in note
    assert note in program(fast).outside.values()
    total, inside = program(fast).coverage
    assert 0 < inside < total


def test_a_failing_family(monkeypatch):
    def match(graph):
        raise RuntimeError("lost")

    monkeypatch.setattr(scan, "match", match)
    x = values([4, 6], torch.float64)
    fast = compiled(two_regions, x)
    assert_right(fast, two_regions, x)
    assert fast.notes == {"family scan: no kernel: RuntimeError: lost": 1}
    assert len(program(fast).regions) == 2


def test_a_formula_that_fails(monkeypatch):
    """torch's own op runs, and says why."""

    def formula(*args):
        aten.exp(args[0])
        raise TypeError("not for these arguments")

    monkeypatch.setitem(rules.RULES, aten.softmax.int, formula)
    monkeypatch.setattr(decompose, "_table", dict)
    monkeypatch.setattr(decompose.kinds, "KEPT", decompose.kinds.KEPT | {aten.softmax.int})
    x = values([4, 6], torch.float64)
    fast = compiled(two_regions, x)
    assert_right(fast, two_regions, x)
    assert "its formula fails: TypeError: not for these arguments" in set(
        program(fast).outside.values()
    )


class CompilationError(Exception):
    """By the name of Triton's own."""


def test_a_kernel_that_does_not_compile(monkeypatch):
    x = values([4, 6], torch.float64)
    fast = compiled(two_regions, x)
    calls = []

    def choice(self, *rest):
        calls.append(self.region.name)
        raise CompilationError("at 3:4:\ntoo large")

    monkeypatch.setattr(runtime.Launch, "choice", choice)
    for _ in range(2):
        assert_right(fast, two_regions, x)
    assert len(calls) == 2  # once for each
    assert fast.notes == {f"{name}: torch's own ops: too large": 1 for name in calls}


def test_other_errors_are_not_swallowed(monkeypatch):
    x = values([4, 6], torch.float64)
    fast = compiled(two_regions, x)

    def choice(self, *rest):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(runtime.Launch, "choice", choice)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        fast(x)


@pytest.mark.parametrize(
    ("error", "known"),
    [(tune.Unusable("x"), True), (RuntimeError("PassManager::run failed"), True),
     (RuntimeError("CUDA error"), False), (ValueError("x"), False)],
)  # fmt: skip
def test_what_says_that_a_kernel_does_not_run(error, known):
    assert tune.unusable(error) == known


def test_triton_s_own_errors_are_known():
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    assert tune.unusable(OutOfResources(2, 1, "shared memory"))
    assert issubclass(CompilationError, Exception)
    assert CompilationError.__name__ == "CompilationError"


def test_channels_shuffled_twice():
    """Shapes as in shuffle nets: axes exchanged, joined and cut, then exchanged again."""

    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Conv2d(12, 5, 1)

        def forward(self, x):
            first = self.shuffle(torch.cat([x, F.relu(x)], 1))
            again = self.shuffle(torch.cat([first[:, :6], F.relu(first[:, 6:])], 1))
            return self.last(again)

        @staticmethod
        def shuffle(x):
            return x.view(len(x), 2, 6, 2, 2).transpose(1, 2).reshape(len(x), 12, 2, 2)

    model, x = Shuffled().eval(), values([3, 6, 2, 2], torch.float32)
    assert_right(compiled(model, x), model, x)


@pytest.mark.parametrize(("least", "kind"), [(partition.LEAST_SCAN, "pointwise"), (0, "scan")])
def test_a_recurrence_of_a_few_ops_is_an_ordinary_chain(monkeypatch, least, kind):
    """It would otherwise be cut out of what it could be one kernel with."""

    def total(x):
        state = x[0]
        for step in x[1:]:
            state = state * 0.5 + step
        return state

    monkeypatch.setattr(partition, "LEAST_SCAN", least)
    x = values([3, 4], torch.float64)
    fast = compiled(total, x)
    assert_right(fast, total, x)
    assert [one.kind for one in program(fast).regions] == [kind]


def test_a_size_that_only_a_view_needs():
    """The kernel reads one row; torch's ops for the same region reshape them all."""

    def first(x):
        return x.softmax(-1).cumsum(0).reshape(len(x), 2, 3)[0].relu() + 1

    x = values([4, 6], torch.float64)
    fast = compiled(first, x)
    assert_right(fast, first, x)
    assert_right(fast, first, torch.cat([x, x])[:5])
    for region in program(fast).regions:
        assert region.reference.graph.output_node() is not None


def test_a_size_that_became_a_number():
    """Captured as a symbol, until an op (here: zeros of four rows are added) settled it."""

    def settled(x):
        rows = len(x)
        y = x.cumsum(0) + torch.zeros(4, 6, dtype=x.dtype)
        return y.cumsum(0).reshape(rows, 2, 3).relu() * 2

    x = values([4, 6], torch.float64)
    fast = compiled(settled, x)
    assert_right(fast, settled, x)
    for region in program(fast).regions:
        assert region.reference.graph.output_node() is not None


@pytest.mark.parametrize(
    "filled",
    [lambda y: torch.full_like(y, 2.5), lambda y: torch.full_like(y[:, :1], 2, dtype=torch.int64),
     torch.ones_like, lambda y: torch.zeros_like(y.sum(-1, keepdim=True), dtype=torch.float32),
     lambda y: y.new_full(y.shape, 0.5), lambda y: torch.empty_like(y).fill_(3.0)],
)  # fmt: skip
def test_what_is_filled_in_the_shape_of_a_tensor_does_not_read_it(filled):
    """The kernel gets no such tensor, nor does its meaning in torch's ops, which is what runs on an
    empty batch, backward, and in tracing."""

    def function(x):
        y = x.cumsum(1)
        return filled(y) * x.relu(), y

    x = values([4, 6], torch.float64)
    fast = compiled(function, x)
    for rows in (4, 5, 0):
        some = torch.cat([x, x])[:rows]
        for a, b in zip(fast(some), function(some), strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype
    (region,) = program(fast).regions
    assert [node.op for node in region.inputs] == ["placeholder"]
    sizes = [len(x)] * len(region.sizes)
    assert torch.equal(region.reference(x, *sizes)[0], function(x)[0])


@pytest.mark.parametrize("module", [nn.Fold(4, 2)])
def test_an_op_that_must_know_the_batch(module, monkeypatch):
    """Tracing settles the batch at the number that was put in for it; every size gets a program."""
    monkeypatch.setattr(compiled_module, "MOST_PROGRAMS", 2)

    class Net(nn.Module):
        def forward(self, x):
            return module(x.relu()).softmax(-1)

    real = compiled_module.decompose

    def settles(inner, inputs, mode):
        assert not isinstance(inputs[0].shape[0], torch.SymInt) or inputs[0].shape[0] == int(
            inputs[0].shape[0].node.hint
        )
        return real(inner, inputs, mode)

    monkeypatch.setattr(compiled_module, "decompose", settles)
    net, x = Net().eval(), values([2, 12, 9], torch.float64)
    fast = compiled(net, x)
    for rows in (2, 3, 5, 2):
        assert_right(fast, net, torch.cat([x, x, x])[:rows])
    assert len(fast.programs) == 2
    assert list(fast.notes.values()) == [1]  # five rows are one size too many
    assert fast(x[:0]).shape == net(x[:0]).shape
