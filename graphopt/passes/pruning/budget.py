"""How many groups of every family stay: at a ratio, or within budgets.

A budget is a fraction of what the source costs, in FLOPs, parameters or seconds. The groups of a family
go in the order of their importance, so an allocation is one number for each family. It is

    uniform   the one with the smallest ratio that keeps to the budgets, with what there is room for, or
    milp      max prod_f S_f(k_f)  subject to  C(k) <= limit,  k_f groups of family f staying,

with S_f the part of the importance of f that stays, since what one layer loses the next cannot give
back: a sum over families would empty the expensive ones. In logarithms it is a knapsack with a choice of
levels for every family (as in HALP, arXiv 2110.10811, whose worth is a sum). C is no sum over
families, since a layer costs the product of two widths: around an allocation it is taken for
C(k) + sum_f (C(k with k_f changed) - C(k)). What comes out is counted anew; where it exceeds the
budgets, less room is left and the programme solved again, and at last over levels nearer to k.

Seconds are measured op by op at some ratios, and interpolated between these; what comes out is measured
as a whole beside the source, and the budget corrected until that meets the target.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.optimize
import scipy.sparse

from graphopt.ir.channels.labels import Vector
from graphopt.ir.channels.meters import Floats, Meter, flops, parameters
from graphopt.ir.channels.remove import remove
from graphopt.passes.base import PassError
from graphopt.passes.pruning.latency import compared, latency, runner
from graphopt.passes.pruning.ranking import Ranked

ALLOCATIONS = ("uniform", "milp")
TARGETS = ("target_flops", "target_params", "target_latency")
LEVELS = 9  # of every family to choose from at a time
ROUNDS = 60
CORRECTIONS = 4  # of the room that is left, in every round
CLOSE = 2e-3  # to the budget, from below: good enough
GAP = 3e-3  # to the best choice of levels


@dataclasses.dataclass(frozen=True)
class Budget:
    """What an allocation may cost at most; `name` is for messages."""

    name: str
    meter: Meter
    limit: float


def allocate(
    ranked: Ranked, targets: Mapping[str, float], allocation: str, inputs: Sequence[Any]
) -> Vector:
    """An allocation that keeps to all targets, parts of what the source costs; time is that of runs on
    these (flat) inputs.

    Raises:
        PassError: for a target that is not met even with all gone that may go.
    """
    budgets = []
    for name, count in (("target_flops", flops), ("target_params", parameters)):
        if name in targets:
            meter = count(ranked.groups)
            budgets.append(Budget(name, meter, targets[name] * meter.of(ranked.lost(()))))
    if "target_latency" in targets:
        return _allocate_latency(ranked, targets["target_latency"], budgets, allocation, inputs)
    return _allocate(ranked, budgets, allocation)


def _allocate(ranked: Ranked, budgets: Sequence[Budget], allocation: str) -> Vector:
    stay = _uniform(ranked, budgets)
    return _milp(ranked, budgets, stay) if allocation == "milp" else stay


def _over(ranked: Ranked, budgets: Sequence[Budget], stay: Vector) -> Floats:
    """By how much an allocation exceeds each budget, in units of its limit."""
    lost = ranked.lost(ranked.gone(stay))
    return np.array([one.meter.of(lost) / one.limit - 1 for one in budgets])


def _uniform(ranked: Ranked, budgets: Sequence[Budget]) -> Vector:
    over = _over(ranked, budgets, ranked.at(1.0))
    if over.max() > 0:
        name, least = budgets[int(over.argmax())].name, 1 + over.max()
        raise PassError(f"prune: {name} cannot be met: {least:.3g} of it has to stay")
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        if _over(ranked, budgets, ranked.at(middle)).max() > 0:
            low = middle
        else:
            high = middle
    return _filled(ranked, budgets, ranked.at(high))


def _filled(ranked: Ranked, budgets: Sequence[Budget], stay: Vector) -> Vector:
    """What is left of the budgets is used: of every family the best of what went comes back, the
    most important first, where there is room for it. Families stay within one step of the ratio."""

    def worth(family: int) -> float:
        labels = ranked.families[family]
        first = len(labels) - stay[family] - 1
        return float(ranked.scores[labels[first]])

    for family in sorted(np.flatnonzero(stay < ranked.sizes).tolist(), key=worth, reverse=True):
        more = stay.copy()
        more[family] = min(stay[family] + ranked.round_to, ranked.sizes[family])
        if _over(ranked, budgets, more).max() <= 0:
            stay = more
    return stay


def _milp(ranked: Ranked, budgets: Sequence[Budget], stay: Vector) -> Vector:
    """The best allocation found from `stay` on, which keeps to the budgets."""
    touched = [[one.meter.axes.with_any(labels) for labels in ranked.families] for one in budgets]
    radius = 1.0
    for _ in range(ROUNDS):
        if radius * ranked.sizes.max() < ranked.round_to:
            break
        new = _step(ranked, budgets, stay, radius, touched)
        if (new == stay).all():
            radius /= 2
        stay = new
    return stay


def _step(
    ranked: Ranked, budgets: Sequence[Budget], stay: Vector, radius: float,
    touched: list[list[list[int]]],
) -> Vector:  # fmt: skip
    """The best allocation near to `stay`, or `stay` itself.

    What sums of costs leave out is taken from the room that is left, and the programme solved again.
    """
    levels = [
        _levels(np.append(np.arange(least, size, ranked.round_to), size), now, radius * size)
        for least, size, now in zip(ranked.least, ranked.sizes, stay, strict=True)
    ]
    costs = [
        _costs(ranked, one, stay, levels, near) for one, near in zip(budgets, touched, strict=True)
    ]
    worth = [shares[some] for shares, some in zip(ranked.shares, levels, strict=True)]
    best, room = stay, -_over(ranked, budgets, stay)
    for _ in range(CORRECTIONS):
        new = _choose(levels, worth, costs, room)
        if new is None:
            break
        over = _over(ranked, budgets, new)
        if over.max() <= 0 and ranked.importance(new) > ranked.importance(best):
            best = new
        if -CLOSE <= over.max() <= 0:
            break
        room = room - over
    return best


def _levels(able: Vector, now: int, radius: float) -> Vector:
    """Some of these numbers of groups, not further than `radius` from now."""
    near = able[np.abs(able - now) <= radius]
    few = near[np.linspace(0, len(near) - 1, min(LEVELS, len(near))).round().astype(int)]
    return np.unique(np.append(few, now))


def _costs(
    ranked: Ranked, budget: Budget, stay: Vector, levels: list[Vector], touched: list[list[int]]
) -> Floats:
    """What it adds to change one family to each of its levels, one after the other, in units of the
    limit."""
    axes = budget.meter.axes
    lost = ranked.lost(ranked.gone(stay))
    logs = axes.logs(lost, range(len(axes.layers)))
    found = []
    for labels, some, numbers in zip(ranked.families, levels, touched, strict=True):
        rows, changed = lost.repeat(len(some), 0), logs.repeat(len(some), 0)
        rows[:, labels] = np.arange(len(labels)) < (len(labels) - some)[:, None]
        changed[:, numbers] = axes.logs(rows, numbers)
        found.append(budget.meter.total(changed))
    added: Floats = (np.concatenate(found) - budget.meter.total(logs)) / budget.limit
    return added


def _choose(
    levels: list[Vector], worth: list[Floats], costs: list[Floats], room: Floats
) -> Vector | None:
    """One level for each family: the most worth for costs that are sums; None if none was found."""
    one_each = scipy.sparse.block_diag([np.ones((1, len(some))) for some in levels])
    result = scipy.optimize.milp(
        -np.concatenate(worth),
        integrality=1,
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=[
            scipy.optimize.LinearConstraint(one_each, 1, 1),
            scipy.optimize.LinearConstraint(np.stack(costs), ub=room),
        ],
        options={"mip_rel_gap": GAP},
    )
    if result.x is None:
        return None
    parts = np.split(result.x, np.cumsum([len(some) for some in levels])[:-1])
    return np.array([some[one.argmax()] for some, one in zip(levels, parts, strict=True)])


# -- seconds ----------------------------------------------------------------------------------------

AIM = 0.96  # of the target, which is not to be exceeded
TRIALS = 6


def _allocate_latency(
    ranked: Ranked, target: float, budgets: Sequence[Budget], allocation: str, inputs: Sequence[Any]
) -> Vector:
    """An allocation whose graph takes `target` of the source's time on these inputs, or up to 10% less.

    Raises:
        PassError: if nothing was found that takes at most 10% more.
    """
    meter = latency(ranked, inputs)
    full, least = (meter.of(ranked.lost(ranked.gone(ranked.at(ratio)))) for ratio in (0.0, 1.0))
    source = runner(ranked.groups.graph, inputs)
    tried = [(1.0, 1.0, ranked.sizes)]  # share of the seconds of all ops, of those measured
    share = target
    for _ in range(TRIALS):
        share = max(share, least / full * 1.001)
        limit = Budget("target_latency", meter, share * full)
        stay = _allocate(ranked, [*budgets, limit], allocation)
        pruned = runner(remove(ranked.groups, ranked.gone(stay)), inputs)
        tried.append((share, compared(source, pruned), stay))
        if 0.9 * target <= tried[-1][1] <= target:
            return stay
        share = _next_share(tried, AIM * target)
    _, measured, stay = min(tried, key=lambda one: (one[1] > target, abs(one[1] - target)))
    if measured > 1.1 * target:
        raise PassError(
            f"prune: target_latency is {target}, but {measured:.2f} is the least that was measured"
        )
    return stay


def _next_share(tried: list[tuple[float, float, Vector]], aim: float) -> float:
    """Where the line through the last two trials meets the aim; not far from the last."""
    (x0, y0, _), (x1, y1, _) = tried[-2:]
    slope = (y1 - y0) / (x1 - x0) if x1 != x0 else 0.0
    new = x1 + (aim - y1) / slope if slope > 0.2 else x1 * aim / y1
    return float(np.clip(new, 0.5 * x1, min(2 * x1, 1.0)))
