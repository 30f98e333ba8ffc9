"""A batch whose rows want different adapters: every row is what its own model computes."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.ir.distance import relative_error


class Net(nn.Module):
    """Something of every kind that an adapter may change."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 16)
        self.norm, self.rms = nn.LayerNorm(16), nn.RMSNorm(16)
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 16, bias=False)
        self.gain = nn.Parameter(torch.randn(16))
        self.conv = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.table(tokens))
        x = x + self.second(torch.relu(self.first(x)))
        x = self.rms(x) * self.gain
        return self.conv(x.reshape(-1, 4, x.shape[1], 4)).tanh()


class LowRank(nn.Module):
    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__()
        self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + 0.5 * self.up(self.down(x))
        return y


class Scaled(nn.Module):
    """IA3 on the way in and out."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.inside = nn.Parameter(torch.randn(base.in_features))
        self.outside = nn.Parameter(torch.randn(base.out_features))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x * self.inside) * self.outside
        return y


class Direction(LowRank):
    """As DoRA: a sum of low rank with a scale of its own."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__(base, rank)
        self.length = nn.Parameter(torch.rand(base.out_features))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.up(self.down(x))
        return y * self.length


class Rotated(nn.Module):
    """OFT: nothing of low rank."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.skew = nn.Parameter(torch.randn(base.in_features, base.in_features))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x @ torch.linalg.matrix_exp(self.skew - self.skew.T))
        return y


def low_rank(net: Net) -> None:
    net.first, net.second = LowRank(net.first, 2), LowRank(net.second, 3)


def low_rank_table(net: Net) -> None:
    change = torch.randn(11, 2).double() @ torch.randn(2, 16).double()
    net.table.weight = nn.Parameter(net.table.weight + change)


def low_rank_convolution(net: Net) -> None:
    change = torch.randn(6, 2).double() @ torch.randn(2, 36).double()
    net.conv.weight = nn.Parameter(net.conv.weight + change.reshape(6, 4, 3, 3))


def scales(net: Net) -> None:
    net.first, net.second = Scaled(net.first), Scaled(net.second)


def directions(net: Net) -> None:
    net.first = Direction(net.first, 2)


def rotation(net: Net) -> None:
    net.first = Rotated(net.first)


def norms(net: Net) -> None:
    for one in (net.norm.weight, net.norm.bias, net.rms.weight):
        nn.init.normal_(one)


def gain(net: Net) -> None:
    nn.init.normal_(net.gain)


def biases(net: Net) -> None:
    for one in net.modules():
        if isinstance(one, (nn.Linear, nn.Conv2d)) and one.bias is not None:
            nn.init.normal_(one.bias)


KINDS = [low_rank, low_rank_table, low_rank_convolution, scales, directions, rotation, norms, gain,
         biases]  # fmt: skip


def adapted(base: nn.Module, *changes) -> nn.Module:
    found = copy.deepcopy(base)
    with torch.no_grad():
        for change in changes:
            change(found)
    return found.to(next(base.parameters()).dtype).eval()


def by_row(models: list[nn.Module], ids: Tensor, x: Tensor) -> Tensor:
    """The meaning: every row alone, through the model that it names."""
    return torch.cat([models[int(i) + 1](x[t : t + 1]) for t, i in enumerate(ids)])


def served(models: list[nn.Module], x: Tensor, ids: Tensor):
    fast = graphopt.multi(models[0], models[1:], (x,))
    with torch.no_grad():
        assert relative_error(fast(x, adapter_ids=ids), by_row(models, ids, x)) < 1e-12
    return fast


def net() -> Net:
    torch.manual_seed(0)
    return Net().double().eval()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_choose_among_adapters_of_one_kind(kind) -> None:
    base = net()
    models = [base, adapted(base, kind), adapted(base, kind)]
    served(models, torch.randint(0, 11, (5, 8)), torch.tensor([0, 1, -1, 1, 0]))


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(KINDS), max_size=3, unique=True), min_size=1, max_size=3),
    st.data(),
)
def test_rows_choose_among_adapters_of_any_kinds(changes, data) -> None:
    # What two adapters do need not be alike: one has a rank of two here, the other a bias there.
    base = net()
    models = [base, *(adapted(base, *some) for some in changes)]
    rows = data.draw(st.integers(2, 5))
    ids = data.draw(st.lists(st.integers(-1, len(changes) - 1), min_size=rows, max_size=rows))
    served(models, torch.randint(0, 11, (rows, 8)), torch.tensor(ids))


def test_another_number_of_rows() -> None:
    base = net()
    models = [base, adapted(base, low_rank), adapted(base, scales)]
    fast = served(models, torch.randint(0, 11, (4, 8)), torch.tensor([0, 1, -1, 1]))
    for rows in (1, 2, 7):
        x, ids = torch.randint(0, 11, (rows, 8)), torch.randint(-1, 2, (rows,))
        with torch.no_grad():
            assert relative_error(fast(x, adapter_ids=ids), by_row(models, ids, x)) < 1e-12
    assert (
        fast(torch.zeros(0, 8, dtype=torch.int64), adapter_ids=torch.zeros(0).long()).shape[0] == 0
    )


def test_what_is_shared_is_stored_and_computed_once() -> None:
    # Ten adapters of rank 2: the base's parameters, and ten times what an adapter has.
    base = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    models = [base] + [adapted(base, lambda one: one.__setitem__(0, LowRank(one[0], 2)))] * 10
    fast = graphopt.multi(models[0], models[1:], (torch.randn(4, 64),))
    own = sum(one.numel() for one in base.parameters())
    found = sum(one.numel() for one in fast.parameters())
    assert found <= own + 10 * 2 * (128 + 1) + 11 * 20
    calls = [node for node in fast.graph_module.graph.nodes if "linear" in str(node.target)]
    assert len(calls) == 3  # W and every A side by side, every B, and the other layer


def test_models_may_share_tensors_and_stay_as_they_are() -> None:
    base = net()
    one = copy.deepcopy(base, {id(t): t for t in base.parameters()})
    one.first = LowRank(one.first, 2).double()
    before = {name: value.clone() for name, value in one.state_dict().items()}
    fast = served([base, one], torch.randint(0, 11, (3, 8)), torch.tensor([0, -1, 0]))
    for value in fast.parameters():
        value.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())


def test_rows_inside_a_merged_first_axis() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:  # windows: [batch, 3, 8] -> [batch * 3, 8]
            return self.inner(x.reshape(-1, 8)).tanh().reshape(-1, 3, 8)

    base = Flat().double()
    models = [
        base,
        adapted(base, lambda one: setattr(one, "inner", LowRank(one.inner, 1).double())),
    ]
    served(models, torch.randn(4, 3, 8).double(), torch.tensor([0, -1, 0, 0]))


def test_it_compiles_saves_and_loads(tmp_path) -> None:
    base = net().float()
    models = [base, adapted(base, low_rank)]
    x, ids = torch.randint(0, 11, (3, 8)), torch.tensor([0, -1, 0])
    fast = graphopt.multi(models[0], models[1:], (x,))
    fast.save(tmp_path / "multi")
    loaded = graphopt.load(tmp_path / "multi")
    assert torch.equal(loaded(x, adapter_ids=ids), fast(x, adapter_ids=ids))


# -- what is refused ------------------------------------------------------------------------------


def test_a_model_that_is_no_variant() -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    other = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    with pytest.raises(graphopt.NotAVariant, match="1: found Gelu, expected Relu"):
        graphopt.multi(base, [other], (torch.randn(2, 4),))


def test_a_nonlinear_adapter_is_named() -> None:
    class Bottleneck(LowRank):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.base(x) + self.up(torch.relu(self.down(x)))
            return y

    base = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    other = nn.Sequential(Bottleneck(base[0], 1), nn.Tanh())
    with pytest.raises(graphopt.NotAVariant, match="found Add, expected Linear"):
        graphopt.multi(base, [other], (torch.randn(2, 4),))


def test_a_convolution_of_another_rank_is_refused() -> None:
    base = nn.Conv2d(8, 8, 3, groups=8)
    with pytest.raises(graphopt.NotAVariant, match="Conv with another"):
        graphopt.multi(base, [adapted(base, lambda one: nn.init.normal_(one.weight))],
                       (torch.randn(2, 8, 5, 5),))  # fmt: skip


def test_rows_that_mix_are_refused() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.transpose(0, 1)).tanh().transpose(0, 1)

    base = Mixed()
    other = adapted(base, lambda one: nn.init.normal_(one.inner.bias))
    with pytest.raises(graphopt.NotAVariant, match="the first axis does not run over rows"):
        graphopt.multi(base, [other], (torch.randn(3, 4, 8),))


def test_an_unknown_adapter_raises() -> None:
    base = nn.Linear(4, 4)
    fast = graphopt.multi(base, [adapted(base, lambda one: nn.init.normal_(one.bias))],
                          (torch.randn(2, 4),))  # fmt: skip
    for wrong in (1, -2):
        with pytest.raises(IndexError):
            fast(torch.randn(2, 4), adapter_ids=torch.tensor([0, wrong]))
    with pytest.raises(graphopt.InputError, match="adapter_ids is missing"):
        fast(torch.randn(2, 4))


def test_no_adapters_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one model"):
        graphopt.multi(nn.Linear(2, 2), [], (torch.randn(2, 2),))
