"""The choices of one run through a rewrite."""

from __future__ import annotations

import random


class Choices:
    """A path through a tree of choices, depth first."""

    def __init__(self) -> None:
        self._path: list[list[int]] = []
        self._at = 0

    def take(self, count: int) -> int:
        if self._at == len(self._path):
            self._path.append([0, count])
        taken, _ = self._path[self._at]
        self._at += 1
        return taken

    def next(self) -> bool:
        """Go to the next path; False after the last."""
        self._at = 0
        while self._path and self._path[-1][0] + 1 == self._path[-1][1]:
            self._path.pop()
        if not self._path:
            return False
        self._path[-1][0] += 1
        return True


class RandomChoices(Choices):
    """Paths at random, from a seed; `next` goes on for ever."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = random.Random(seed)

    def take(self, count: int) -> int:
        return self._random.randrange(count)

    def next(self) -> bool:
        return True
