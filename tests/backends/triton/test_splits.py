"""Long reductions over few rows become two kernels; all others stay one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from graphopt.backends.triton import splits
from tests.backends.triton.family_helpers import PHASES
from tests.backends.triton.helpers import assert_right, compiled, program, values


@contextmanager
def small() -> Iterator[None]:
    """A GPU of 16 multiprocessors, on which 24 values are a long row and two are work enough."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("LONG", 24), ("LEAST_CHUNK", 2), ("MULTIPROCESSORS", 16)):
            patch.setattr(splits, name, value)
        yield


def extents(fast) -> list[tuple[int, ...]]:
    """(rows, columns) of every reduction's kernel, for the sizes that it was made with."""
    return [
        tuple(region._at_example(one) for one in region.kernel.extent)
        for region in program(fast).regions if region.kind == "reduction"
    ]  # fmt: skip


def every(x, dims, keep):
    """Every reduction, of values with something in front, and with something behind it."""
    y = x * 0.5
    return (
        y.sum(dims, keepdim=keep),
        (y > 0).sum(dims, keepdim=keep),
        y.sum(dims, keepdim=keep, dtype=torch.float64),
        y.mean(dims, keepdim=keep),
        y.amax(dims, keepdim=keep),
        y.amin(dims, keepdim=keep),
        y.var(dims, correction=0, keepdim=keep),
        torch.linalg.vector_norm(y, 2, dims, keep),
        y - y.mean(dims, keepdim=True),
    )


@settings(max_examples=8, phases=PHASES)
@given(
    shape=st.lists(st.sampled_from([1, 2, 3, 4, 6, 7, 10]), min_size=1, max_size=4),
    chosen=st.sets(st.integers(0, 3), min_size=1),
    keep=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
)
def test_any_reduction_of_any_axes(shape, chosen, keep, dtype):
    dims = sorted(dim for dim in chosen if dim < len(shape)) or [0]
    bound = 64 * torch.finfo(dtype).eps

    def function(x):
        return every(x, dims, keep)

    x = values(shape, dtype)
    with small():
        fast = compiled(function, x)
        assert_right(fast, function, x, bound=bound)
    assert not fast.notes
    if 0 not in dims:  # else export may know the number of rows
        assert_right(fast, function, values([5, *shape[1:]], dtype, 1), bound=bound)
    if splits_of(shape, dims):
        length = prod(shape[dim] for dim in dims)
        assert all(columns < length for _, columns in extents(fast))


def splits_of(shape, dims):
    with small():
        return splits.cut(torch.empty(shape), dims)


@settings(max_examples=300, deadline=None)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    chosen=st.sets(st.integers(0, 3), min_size=1),
)
def test_the_parts_are_the_whole(shape, chosen):
    dims = sorted(dim for dim in chosen if dim < len(shape)) or [0]
    x = torch.arange(float(prod(shape)), dtype=torch.float64).reshape(shape)
    found = splits_of(shape, dims)
    rows = prod(shape) // (length := prod(shape[dim] for dim in dims))
    if length < 24 or 2 * rows > 16:
        assert found is None
        return
    if found is None:  # no divisor leaves chunks of two
        outer = prod(shape[dim] for dim in dims[:-1])
        assert outer == 1 and all(length % chunk for chunk in range(2, length))
        return
    parts, first, then = found
    again = x.reshape(parts).amax(first, keepdim=True).amax(then)
    assert torch.equal(again.flatten(), x.amax(dims).flatten())
    assert prod(parts[axis] for axis in first) >= 2 <= prod(parts[axis] for axis in then)


@pytest.mark.parametrize(
    ("shape", "dims", "split"),
    [((4, 2**18), [1], True), ((1, 2**20), [0, 1], True), ((66, 2**16), [1], True),
     ((67, 2**16), [1], False), ((4, 2**16 - 1), [1], False), ((4, 65537), [1], False),
     ((2**18, 4), [1], False), ((2**18, 4), [0], True)],
)  # fmt: skip
def test_what_is_worth_further_launches(shape, dims, split):
    found = splits.cut(torch.empty(shape, device="meta"), dims)
    assert (found is not None) == split
    if found is not None:
        parts, first, then = found
        chunk = prod(parts[axis] for axis in first)
        assert splits.LEAST_CHUNK <= chunk <= splits.PERSISTENT
        kept = prod(parts) // chunk // prod(parts[axis] for axis in then)
        assert kept * prod(parts[axis] for axis in then) >= splits.MULTIPROCESSORS


def test_a_norm_over_everything():
    """Two kernels for the mean, two for the variance, one for the rest."""

    def function(x):
        return F.group_norm(x.relu(), 1)

    x = values([2, 4, 12, 10], torch.float32)
    with small():
        fast = compiled(function, x)
        assert_right(fast, function, x)
        assert_right(fast, function, values([5, 4, 12, 10], torch.float32))
    assert extents(fast) == [(32, 30), (2, 16), (32, 30), (2, 16)]
    assert [one.kind for one in program(fast).regions].count("pointwise") == 1


def test_a_dynamic_axis_is_not_cut():
    def function(x):
        return x.sum((0, 1))

    x = values([6, 4], torch.float32)
    with small():
        fast = compiled(function, x)
        for rows in (6, 1, 9, 0):
            assert_right(fast, function, torch.cat([x, x])[:rows])
    assert extents(fast) == [(12, 2), (1, 12)]


def test_parts_of_a_half_sum_do_not_overflow():
    x = torch.cat([torch.full([2, 8192], 200.0), torch.full([2, 8192], -200.0)], 1).half()
    with small():
        fast = compiled(lambda x: x.sum(-1), x)
        found = fast(x)
    assert len(extents(fast)) == 2
    assert found.dtype == torch.float16 and not found.any()


def test_gradients_go_through_the_parts():
    def function(x):
        return (x.softmax(-1) * x).sum(-1)

    x = values([3, 40], torch.float64)
    with small():
        fast = compiled(function, x)
        found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
        fast(found).sum().backward()
    function(expected).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad)
