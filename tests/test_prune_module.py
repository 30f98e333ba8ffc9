"""prune_module(): a pruned model as modules of the classes it came from."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from tests.helpers import Net, prepare

IMAGE = torch.randn(2, 3, 12, 12).double()


def convolutions() -> nn.Module:
    return Net(
        lambda m, x: m.last(
            m.up(m.group(F.relu(m.depth(m.norm(m.first(x)))) + m.skip(x))).mean((2, 3))
        ),
        first=nn.Conv2d(3, 8, 3, padding=1), norm=nn.BatchNorm2d(8),
        depth=nn.Conv2d(8, 8, 3, padding=1, groups=8), skip=nn.Conv2d(3, 8, 1),
        group=nn.Conv2d(8, 12, 3, groups=2), up=nn.ConvTranspose2d(12, 6, 2),
        last=nn.Linear(6, 5),
    )  # fmt: skip


def norms() -> nn.Module:
    return Net(
        lambda m, x: m.last(m.slope(m.layer(m.each(m.group(m.first(x))).mean((2, 3))))),
        first=nn.Conv2d(3, 8, 3), group=nn.GroupNorm(2, 8), each=nn.GroupNorm(8, 8),
        layer=nn.LayerNorm(8), slope=nn.PReLU(8), last=nn.Linear(8, 5),
    )  # fmt: skip


def recurrent() -> nn.Module:
    return Net(
        lambda m, x: m.last(m.unit(m.first(x.flatten(2)))[0][:, -1]),
        first=nn.Linear(144, 8), unit=nn.LSTM(8, 6, batch_first=True), last=nn.Linear(6, 5),
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": convolutions, "norms": norms, "recurrent": recurrent,
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_pruned_graph_as_modules(name: str) -> None:
    model = prepare(MODELS[name]())
    x = IMAGE
    before = copy.deepcopy(model.state_dict())
    small = graphopt.prune_module(model, x, importance="random")
    graph = graphopt.optimize(model, (x,), passes="prune{importance=random}")
    torch.testing.assert_close(small(x), graph(x), rtol=1e-10, atol=1e-10)
    assert type(small) is type(model)
    assert sum(one.numel() for one in small.parameters()) < 0.6 * sum(
        one.numel() for one in model.parameters()
    )
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_what_reconstruction_changes_is_taken_over() -> None:
    """Weights and statistics of sizes that stay, too."""
    model = prepare(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False),
                      nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 64, 5))
    )  # fmt: skip
    data = [((torch.randn_like(IMAGE),), None)]
    options = {"protect": "5.*", "reconstruct": "least-squares", "data": data}
    small = graphopt.prune_module(model, IMAGE, **options)
    plain = graphopt.prune_module(model, IMAGE, protect="5.*")
    assert small[3].running_mean.shape == (4,)  # type: ignore[union-attr]
    x = data[0][0][0]
    assert (small(x) - model(x)).norm() < (plain(x) - model(x)).norm()


def test_layers_tell_their_new_sizes() -> None:
    small = graphopt.prune_module(prepare(convolutions()), IMAGE, importance="random")
    assert (small.first.out_channels, small.norm.num_features) == (4, 4)
    assert (small.depth.in_channels, small.depth.out_channels, small.depth.groups) == (4, 4, 4)
    assert (small.group.in_channels, small.group.out_channels, small.group.groups) == (4, 6, 2)
    assert (small.up.in_channels, small.up.out_channels) == (6, 3)
    assert (small.last.in_features, small.last.out_features) == (3, 5)


def test_it_trains() -> None:
    small = graphopt.prune_module(prepare(convolutions()).train(False), IMAGE)
    small.train()
    small(IMAGE).sum().backward()
    assert all(one.grad is not None for one in small.parameters())


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
            self.third, self.last = nn.Linear(8, 8), nn.Linear(8, 5)
            self.third.weight = self.second.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            out: Tensor = self.last(x + self.second(x).tanh() + self.third(x))
            return out

    small = graphopt.prune_module(prepare(Tied()), torch.randn(2, 6).double())
    assert small.third.weight is small.second.weight
    assert small.second.weight.shape == (4, 4)


def test_sizes_in_the_code_are_a_reason() -> None:
    model = Net(lambda m, x: m.last(m.first(x.flatten(1)).view(-1, 4, 4).flatten(1)),
                first=nn.Linear(432, 16), last=nn.Linear(16, 5))  # fmt: skip
    with pytest.raises(graphopt.NotExpressible, match="has a size of its own"):
        graphopt.prune_module(prepare(model), IMAGE)


def test_nothing_to_prune_is_a_reason() -> None:
    with pytest.raises(graphopt.NotExpressible, match="no channels may go"):
        graphopt.prune_module(nn.Linear(4, 5).eval(), torch.randn(2, 4))
