"""Weights stored as integer codes stay codes where an adapter is merged with them.

    dequantize(q, scale) + D    ->    dequantize(q', scale')        the nearest there is

By itself the pass changes nothing: it allows merges with such weights, which the passes after it make
where the error keeps to a budget, and `materialize` rounds what they make to codes of the same form and
the same number of bytes (`graphopt.ir.codes`). The contract is `Calibrated`: the error of each weight, as a
fraction of the effect of what was merged with it, |V' - V| / |D| in the Frobenius norm.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from graphopt.ir.coded import ALLOWED, Allowed, Merged, compressed, decoding, merged
from graphopt.ir.codes import NoCodes, Rounded
from graphopt.ir.contracts import Calibrated
from graphopt.ir.driver import Record, Session, Verdict
from graphopt.ir.graph import Graph, State
from graphopt.ir.provenance import origins
from graphopt.ir.storage import parameters_read, readers_of, states_of
from graphopt.passes.base import Pass, PassError

METRIC = "error of the weight / effect of what is merged"


@dataclasses.dataclass(frozen=True)
class Requantize(Pass):
    """Adapters merge with weights stored as integers, which are rounded to integers again."""

    name = "requantize"
    budget: float = 0.1  # of the error of a weight, as a fraction of the effect of what is merged
    bits: int | None = None  # of a code; None: all that are stored

    def __post_init__(self) -> None:
        if not self.budget >= 0:
            raise PassError(f"requantize: budget is {self.budget}, expected at least 0")
        if self.bits is not None and not 1 <= self.bits <= 8:
            raise PassError(f"requantize: bits is {self.bits}, expected 1 to 8")

    def run(self, session: Session) -> None:
        graph = session.graph
        for node in set(parameters_read(graph, graph.calls)):
            codes = compressed(node)
            if codes is not None and ALLOWED not in codes.meta:
                codes.meta[ALLOWED] = Allowed(self.budget, decoding(graph, codes), self.bits)


def round_again(session: Session) -> None:
    """Round what was merged with codes where that is allowed."""
    for name in [str(one.target) for one in session.graph.nodes if ALLOWED in one.meta]:
        if name in session.graph.states:
            _round(session, name)


def _round(session: Session, name: str) -> None:
    """Round the one weight that is made of the codes called `name`, if anything was merged with it."""
    graph = session.graph
    state = graph.read(name)
    allowed: Allowed = state.meta[ALLOWED]
    read = set(parameters_read(graph, graph.calls))
    weights = sorted(one for one in read if state in states_of(one))
    contract = Calibrated(METRIC, allowed.budget)

    def record(reason: str, **found: Any) -> Record:
        return Record(
            "requantize", graph.where(weights[0]), str(contract), reason, node=weights[0].name,
            stage=session.pass_name, origins=origins(graph, [*weights, state]), **found,
        )  # fmt: skip

    try:
        found = [merged(graph, one, state, allowed) for one in weights]
        if not any(found):
            return
        if found[0] is None or len(found) > 1:
            raise NoCodes(f"{len(weights)} weights are made of {name}")
        result = found[0].rounded()
        said = f"the error of {name} is {result.error:.3f} of what is merged"
        if not result.error <= allowed.budget:
            raise NoCodes(f"{said}; the budget is {allowed.budget:g}")
        rounded = _rounded(graph, found[0], result)
    except NoCodes as none:
        session.refused["requantize", state] = record(str(none))
        return
    done = record(said, error=result.error, bound=allowed.budget)
    verdict = Verdict(True, result.error, allowed.budget)
    if session.become("requantize", contract, rounded, lambda _: verdict):
        session.applied[-1] = dataclasses.replace(done, index=session.applied[-1].index)


def _rounded(graph: Graph, found: Merged, result: Rounded) -> Graph:
    """The graph with other codes, and another scale, of which the weight is decoded as before.

    Raises:
        NoCodes: if something else reads them.
    """
    tensors = {found.codes.name: found.codes.written(result)}
    if found.codes.scale is not None and result.scale is not None:
        tensors[found.codes.scale] = result.scale
    copy = graph.clone()
    twins = dict(zip(graph.nodes, copy.nodes, strict=True))
    decoded = twins[found.codes.node]
    twins[found.weight].replace_all_uses_with(decoded)
    copy.eliminate_dead_code()
    copy.drop_unread_states()
    for name, tensor in tensors.items():
        if readers_of(copy, copy.read(name)) != readers_of(copy, decoded):
            raise NoCodes(f"{name} is read elsewhere too")
        old = copy.states[name]
        if old.kind == "parameter":
            tensor = torch.nn.Parameter(tensor, requires_grad=old.tensor.requires_grad)
        copy.states[name] = State(tensor, old.kind, old.persistent)
    return copy
