"""What may go, and in which order: the channel groups of every family by importance."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np

from graphopt.ir.channels import Group, Groups
from graphopt.ir.channels.labels import Vector
from graphopt.ir.channels.meters import Floats, Lost
from graphopt.ir.graph import Graph
from graphopt.passes.base import PassError
from graphopt.passes.pruning.evidence import Scores

SCOPES = ("local", "global", "isomorphic")
TINY = 1e-9  # the part of the importance of a family that stays, at least, as a factor


@dataclasses.dataclass(frozen=True)
class Ranked:
    """The groups that may go: the labels of every family, the least important first.

    `classes` are the families whose groups are compared with one another; `scores` are in units of
    a mean over these. An allocation, `stay`, has the number of
    groups that stay for every family: a multiple of `round_to`, and `least` or more.
    """

    groups: Groups
    scores: Scores
    families: list[Vector]
    classes: list[list[int]]
    round_to: int = 1
    max_ratio: float = 1.0

    @property
    def sizes(self) -> Vector:
        return np.array([len(labels) for labels in self.families], dtype=np.int64)

    @property
    def least(self) -> Vector:
        return self._rounded(np.maximum(self.sizes - (self.max_ratio * self.sizes).astype(int), 1))

    def _rounded(self, stay: Vector) -> Vector:
        return np.minimum(-(-stay // self.round_to) * self.round_to, self.sizes)

    def at(self, ratio: float) -> Vector:
        """The allocation without this part of the groups of every class, the least important ones."""
        stay = self.sizes
        for members in self.classes:
            able = [self.families[one][: stay[one] - self.least[one]] for one in members]
            owner = np.repeat(members, [len(labels) for labels in able])
            order = np.argsort(self.scores[np.concatenate(able)], kind="stable")
            count = int(ratio * sum(len(self.families[one]) for one in members))
            stay -= np.bincount(owner[order[:count]], minlength=len(stay))
        return self._rounded(stay)

    def gone(self, stay: Vector) -> set[int]:
        """The labels of what goes; the most important entry of every axis is spared."""
        gone: set[int] = set()
        for labels, count in zip(self.families, stay, strict=True):
            gone |= set(labels[: len(labels) - count].tolist())
        return _spared(self.groups, self.scores, gone)

    def lost(self, gone: Iterable[int]) -> Lost:
        found = np.zeros((1, self.groups.trace.coupling.count), dtype=bool)
        found[0, list(gone)] = True
        return found

    @cached_property
    def shares(self) -> list[Floats]:
        """For every family and number of groups that stay, the logarithm of their part of its
        importance."""
        found = []
        for labels in self.families:
            scores = np.maximum(self.scores[labels[::-1]], 0.0)
            parts = np.append(0.0, scores.cumsum()) / (scores.sum() or 1.0)
            found.append(np.log(np.maximum(parts, TINY)))
        return found

    def importance(self, stay: Vector) -> float:
        """The logarithm of the product over families of the part of the importance that stays."""
        return float(sum(one[count] for one, count in zip(self.shares, stay, strict=True)))


def rank(
    groups: Groups, scores: Scores, scope: str = "local", protect: str = "", round_to: int = 1,
    max_ratio: float = 1.0, heads: bool = True,
) -> Ranked:  # fmt: skip
    """The groups of a graph by importance, those of protected families left out.

    The groups of a family are compared with one another, with those of all families (`global`, in
    units of the family's mean), or with those of families of the same structure (`isomorphic`, arXiv
    2407.04616): parameters of the same shapes but for the axis of the groups, read by the same ops.

    Raises:
        PassError: for a pattern that matches no parameter.
    """
    kept = protected(groups.graph, protect, "prune")
    families = [
        one for one in groups.families()
        if not kept & {m.name for m in one[0].members}
        and (heads or one[0].label not in groups.blocks)
    ]  # fmt: skip
    labels = [family.labels for family in families]
    alone = [[number] for number in range(len(families))]
    alike: dict[Any, list[int]] = defaultdict(list)
    for number, family in enumerate(families):
        alike[_structure(groups, family[0])].append(number)
    isomorphic = list(alike.values())
    scores = scores.copy()
    for members in isomorphic if scope == "isomorphic" else alone:
        compared = np.concatenate([labels[number] for number in members])
        scores[compared] /= np.abs(scores[compared]).mean() or 1.0
    together = [list(range(len(families)))] if families else []
    classes = {"local": alone, "isomorphic": isomorphic, "global": together}[scope]
    ordered = [one[np.argsort(scores[one], kind="stable")] for one in labels]
    return Ranked(groups, scores, ordered, classes, round_to, max_ratio)


def _structure(groups: Groups, group: Group) -> Any:
    """What a group is made of, without names: for every member, the ops that read the parameter, its
    other sizes, and how many entries of it there are."""
    found = []
    for one in group.members:
        shape = list(groups.states[one.name].shape)
        shape[one.axis] = -1
        ops = sorted({str(user.target) for user in groups.graph.read(one.name).users})
        found.append((ops, shape, len(one.entries)))
    return str(sorted(found))


def protected(graph: Graph, patterns: str, asked_by: str) -> set[str]:
    """The parameters that match any of some patterns, `head.*;stem.*` or `head.*|stem.*`.

    Raises:
        PassError: for a pattern without a match, with the name that is nearest to it.
    """
    states, aliases = graph.states, graph.aliases
    names = {name: name for name, state in states.items() if state.kind == "parameter"}
    names |= {name: twin for name, twin in aliases.items() if twin in names}
    found: set[str] = set()
    for pattern in filter(None, map(str.strip, re.split(r"[|;]", patterns))):
        matches = fnmatch.filter(names, pattern)
        if not matches:
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            nearest = f"; the nearest is {near[0]}" if near else ""
            raise PassError(f"{asked_by}: protect={pattern!r} matches no parameter{nearest}")
        found |= {names[name] for name in matches}
    return found


def _spared(groups: Groups, scores: Scores, gone: set[int]) -> set[int]:
    """`gone` without what would take all entries of an axis: the most important one stays."""
    while True:
        emptied = next(iter(groups.emptied(groups.lost(gone))), None)
        if emptied is None:
            return gone
        _, _, layers = emptied
        rows = np.stack(layers)  # the groups of every entry
        worth = np.where(np.isin(rows, list(gone)), scores[rows], 0.0).sum(0)
        gone = gone - set(rows[:, int(worth.argmax())].tolist())
