"""The specification of the budgets, scopes and protection of `prune`.

What is left is counted by torch's own counter of FLOPs, by formulas of the widths, or by trying all
allocations.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import graphopt
from graphopt.ir.channels import Groups, meters
from graphopt.ir.channels.remove import remove
from graphopt.ir.cost import cost
from graphopt.ir.graph import Graph
from graphopt.passes.prune import Prune
from graphopt.passes.pruning import budget, evidence, latency, ranking
from graphopt.passes.pruning.evidence import Evidence
from graphopt.passes.pruning.importance import l2, random
from tests.helpers import Net, prepare
from tests.passes.test_prune import IMAGE, IMAGES, SEQUENCES, TOKENS

ALLOCATIONS = ("uniform", "milp")


def chain(*widths: int, seed: int = 0) -> nn.Module:
    """Convolutions from 3 channels through these widths to 5, with channels of unlike importance."""
    torch.manual_seed(seed)
    sizes = [3, *widths, 5]
    convs = [nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in itertools.pairwise(sizes)]
    with torch.no_grad():
        for one in convs:
            one.weight *= torch.rand(one.out_channels, 1, 1, 1) ** 2
    return nn.Sequential(*convs).double().eval()


def residual() -> nn.Module:
    """Two blocks, a wider one, and a last map; convolutions and sums only."""
    torch.manual_seed(1)
    return (
        Net(
            lambda m, x: m.last(m.b(m.a(y := m.first(x))) + m.d(m.c(y)) + y),
            first=nn.Conv2d(3, 32, 3, padding=1),
            a=nn.Conv2d(32, 48, 3, padding=1), b=nn.Conv2d(48, 32, 1),
            c=nn.Conv2d(32, 64, 1), d=nn.Conv2d(64, 32, 3, padding=1),
            last=nn.Conv2d(32, 5, 1),
        ).double().eval()
    )  # fmt: skip


def transformer() -> nn.Module:
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True, norm_first=True)
    return nn.Sequential(nn.Linear(8, 32), layer, nn.Linear(32, 5)).double().eval()


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (residual, (2, 3, 8, 8)),
    "transformer": (transformer, (2, 6, 8)),
}


def counted(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:  # with gradients: no fused layers
        model(x)
    return counter.get_total_flops()


def elements(model: nn.Module) -> int:
    return sum(one.numel() for one in model.parameters())


def pruned(model: nn.Module, x: Tensor, options: str) -> graphopt.OptimizedModule:
    fast = graphopt.optimize(model, (x,), passes=f"prune{{{options}}}")
    assert fast.report.rolled_back == []
    assert fast.report.check is not None and fast.report.check.ok
    return fast


def ranked(model: nn.Module, x: Tensor, judge: Any = l2, **options: Any) -> ranking.Ranked:
    groups = graphopt.channel_groups(model, (x,))
    return ranking.rank(groups, judge(Evidence(groups)), **options)


def names(one: ranking.Ranked) -> list[str]:
    """The first parameter of every family."""
    first = {group.label: group.members[0].name for group in one.groups.groups()}
    return [first[int(labels[0])] for labels in one.families]


# -- budgets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("net", NETS)
def test_flops_stay_within_their_budget(net: str, allocation: str) -> None:
    make, shape = NETS[net]
    model, x = make(), torch.randn(shape).double()
    fast = pruned(model, x, f"target_flops=0.5,allocation={allocation}")
    # torch counts products only, we also the sums of a norm or an activation: 2% of a small net.
    assert 0.45 < counted(fast, x) / counted(model, x) < 0.51
    before, after = fast.report.before, fast.report.after
    assert 0.45 < after.flops / before.flops <= 0.5


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_parameters_stay_within_their_budget(allocation: str) -> None:
    model, x = transformer(), torch.randn(2, 6, 8).double()
    fast = pruned(model, x, f"target_params=0.4,allocation={allocation}")
    assert 0.36 < elements(fast) / elements(model) <= 0.4


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_all_of_several_budgets_are_met(allocation: str) -> None:
    model, x = residual(), torch.randn(2, 3, 8, 8).double()
    fast = pruned(model, x, f"target_flops=0.6,target_params=0.3,allocation={allocation}")
    assert counted(fast, x) <= 0.6 * counted(model, x)
    assert 0.27 < elements(fast) / elements(model) <= 0.3


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_multiples_within_a_budget(allocation: str) -> None:
    model, x = residual(), torch.randn(2, 3, 8, 8).double()
    fast = pruned(model, x, f"target_flops=0.5,round_to=8,allocation={allocation}")
    assert counted(fast, x) <= 0.5 * counted(model, x)
    state = fast.state_dict()
    assert all(state[f"{one}.weight"].shape[0] % 8 == 0 for one in "abcd")


def test_the_smallest_ratio_is_taken_and_the_rest_of_the_budget_used() -> None:
    model, x = chain(20, 20), torch.randn(2, 3, 4, 4).double()
    fast = pruned(model, x, "target_flops=0.5")

    def flops(a: int, b: int) -> int:
        return 3 * a + a * b + 5 * b

    limit = 0.5 * flops(20, 20)
    most = max(width for width in range(20) if flops(width, width) <= limit)
    a, b, out = (one.shape[0] for one in fast.state_dict().values())
    assert out == 5
    assert most <= min(a, b) <= max(a, b) <= most + 1
    assert flops(a, b) <= limit < min(flops(a + 1, b), flops(a, b + 1))


@pytest.mark.parametrize(("widths", "seed"), [((8, 8, 8), 2), ((6, 16, 10), 0), ((5, 12), 3)])
def test_milp_is_near_the_best_of_all_allocations(widths: tuple[int, ...], seed: int) -> None:
    one = ranked(chain(*widths, seed=seed), torch.randn(2, 3, 4, 4).double())
    order = [names(one).index(f"{layer}.weight") for layer in range(len(widths))]

    def flops(stay: Any) -> int:
        return sum(a * b for a, b in itertools.pairwise([3, *stay, 5]))

    def kept(stay: Any) -> float:
        scores = [np.sort(one.scores[one.families[family]])[::-1] for family in order]
        parts = [
            found[:count].sum() / found.sum() for found, count in zip(scores, stay, strict=True)
        ]
        return float(np.prod(parts))

    limit = 0.5 * flops(widths)
    choices = itertools.product(*(range(1, width + 1) for width in widths))
    best = max(kept(stay) for stay in choices if flops(stay) <= limit)
    uniform, milp = (
        budget.allocate(one, {"target_flops": 0.5}, how, ())[order] for how in ALLOCATIONS
    )
    assert flops(milp) <= limit
    assert kept(uniform) <= kept(milp) <= best + 1e-9
    assert kept(milp) >= 0.93 * best


def test_milp_takes_what_costs_much_but_empties_no_family() -> None:
    """Equal scores: most goes of the family whose channels cost most, down to `max_ratio`."""
    model, x = chain(16, 16, 64), torch.randn(2, 3, 4, 4).double()

    def equal(evidence: Evidence) -> Any:
        return np.ones(evidence.groups.trace.coupling.count)

    def milp(**options: Any) -> dict[str, int]:
        one = ranked(model, x, equal, scope="global", **options)
        stay = budget.allocate(one, {"target_flops": 0.5}, "milp", ())
        return dict(zip(names(one), stay.tolist(), strict=True))

    # Of 3*16 + 16*16 + 16*64 + 64*5 products, a channel of the second is in 80, of the last in 21.
    free = milp()
    assert free == {"0.weight": 16, "1.weight": 10, "2.weight": 41}  # the best of all
    assert milp(max_ratio=0.36)["1.weight"] == 11
    assert all(count % 6 == 0 or count in (16, 64) for count in milp(round_to=6).values())


@pytest.mark.parametrize("name", [
    "depthwise, two each", "groups", "wide groups", "transposed, wide groups", "joined", "shuffled",
    "pixels shuffled", "shared", "group norm", "parameter", "attention", "fused attention", "einsum", "tied",
])  # fmt: skip
def test_what_is_foreseen_is_what_is_left(name: str) -> None:
    model, shape = (IMAGES[name](), IMAGE) if name in IMAGES else (SEQUENCES[name](), TOKENS)
    one = ranked(model, torch.randn(shape).double(), random)
    counted_by = meters.flops(one.groups), meters.parameters(one.groups)
    for ratio in (0.0, 0.3, 0.7):
        gone = one.gone(one.at(ratio))
        left = cost(remove(one.groups, gone))
        found = [meter.of(one.lost(gone)) for meter in counted_by]
        np.testing.assert_allclose(found, [left.flops, left.parameters], rtol=1e-12)
    full = cost(one.groups.graph).flops
    for family in one.groups.families():
        alone = cost(remove(one.groups, {family[0].label})).flops
        np.testing.assert_allclose(family[0].flops, full - alone, atol=1e-9 * full)


# -- scopes -----------------------------------------------------------------------------------------


def blocks() -> ranking.Ranked:
    """Hidden channels of three blocks: those of the first are all less important than those of the
    second, which is like it; half of those of the third, which has a norm, hardly matter."""
    return ranked(_blocks(), torch.randn(2, 6).double(), scope="local")


def _blocks() -> nn.Module:
    torch.manual_seed(3)
    model = prepare(
        Net(
            lambda m, x: m.b(m.a(x).relu()) + m.d(m.c(x).relu()) + m.f(m.norm(m.e(x)).relu()),
            a=nn.Linear(6, 8), b=nn.Linear(8, 4), c=nn.Linear(6, 8), d=nn.Linear(8, 4),
            e=nn.Linear(6, 16), norm=nn.BatchNorm1d(16), f=nn.Linear(16, 4),
        )
    )  # fmt: skip
    with torch.no_grad():
        rows = 1 + 0.1 * torch.rand(8, 6)
        for into, out, scale in (("a", "b", 1.0), ("c", "d", 10.0)):
            getattr(model, into).weight.copy_(scale * rows)
            getattr(model, into).bias.zero_()
            getattr(model, out).weight.zero_()
        for one in (model.e.weight, model.e.bias, model.norm.weight, model.norm.bias):
            one[8:] *= 1e-3
        model.f.weight[:, 8:] *= 1e-3
        for one in (model.norm.running_mean, model.norm.running_var):
            one.fill_(1.0)
    return model


@pytest.mark.parametrize(("scope", "ratio", "gone"), [
    ("local", 0.5, {"a": 4, "c": 4, "e": 8}),
    # the first block, but for one channel, before any of the second
    ("isomorphic", 0.5, {"a": 7, "c": 1, "e": 8}),
    ("isomorphic", 0.25, {"a": 4, "c": 0, "e": 4}),
    # in units of the mean of the family: what hardly matters in the third
    ("global", 0.25, {"a": 0, "c": 0, "e": 8}),
    ("global", 0.5, {"a": 4, "c": 4, "e": 8}),
])  # fmt: skip
def test_scopes(scope: str, ratio: float, gone: dict[str, int]) -> None:
    model = _blocks()
    fast = pruned(model, torch.randn(2, 6).double(), f"scope={scope},ratio={ratio}")
    after, before = fast.state_dict(), model.state_dict()
    found = {one: len(before[f"{one}.bias"]) - len(after[f"{one}.bias"]) for one in gone}
    assert found == gone


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("scope", ranking.SCOPES)
def test_budgets_in_every_scope(scope: str, allocation: str) -> None:
    one = ranked(residual(), torch.randn(2, 3, 8, 8).double(), scope=scope)
    gone = one.gone(budget.allocate(one, {"target_flops": 0.4}, allocation, ()))
    assert 0.36 < cost(remove(one.groups, gone)).flops / cost(one.groups.graph).flops <= 0.4


# -- protection -------------------------------------------------------------------------------------


@pytest.mark.parametrize("protect", ["a.*;b.bias", "a.*|last.weight", ("a.weight", "first.*")])
def test_protected_families_are_left_alone(protect: Any) -> None:
    model, x = residual(), torch.randn(2, 3, 8, 8).double()
    fast = graphopt.optimize(model, (x,), passes=[Prune(protect=protect, ratio=0.5)])
    found = {
        name: one.shape[0] for name, one in fast.state_dict().items() if name.endswith("weight")
    }
    assert found == {"first.weight": 32, "a.weight": 48, "b.weight": 32,
                     "c.weight": 32, "d.weight": 32, "last.weight": 5}  # fmt: skip


def test_a_tied_name_protects() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.again, self.down = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)
            self.again.weight = self.up.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(self.again(self.down(self.up(x))))
            return y

    x = torch.randn(2, 4)
    free = pruned(Tied().eval(), x, "ratio=0.5")
    kept = pruned(Tied().eval(), x, "ratio=0.5,protect=again.weight")
    assert elements(free) < elements(kept) == elements(Tied())


def test_a_pattern_without_a_match_names_the_nearest() -> None:
    with pytest.raises(graphopt.PassError, match=r"'lats\.\*' matches no parameter; .* last\.\w+"):
        pruned(residual(), torch.randn(2, 3, 8, 8).double(), "protect=lats.*")


def test_protection_is_text_that_round_trips() -> None:
    made = Prune(protect=["head.*", "stem.*"], target_flops=0.5)
    (stage,) = graphopt.Pipeline([made])
    assert stage.text == "prune{protect=head.*;stem.*,target_flops=0.5}"
    (again,) = graphopt.Pipeline(stage.text)
    assert again.run == made


# -- what cannot be ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "reason"), [
    ("ratio=0.5,target_flops=0.5", "ratio and target_flops are given"),
    ("target_params=1.5", "target_params is 1.5, expected 0 < target_params < 1"),
    ("target_latency=0.0", "target_latency is 0.0, expected"),
    ("allocation=best,target_flops=0.5", "allocation is 'best', expected one of uniform, milp"),
    ("allocation=milp", "allocation is milp, expected a target"),
    ("max_ratio=0.0", "max_ratio is 0.0, expected"),
])  # fmt: skip
def test_options_are_checked(options: str, reason: str) -> None:
    with pytest.raises(graphopt.PassError, match=reason):
        graphopt.Pipeline(f"prune{{{options}}}")


@pytest.mark.parametrize("options", ["protect=*.weight", "max_ratio=0.1", "round_to=32"])
def test_a_budget_out_of_reach_is_an_error(options: str) -> None:
    with pytest.raises(graphopt.PassError, match="target_flops cannot be met"):
        pruned(residual(), torch.randn(2, 3, 8, 8).double(), f"target_flops=0.1,{options}")


# -- seconds ----------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """A machine on which a graph takes 0.3 of the source's time for itself, whatever is in it, and every
    op the rest in proportion to its FLOPs. Returns the shapes of the inputs it ran on."""
    seen: list[list[int]] = []

    def runner(graph: Graph, inputs: Any) -> Graph:
        seen.append(list(inputs[0].shape))
        return graph

    def compared(source: Graph, other: Graph) -> float:
        return 0.3 + 0.7 * cost(other).flops / cost(source).flops

    def measured(graphs: list[Graph], parts: list[str], inputs: Any) -> Any:
        found = []
        for graph in graphs:
            meter = meters.flops(Groups(graph))
            flops = {node.meta["part"]: 0.0 for node in graph.calls}
            convs = [node for node in graph.calls if "conv" in node.meta["part"]]
            flops |= zip([one.meta["part"] for one in convs], meter.full[: len(convs)], strict=True)
            found.append([flops[part] for part in parts])
        return np.array(found)

    monkeypatch.setattr(budget, "runner", runner)
    monkeypatch.setattr(budget, "compared", compared)
    monkeypatch.setattr(latency, "_measured", measured)
    return seen


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_the_time_of_ops_is_corrected_by_that_of_the_whole(
    machine: list[list[int]], allocation: str
) -> None:
    model, x = chain(24, 32, 24), torch.randn(2, 3, 8, 8).double()
    fast = pruned(model, x, f"target_latency=0.6,allocation={allocation}")
    # 0.6 = 0.3 + 0.7 * 0.43; ops alone would say 0.6 of all FLOPs.
    assert 0.9 * 0.6 <= 0.3 + 0.7 * counted(fast, x) / counted(model, x) <= 0.6
    assert len(machine) > 2


def test_a_latency_out_of_reach_is_an_error(machine: list[list[int]]) -> None:
    with pytest.raises(graphopt.PassError, match=r"target_latency is 0.2, but 0.3\d is the least"):
        pruned(chain(24, 32, 24), torch.randn(2, 3, 8, 8).double(), "target_latency=0.2")


def test_the_time_is_that_of_the_first_batch_of_data(machine: list[list[int]]) -> None:
    data = [(torch.randn(1, 3, 8, 8).double(), None)]
    chosen = Prune(target_latency=0.6, data=data)
    graphopt.optimize(chain(24, 32, 24), (torch.randn(4, 3, 8, 8).double(),), passes=[chosen])
    assert set(map(tuple, machine)) == {(1, 3, 8, 8)}


def test_data_that_the_model_is_not_called_with_is_an_error() -> None:
    x = torch.randn(2, 3, 8, 8).double()
    with pytest.raises(graphopt.PassError, match=r"data\[0\]: expected inputs of the form"):
        graphopt.optimize(chain(4), (x,), passes=[Prune(target_latency=0.6, data=[((x, x), None)])])


def test_a_comparison_is_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SECONDS", 0.8)
    found = latency.compared(lambda: time.sleep(0.02), lambda: time.sleep(0.01))
    assert 0.4 < found < 0.7


def test_times_of_ops_add_up_to_that_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SECONDS", 1.0)
    one = ranked(chain(64, 96), torch.randn(2, 3, 32, 32).double())
    inputs = evidence.example(one.groups.graph)
    meter = latency.latency(one, inputs)
    full, half = (meter.of(one.lost(one.gone(one.at(ratio)))) for ratio in (0.0, 0.5))
    run = latency.runner(one.groups.graph, inputs)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    assert 1 / 3 < full / float(np.median(times)) < 3
    assert half < full


def test_measuring_writes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 3)).train()
    one = ranked(model, torch.randn(2, 3, 8, 8))
    mean = one.groups.graph.states["1.running_mean"].tensor
    before = mean.clone()
    latency.runner(one.groups.graph, [torch.randn(2, 3, 8, 8) + 5])()
    assert torch.equal(mean, before)
