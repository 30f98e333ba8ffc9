"""Channels removed, with all that depends on them.

    conv2(relu(bn(conv1(x))))  =  the same over the channels that stay, where those that go are masked

What has to go together is found by `graphopt.ir.channels`; which go is decided by their importance,
within each family of groups (the channels of one width) or beyond it, and how many by a ratio or by
budgets. The contract is `Masked`: the pruned graph is checked in float64 against the source with masks
on every value.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graphopt.ir.channels import find_groups
from graphopt.ir.channels.labels import Vector
from graphopt.ir.channels.remove import CannotRemove, remove
from graphopt.ir.contracts import Algebraic, Calibrated, Contract, Masked
from graphopt.ir.driver import Record, Session, Validator, Verdict
from graphopt.ir.graph import Graph
from graphopt.ir.interpret import Interpreter
from graphopt.passes.base import Pass, PassError
from graphopt.passes.pruning.budget import ALLOCATIONS, TARGETS, allocate
from graphopt.passes.pruning.evidence import Evidence, EvidenceError, Loss, Scores, example
from graphopt.passes.pruning.importance import IMPORTANCE, Importance
from graphopt.passes.pruning.ranking import SCOPES, Ranked, rank
from graphopt.passes.pruning.reconstruction import RECONSTRUCTION, Reconstruction

RATIO = 0.5  # where nothing else is said


@dataclasses.dataclass(frozen=True)
class Prune(Pass):
    """The least important channel groups are removed, at a ratio or within budgets."""

    name = "prune"
    ratio: float | None = None  # of the groups of each family, or of all that are compared; 0.5
    importance: str | Importance = "l2"  # a name of `IMPORTANCE`, or a function
    threshold: float | None = None  # instead of a ratio: what scores this or less goes
    scope: str = "local"  # or global, isomorphic: what groups are compared with
    round_to: int = 1  # what stays is a multiple of this
    max_ratio: float = 1.0  # of the groups of any family, but for one
    protect: str | Sequence[str] = ""  # patterns of parameters that keep all, as in "head.*;stem.*"
    # Budgets instead of a ratio: at most this part of what the source costs.
    target_flops: float | None = None
    target_params: float | None = None
    target_latency: float | None = None  # measured on this machine
    allocation: str = "uniform"  # or milp: how budgets are shared out
    heads: bool = False  # whether whole blocks may go, as heads, and not only a feature of each
    reconstruct: str | Reconstruction = ""  # a name of `RECONSTRUCTION`, or a function
    seed: int = 0
    # Batches (inputs, target) for what is measured on data, and loss(output, target), a scalar:
    data: Sequence[tuple[Any, Any]] = dataclasses.field(default=(), repr=False)
    loss: Loss | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise PassError(f"prune: ratio is {self.ratio}, expected 0 <= ratio < 1")
        if not 0 < self.max_ratio <= 1:
            raise PassError(f"prune: max_ratio is {self.max_ratio}, expected 0 < max_ratio <= 1")
        if self.round_to < 1:
            raise PassError(f"prune: round_to is {self.round_to}, expected at least 1")
        for what, known in (("importance", IMPORTANCE), ("scope", SCOPES),
                            ("reconstruct", {"": None, **RECONSTRUCTION}),
                            ("allocation", ALLOCATIONS)):  # fmt: skip
            found = getattr(self, what)
            if not callable(found) and found not in known:
                raise PassError(f"prune: {what} is {found!r}, expected one of {', '.join(known)}")
        for what, part in self._targets.items():
            if not 0 < part < 1:
                raise PassError(f"prune: {what} is {part}, expected 0 < {what} < 1")
        asked = [one for one in ("ratio", "threshold") if getattr(self, one) is not None]
        if len(asked) + bool(self._targets) > 1:
            given = " and ".join([*asked, *sorted(self._targets)[:1]])
            raise PassError(f"prune: {given} are given, expected one of them")
        if self.allocation != "uniform" and not self._targets:
            raise PassError(f"prune: allocation is {self.allocation}, expected a target beside it")
        if not isinstance(self.protect, str):  # as it is written in a pipeline
            object.__setattr__(self, "protect", ";".join(self.protect))

    @property
    def _targets(self) -> dict[str, float]:
        given = {what: getattr(self, what) for what in TARGETS}
        return {what: part for what, part in given.items() if part is not None}

    def run(self, session: Session) -> None:
        try:
            self._run(session)
        except EvidenceError as error:
            raise PassError(f"prune: {error}") from error

    def _run(self, session: Session) -> None:
        groups = find_groups(session.graph.clone())
        evidence = Evidence(groups, self.data, self.loss, self.seed)
        scores = self._found(IMPORTANCE, self.importance)(evidence)
        ranked = rank(
            groups, scores, self.scope, str(self.protect), self.round_to, self.max_ratio, self.heads
        )
        try:
            gone = ranked.gone(self._stay(ranked, scores, evidence))
            result = remove(groups, gone)
        except CannotRemove as error:
            session.refused["prune", session.graph.output] = Record(
                "prune", "", "Masked", str(error)
            )
            return
        if not gone:
            return
        counted = "; ".join(groups.statistics(groups.lost(gone)))
        note = f"counts only what stays: {counted}" if counted else ""
        # What is zero has no mask: the result equals the source itself.
        zeros = self.importance == "zeros" and self.threshold == 0
        contract: Contract = Algebraic() if zeros else Masked()
        masked = set() if zeros else gone
        if session.become(
            "prune", contract, result, lambda by: by.check_masked(groups, masked, result), note
        ) and self.reconstruct:  # fmt: skip
            self._reconstructed(session, evidence, gone, result)

    def _reconstructed(
        self, session: Session, evidence: Evidence, gone: set[int], plain: Graph
    ) -> None:
        """Take over weights of what stays that bring the outputs nearer to those of the source."""
        groups, states = evidence.groups, evidence.graph.states
        inputs = (
            [flat for flat, _ in evidence.batches("reconstruct")] if self.data
            else [example(evidence.graph)]
        )  # fmt: skip
        truth = [outputs(evidence.graph, one) for one in inputs]
        before = dict(states)
        states.update({
            name: dataclasses.replace(states[name], tensor=_like(states[name].tensor, value), exact=None)
            for name, value in self._found(RECONSTRUCTION, self.reconstruct)(evidence, gone).items()
        })  # fmt: skip
        try:
            result = remove(groups, gone)
            errors = [
                max(_distance(outputs(graph, one), true)
                    for one, true in zip(inputs, truth, strict=True))
                for graph in (plain, result)
            ]  # fmt: skip

            def check(by: Validator) -> Verdict:
                verdict = by.check_masked(groups, gone, result)
                nearer = errors[1] < errors[0]
                reason = "" if nearer else "the outputs are not nearer to those of the source"
                return Verdict(
                    verdict.ok and nearer, errors[1], errors[0], verdict.reason or reason
                )

            session.become(
                "reconstruct", Calibrated("relative error on the data", errors[0]), result, check
            )
        finally:
            states.clear()
            states.update(before)

    def _stay(self, ranked: Ranked, scores: Scores, evidence: Evidence) -> Vector:
        """How many groups of every family stay."""
        if self.threshold is not None:
            stay = [int((scores[one] > self.threshold).sum()) for one in ranked.families]
            return np.maximum(stay, ranked.least)
        if not self._targets:
            return ranked.at(RATIO if self.ratio is None else self.ratio)
        inputs = next(evidence.batches("prune"))[0] if self.data else example(evidence.graph)
        return allocate(ranked, self._targets, self.allocation, inputs)

    @staticmethod
    def _found(known: Mapping[str, Any], given: Any) -> Any:
        return known[given] if isinstance(given, str) else given


def outputs(graph: Graph, inputs: Sequence[Any]) -> list[Tensor]:
    """The floating outputs of a graph in its own dtypes."""
    with torch.no_grad():
        found = Interpreter(graph, writes=False).run(inputs)
    return [one.double() for one in found if isinstance(one, Tensor) and one.is_floating_point()]


def _distance(found: list[Tensor], truth: list[Tensor]) -> float:
    """Relative, in the 2-norm over all outputs."""
    size = math.sqrt(sum(float(one.square().sum()) for one in truth))
    away = sum(float((a - b).square().sum()) for a, b in zip(found, truth, strict=True))
    return math.sqrt(away) / (size or 1.0)


def _like(old: Tensor, value: Tensor) -> Tensor:
    if isinstance(old, nn.Parameter):
        return nn.Parameter(value, requires_grad=old.requires_grad)
    return value
