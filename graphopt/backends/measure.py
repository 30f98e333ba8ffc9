"""How long callables take beside one another on a machine that does other things too.

Rounds are interleaved and their order rotates, so that a slow minute slows everyone; a round repeats short
calls until it is well above the noise of the timer; medians over rounds decide. Where there are several
threads, every runtime has its own, and they wait for more work busily before they go to sleep: a call right
after one of another runtime would share the processors with them.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Clock = Callable[[], float]

ROUND_SECONDS = 0.002  # at least, unless that takes MOST_CALLS
MOST_CALLS = 1000
FEWEST, MOST = 3, 15  # rounds
SLOWER = 1.3  # best round over the leader's median: out
ASLEEP = 0.05  # seconds until the threads of another runtime wait idly
STABLE = 3  # rounds with the same leader, apart from all others


@dataclasses.dataclass
class Timing:
    """Seconds per call, one figure a round."""

    rounds: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.rounds) < 2:
            return self.rounds[0], self.rounds[0]
        low, _, high = statistics.quantiles(self.rounds, n=4, method="inclusive")
        return low, high

    @property
    def spread(self) -> float:
        """The interquartile range over the median."""
        low, high = self.quartiles
        return (high - low) / self.median if self.median else 0.0


def settle(call: Callable[[], Any]) -> None:
    """Make ready for timing `call` after another one."""
    if torch.get_num_threads() > 1:
        time.sleep(ASLEEP)
        call()


def measure(
    calls: Mapping[str, Callable[[], Any]], seconds: float, clock: Clock = time.perf_counter,
    race: bool = True,
) -> dict[str, Timing]:  # fmt: skip
    """The timing of every callable; all have one round at least, and no round starts that would go
    beyond `seconds`.

    A callable whose best round takes more than `SLOWER` times the leader's median has no further ones.
    Measuring ends when one is left, when the order is stable, or after `MOST` rounds. Without `race` all
    go on to the end, which is the time or `MOST` rounds.
    """
    start = clock()
    timings = {name: Timing() for name in calls}
    repeats = {}
    for name, call in calls.items():  # warm-up
        before = clock()
        call()
        repeats[name] = _repeats(clock() - before)
    names, leaders = list(calls), []
    for number in range(MOST):
        began = clock()
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            settle(calls[name])
            before = clock()
            for _ in range(repeats[name]):
                calls[name]()
            timings[name].rounds.append((clock() - before) / repeats[name])
        spent = clock() - began
        leader = min(names, key=lambda one: timings[one].median)
        leaders.append(leader)
        limit = SLOWER * timings[leader].median
        if number > 0 and race:
            names = [one for one in names if min(timings[one].rounds) <= limit]
        over = clock() - start + spent > seconds
        if over or (race and (len(names) == 1 or _stable(leaders, names, timings))):
            break
    return timings


def _repeats(seconds: float) -> int:
    if seconds <= 0:
        return MOST_CALLS
    return min(MOST_CALLS, max(1, math.ceil(ROUND_SECONDS / seconds)))


def _stable(leaders: list[str], names: list[str], timings: Mapping[str, Timing]) -> bool:
    """Whether the same callable has led for some rounds and the quartiles of no other touch its own."""
    leader = leaders[-1]
    if len(leaders) < max(FEWEST, STABLE) or set(leaders[-STABLE:]) != {leader}:
        return False
    _, high = timings[leader].quartiles
    return all(timings[one].quartiles[0] > high for one in names if one != leader)
