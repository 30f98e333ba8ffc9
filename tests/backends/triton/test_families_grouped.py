"""Low-rank products with a matrix for every row: tiles of one adapter, no matrix copied."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.backends.triton.families import grouped
from graphopt.backends.triton.families.common import widened
from graphopt.backends.triton.families.low_rank import Form, low_rank, tiles
from graphopt.ir import variants
from tests.backends.triton.family_helpers import BOUND, PHASES, assert_right, matched
from tests.helpers import relative_error

HALVES = (torch.float16, torch.bfloat16)


@given(
    st.lists(st.integers(-1, 5), min_size=1, max_size=70), st.integers(6, 9),
    st.sampled_from((1, 4, 16)),
)  # fmt: skip
def test_tiles_hold_every_row_once_and_one_adapter_each(ids: list[int], adapters: int, rows: int):
    table, order, count = tiles(torch.tensor(ids), adapters, rows)
    assert table.shape == (3, count)
    seen = []
    for adapter, first, last in table.T.tolist():
        places = list(range(first, min(first + rows, last)))
        if adapter == -2:
            continue
        assert places
        assert {ids[int(order[place])] for place in places} == {adapter}
        seen += [int(order[place]) for place in places]
    assert sorted(seen) == list(range(len(ids)))


@settings(max_examples=25, phases=PHASES)
@given(st.data())
def test_rows_get_their_own_adapter(data: Any):
    """Also where no row has one, ranks are padded, and sizes divide no block."""
    adapters, rank = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    wide, out = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    steps, sequences = data.draw(st.sampled_from((1, 3, 17, 40))), data.draw(st.integers(0, 6))
    dtype = data.draw(st.sampled_from((torch.float32, *HALVES)))
    ids = torch.tensor(
        data.draw(st.lists(st.integers(-1, adapters - 1), min_size=sequences, max_size=sequences)),
        dtype=torch.int64,
    )
    x = torch.randn(sequences, steps, wide).to(dtype)
    if data.draw(st.booleans()):
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    a, b = torch.randn(adapters, wide, rank).to(dtype), torch.randn(adapters, rank, out).to(dtype)
    a[0, :, rank // 2 + 1 :] = 0  # a smaller rank
    b = b.mT.contiguous().mT if data.draw(st.booleans()) else b
    scale = torch.randn(adapters).to(dtype) if data.draw(st.booleans()) else None
    base = torch.randn(sequences, steps, out).to(dtype) if data.draw(st.booleans()) else None
    form = Form(
        "grouped_test",
        "",
        rank,
        steps >= 16,
        scale is not None,
        base is not None,
        widened(dtype, True),
    )
    found = low_rank(form, x, a, b, ids, scale, base)
    known = (ids >= 0).double()[:, None, None]
    at = ids.clamp_min(0)
    truth = x.double() @ a.double()[at] @ b.double()[at] * known
    truth = truth if scale is None else truth * scale.double()[at][:, None, None]
    truth = truth if base is None else truth + base.double()
    assert found.dtype == dtype
    assert found.shape == truth.shape
    assert relative_error(found.double(), truth) <= BOUND[dtype]


def flat(x: Tensor, a: Tensor, b: Tensor, ids: Tensor, base: Tensor) -> Tensor:
    """As graphopt.multi writes it: one row, one adapter."""
    rows = ids + 1
    h = torch.matmul(x.reshape(-1, 1, x.shape[1]), a.index_select(0, rows)).reshape(-1, a.shape[2])
    h = torch.matmul(h.reshape(-1, 1, h.shape[1]), b.index_select(0, rows))
    return base + h.reshape(-1, b.shape[2])


def sequences(x: Tensor, a: Tensor, b: Tensor, ids: Tensor, scale: Tensor) -> Tensor:
    return ((x @ a[ids].mT) @ b.index_select(0, ids)) * scale[ids][:, None, None]


def plain(x: Tensor, a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
    return torch.relu((x @ a[ids]) @ b[ids])


@pytest.mark.parametrize("steps", [None, 3, 18])
def test_looked_up_products_are_matched_with_scale_and_sum(steps: int | None):
    ids = torch.tensor([2, 0, 1, 2, 2])
    if steps is None:
        inputs = [torch.randn(5, 20), torch.randn(4, 20, 3), torch.randn(4, 3, 33), ids - 1,
                  torch.randn(5, 33)]  # fmt: skip
        function: Any = flat
    else:
        inputs = [torch.randn(5, steps, 20), torch.randn(4, 3, 20), torch.randn(4, 3, 33), ids,
                  torch.randn(4)]  # fmt: skip
        function = sequences
    one = matched(grouped.match, function, *inputs)
    (region,) = one.found.regions
    assert not one.reasons
    products = [
        node for node in one.graph.nodes if node.meta.get("kind") in ("product", "pointwise")
    ]
    assert set(products[-3:]) <= set(region.nodes)  # the scale or the sum, too
    assert_right(one, function, *inputs)
    for rows in (0, 1, 3):
        part = [value[:rows] if value.shape[0] == 5 else value for value in inputs]
        assert_right(one, function, *part)


def test_an_adapter_that_does_not_exist_is_an_error():
    inputs = [
        torch.randn(2, 3, 8),
        torch.randn(4, 8, 3),
        torch.randn(4, 3, 9),
        torch.tensor([0, 3]),
    ]
    one = matched(grouped.match, plain, *inputs)
    assert len(one.found.regions) == 1
    for wrong in (-1, 4):
        inputs[3] = torch.tensor([0, wrong])
        with pytest.raises(IndexError, match="expected 0 to 3"):
            one.run(*inputs)


def twice(x: Tensor, a: Tensor, b: Tensor, ids: Tensor) -> Any:
    h = x @ a[ids]
    return h @ b[ids], h.sum()


def half(x: Tensor, a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
    return x @ a[ids] + b.sum()


def mixed(x: Tensor, a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
    return (x @ a[ids]) @ b[ids.flip(0)]


@pytest.mark.parametrize(
    ("function", "dtype", "rank", "reason"),
    [
        (twice, torch.float32, 3, "no second one alone reads"),
        (half, torch.float32, 3, "no second one alone reads"),
        (mixed, torch.float32, 3, "matrices looked up by"),
        (plain, torch.float64, 3, "products of torch.float64 are the framework's"),
        (plain, torch.float32, 200, "rank 200 is more than 128"),
    ],
)
def test_what_does_not_fit_says_why(function: Any, dtype: torch.dtype, rank: int, reason: str):
    inputs = [torch.randn(2, 3, 8), torch.randn(4, 8, rank), torch.randn(4, rank, 9)]
    inputs = [*(one.to(dtype) for one in inputs), torch.tensor([0, 3])]
    one = matched(grouped.match, function, *inputs)
    assert not one.found.regions
    assert any(reason in found for found in one.reasons), one.reasons
    assert_right(one, function, *inputs)


def test_tables_count_once_not_by_row():
    inputs = [torch.randn(5, 3, 8), torch.randn(4, 8, 2), torch.randn(4, 2, 9),
              torch.tensor([0, 3, 1, 1, 1])]  # fmt: skip
    (region,) = matched(grouped.match, plain, *inputs).found.regions
    tables = 4 * (4 * 8 * 2 + 4 * 2 * 9)
    assert region.bytes == tables + 4 * (5 * 3 * 8 + 5 * 3 * 9) + 8 * 5
    assert region.flops == 2 * 5 * 3 * 2 * (8 + 9)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 10), nn.Linear(10, 9)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.first(x)))
        return y


class LowRank(nn.Module):
    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + 0.5 * self.up(self.down(x))
        return y


def test_a_mixed_batch_of_graphopt_multi(monkeypatch: pytest.MonkeyPatch):
    """Where the cost model prefers matrices that are looked up."""
    costs = iter([1.0, 0.0] * 100)
    monkeypatch.setattr(variants._Router, "_seconds", lambda *args: next(costs))
    base = Net().eval()
    adapted = []
    for rank in (1, 2, 3):
        one = copy.deepcopy(base)
        one.first, one.second = LowRank(one.first, rank), LowRank(one.second, rank)
        adapted.append(one.eval())
    x, ids = torch.randn(7, 12), torch.tensor([2, -1, 0, 2, 1, 0, -1])
    fast = graphopt.multi(base, adapted, (x,))
    found = matched(grouped.match, fast.graph_module, x, ids)
    assert [region.kind for region in found.found.regions] == ["grouped", "grouped"]
    assert relative_error(found.run(x, ids)[0], fast(x, adapter_ids=ids)) <= BOUND[torch.float32]
