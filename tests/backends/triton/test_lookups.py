"""Rows looked up where a tensor says: read in place, and never outside of the table."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphopt.backends.triton import ptx, runtime
from graphopt.backends.triton.compiled import Compiled
from graphopt.backends.triton.generated import Generated
from tests.backends.triton.helpers import assert_right, compiled, program, values


class Embedded(nn.Module):
    """Words and positions, normalized; and a linear layer of the words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 24, padding_idx=0)
        self.places = nn.Parameter(torch.randn(1, 7, 24))
        self.norm = nn.LayerNorm(24)
        self.out = nn.Linear(24, 5)

    def forward(self, words):
        return self.norm(self.words(words) + self.places), self.out(self.words(words) * 2)


def test_an_embedding_is_read_in_the_kernels_that_use_it():
    model, words = Embedded().eval(), values([2, 7], torch.int64).abs() % 11
    fast = compiled(model, words)
    assert_right(fast, model, words)
    assert_right(fast, model, torch.cat([words, words])[:3].flip(0))
    assert {one.kind for one in program(fast).regions} == {"reduction", "product"}
    assert not program(fast).outside
    assert not fast.notes


@pytest.mark.parametrize(("dim", "sizes"), [(0, [3]), (1, [2, 3]), (2, [7])])
def test_an_index_along_any_axis(dim, sizes):
    """From both ends, beside what is padded, joined and sliced."""
    shape = (4, 5, 6)
    index = torch.arange(torch.Size(sizes).numel()).reshape(sizes) * 3 % shape[dim]
    index = torch.where(index % 2 == 0, index, index - shape[dim])
    x = values(shape, torch.float64)
    places = [slice(None)] * dim

    def looked_up(x, index):
        found = x[(*places, index)]
        joined = torch.cat([found.relu(), found[..., :1]], -1)
        return joined * 2, torch.nn.functional.pad(found, (1, 0)).sum(-1)

    fast = compiled(looked_up, x, index)
    assert_right(fast, looked_up, x, index)
    total, inside = program(fast).coverage
    assert total == inside, program(fast).outside
    turned = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)  # other strides
    assert_right(fast, looked_up, turned, index)


def test_several_indices_are_broadcast():
    """Next to each other their axes come in their place, else first."""

    def looked_up(x, i, j):
        rows = torch.arange(x.shape[0])
        return x[:, i[:, None], j] * 2, x[i, :, j].relu(), x[rows[:, None], i[:2]] + 1

    x, i, j = values([3, 4, 5], torch.float64), torch.tensor([0, 2, -1]), torch.tensor([4, -5, 1])
    fast = compiled(looked_up, x, i, j)
    assert_right(fast, looked_up, x, i, j)
    total, inside = program(fast).coverage
    assert total == inside, program(fast).outside


def test_known_positions_need_no_check():
    """Those of a range that is proved to be inside, as in masks of attention."""

    def masked(x):
        rows, columns = torch.arange(x.shape[0]), torch.arange(3)
        return x[rows[:, None, None], columns[:, None] + 0, columns] * 2

    x = values([2, 4, 5], torch.float64)
    fast = compiled(masked, x)
    assert_right(fast, masked, x)
    assert_right(fast, masked, torch.cat([x, x])[:3])


def test_index_select_and_tables_with_strides():
    def select(x, index):
        return torch.index_select(x.t(), 1, index).exp()

    x, index = values([6, 5], torch.float64), torch.tensor([3, 0, 5])
    fast = compiled(select, x, index)
    assert_right(fast, select, x, index)
    assert len(program(fast).regions) == 1


def _table() -> tuple[Compiled, nn.Module]:
    model = nn.Sequential(nn.Embedding(11, 8), nn.SiLU())
    fast = compiled(model, torch.tensor([1, 2]))
    assert_right(fast, model, torch.tensor([1, 2]))
    return fast, model


@pytest.mark.parametrize("words", [[0, 11], [-1, 0], [10**14, 3]])
def test_positions_outside_are_refused_as_by_torch(words, monkeypatch):
    fast, model = _table()
    for run in (model, fast):
        with torch.no_grad(), pytest.raises(IndexError, match="out of range"):
            run(torch.tensor(words))
    monkeypatch.setattr(runtime.Launch, "_astray", lambda *_: False)
    with torch.no_grad():
        # Unchecked: it would crash if it read other memory than the table's.
        fast(torch.tensor(words))


def test_positions_inside_are_not():
    fast, model = _table()
    assert_right(fast, model, torch.tensor([0, 10, 0]))


def test_what_is_outside_but_not_read_is_no_error():
    """A label of -100 that is cut off."""

    def cut(x, index):
        return x[index[1:]] * 2

    x, index = values([5, 3], torch.float64), torch.tensor([-100, 4, -1])
    fast = compiled(cut, x, index)
    assert_right(fast, cut, x, index)
    assert len(program(fast).regions) == 1


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, i: x[i % 3] * 2, "positions that its kernel computes"),
        (lambda x, i: x[x[:, 0] > 0].sum() + i.sum(), "a mask as an index"),
    ],
)
def test_other_lookups_are_the_frameworks(function, reason):
    """Positions from an op in the same kernel: that op runs before, in a kernel of its own."""
    x, index = values([3, 3], torch.float64), torch.tensor([0, 2, 1, 1])
    fast = compiled(function, x, index)
    assert_right(fast, function, x, index)
    if "computes" in reason:
        assert len(program(fast).regions) == 2
    else:
        assert any(reason in one for one in program(fast).outside.values())


def test_a_range_of_one_input_s_size_along_another_input():
    """Whether it fits, the sizes of the call tell: the kernel runs, or torch raises."""

    def masked(x, mask):
        position = torch.arange(x.shape[0])[:, None], torch.arange(4)[None]
        return torch.where(mask[position] > 0, x, -1.0)

    x, mask = values([3, 4], torch.float64), values([3, 4], torch.float64, 1)
    fast = compiled(masked, x, mask)
    assert_right(fast, masked, x, mask)
    assert_right(fast, masked, x[:1], mask)
    assert_right(fast, masked, x[:2], values([7, 4], torch.float64))
    (region,) = program(fast).regions
    rows, others = (node.meta["val"].shape[0].node.expr for node in region.inputs[::-1])
    assert region.kernel.required == (others - rows,)
    for count in (2, 0):
        with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
            fast(x, mask[:count])


def test_a_lookup_compiles_with_its_checks():
    fast, _ = _table()
    (region,) = program(fast).regions
    assert isinstance(region, Generated)
    (unit,) = region.units()
    (found,) = ptx.compile_all([unit], targets=(90,))
    assert not found.error
    assert runtime.checks(unit.source) == {"debug": True, "sanitize_overflow": False}
    assert not runtime.checks("tl.load(x_ptr)")


def test_positions_are_as_wide_as_the_table():
    """Offsets of 64 bits for a table that needs them, though its positions have 32."""

    def scaled(x, index):
        return x[index] * 2

    x, index = values([5, 3], torch.float32), torch.tensor([4, -1], dtype=torch.int32)
    fast = compiled(scaled, x, index)
    assert_right(fast, scaled, x, index)
    (region,) = program(fast).regions
    assert isinstance(region, Generated)
    assert ".to(tl.int64)\n" not in region.source
    assert ".to(tl.int64)\n" in region.printed(region.kernel, wide=True).text
