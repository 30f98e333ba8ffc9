"""The float64 oracle for single sites.

A site is the part of the graph between the replaced value, its replacement, and the values below which
the two computations are the same. From what the model computes there, on the user's own inputs, it is
evaluated both ways in float64.
"""

from __future__ import annotations

import heapq
import itertools
import math
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.ir.channels import Groups
from graphopt.ir.contracts import Contract, Exact
from graphopt.ir.distance import relative_error
from graphopt.ir.driver import Pair, Verdict
from graphopt.ir.graph import Graph
from graphopt.ir.interpret import Interpreter, seeded
from graphopt.memory import give_back
from graphopt.verify import choices
from graphopt.verify.bounds import Memory, Site
from graphopt.verify.bypassed import Bypassed
from graphopt.verify.masked import Masked
from graphopt.verify.values import Values

# Bytes of what sites have computed, and as many of values of the graph: a part of those of its states.
LEAST_KEPT, MOST_KEPT, KEPT = 1 << 25, 1 << 27, 1 / 3
TRIM_EVERY = 32  # sites
MASKED_LIMIT = 1e-9  # relative, in the 2-norm over the outputs, in float64


class SiteValidator:
    """Checks sites on example inputs."""

    def __init__(self, graph: Graph, inputs: Sequence[Any]) -> None:
        self.graph, self.inputs = graph, inputs
        self._checked = 0
        self.restart()

    def restart(self) -> None:
        """The graph has become another one."""
        states = sum(one.tensor.nbytes for one in self.graph.states.values())
        limit = min(max(LEAST_KEPT, int(KEPT * states)), MOST_KEPT)
        self._values = Values(self.graph, self.inputs, limit)
        self._memory = Memory(limit)

    def forget(self, nodes: Iterable[fx.Node]) -> None:
        """Erased nodes need their values no more."""
        nodes = list(nodes)
        self._values.forget(nodes)
        self._memory.forget(nodes)

    def check_masked(self, groups: Groups, gone: Collection[int], result: Graph) -> Verdict:
        """Compare a graph without some channel groups with the masked graph of `groups`."""
        return self._check_against(Masked(groups, gone), result, "masked model")

    def check_bypassed(
        self, source: Graph, instead: Mapping[fx.Node, fx.Node], result: Graph
    ) -> Verdict:
        """Compare a graph without some layers with `source`, where values take the place of others."""
        return self._check_against(Bypassed(source, instead), result, "model with layers bypassed")

    @torch.no_grad()
    def _check_against(self, reference: Interpreter, result: Graph, name: str) -> Verdict:
        truth = reference.run(self.inputs)
        try:
            found = Interpreter(result, lifted=True, writes=False).run(self.inputs)
        except RuntimeError as failure:
            said = " ".join(str(failure).split())
            return Verdict(False, reason=f"it does not run: {said}")
        error = relative_error(found, truth)
        reason = "" if error <= MASKED_LIMIT else f"differs from the {name} by {error:.1e}"
        return Verdict(not reason, error, MASKED_LIMIT, reason)

    # -- sites --------------------------------------------------------------------------------

    @torch.no_grad()
    def check(self, pairs: Sequence[Pair], contract: Contract) -> Verdict:
        """Evaluate each old value and its new one from the values they share and compare as `contract`
        says; the worst verdict."""
        if isinstance(contract, Exact):
            return max((self._check_exact(*pair) for pair in pairs), key=_badness)
        self._checked += 1
        if self._checked % TRIM_EVERY == 0:
            give_back()
        return max((self._check(*part) for part in together(pairs)), key=_badness)

    def _check(self, pairs: Sequence[Pair], inner: Sequence[fx.Node]) -> Verdict:
        try:
            (old, new), *others = pairs
            if not others and new.op == "get_attr" and self.graph.is_constant(old):
                value = self._values.lifted(old)  # stored: equal bits need no bound
                if bitwise_equal(value, self._values.lifted(new)):
                    return self._unfit(new, value) or Verdict(True, 0.0, 0.0)
            return self._evaluate(pairs, inner)
        except Exception as error:
            return Verdict(False, reason=f"could not be evaluated: {type(error).__name__}: {error}")

    def _evaluate(self, pairs: Sequence[Pair], inner: Sequence[fx.Node]) -> Verdict:
        """Evaluate sites and compare. What is shared is known when it is read first, every pair is
        compared as soon as it is there, and values are freed after that, unless ties have to be told."""
        site = Site(self.graph, {}, self._memory)
        at = {node: number for number, node in enumerate(inner)}
        due: dict[int, list[Pair]] = {}
        for pair in pairs:
            due.setdefault(max(at.get(one, 0) for one in pair), []).append(pair)
        last = {used: at[node] for node in inner for used in node.all_input_nodes}
        for number, ready in due.items():
            last |= {one: max(last.get(one, 0), number) for one in itertools.chain(*ready)}
        freed: dict[int, list[fx.Node]] = {}
        if not choices.decides(inner):
            for node, number in last.items():
                freed.setdefault(number, []).append(node)
        found = []
        for number, node in enumerate(inner):
            ready = due.get(number, [])
            for used in itertools.chain(node.all_input_nodes, *ready):
                if used not in at and used not in site.values:
                    site.know(used, self._values.lifted(used))
            site.add(node)
            if unfit := self._unfit(node, site.values[node]):
                return unfit
            for old, new in ready:
                found.append(compare(site, old, new))
                if not found[-1].ok:
                    return found[-1]
                self._values.keep(new, site.values[new])
            for used in freed.get(number, ()):
                site.drop(used)
        return max(found, key=_badness)

    def _unfit(self, node: fx.Node, value: Any) -> Verdict | None:
        """A parameter that its own dtype could not hold."""
        dtype = getattr(node.meta.get("val"), "dtype", None)
        if not self.graph.is_constant(node) or dtype is None or not dtype.is_floating_point:
            return None
        dense = value.to_dense() if value.is_sparse else value
        size, limits = largest(dense), torch.finfo(dtype)
        if math.isfinite(size) and (size > limits.max or 0 < size < limits.tiny):
            return Verdict(False, reason=f"{node.name} of size {size:.1e} does not fit {dtype}")
        return None

    def _check_exact(self, old: fx.Node, new: fx.Node) -> Verdict:
        """Bit for bit, in the graph's own dtypes."""
        shared, inner = cut(old, new)
        plain = Interpreter(self.graph, writes=False)
        try:
            env = {node: self._values.own(node) for node in shared}
            for node in inner:
                env[node] = seeded(plain, node, env)
        except Exception as error:
            return Verdict(False, reason=f"could not be evaluated: {type(error).__name__}: {error}")
        for a, b in zip(_leaves(env[old]), _leaves(env[new]), strict=True):
            if not bitwise_equal(a, b):
                return Verdict(False, reason="declared Exact, but the results differ bitwise")
        return Verdict(True, 0.0, 0.0)


_badness = operator.attrgetter("badness")


def largest(value: torch.Tensor) -> float:
    """The largest absolute value; nan if there is one; zero of nothing."""
    if not value.numel():
        return 0.0
    if value.is_complex():
        return float(value.abs().max())
    low, high = value.aminmax()  # makes no copy, as abs does
    return max(-float(low), float(high))


def compare(site: Site, old: fx.Node, new: fx.Node) -> Verdict:
    """Whether two values of a site are equal up to the sum of their rounding bounds."""
    left, right = _leaves(site.values[old]), _leaves(site.values[new])
    if all(bitwise_equal(a, b) for a, b in zip(left, right, strict=True)):
        return Verdict(True, 0.0, 0.0)
    tied = [choices.ties(site, one) for one in (old, new)]
    if all(one.dtype is torch.bool for one in (*left, *right)):
        return _compare_choices(site, old, new, tied)
    tolerances = site.tolerance(old), site.tolerance(new)
    if tolerances[0] is None or tolerances[1] is None:
        return Verdict(False, reason=f"no rounding bound is known for {site.unknown}")
    if len(left) == 1 and (verdict := _explained(left[0], right[0], *tolerances)):
        return verdict
    excused = [torch.zeros((), dtype=torch.bool) if one is None else one for one in tied]
    flips = 0
    ratio = -1.0
    for a, b, s, t in zip(left, right, *map(_leaves, tolerances), strict=True):
        if a.shape != b.shape:
            return Verdict(False, reason=f"shape {list(a.shape)} became {list(b.shape)}")
        same = (a == b) | (a.isnan() & b.isnan())
        if len(left) == 1 and any(one is not None for one in tied):
            ties = (excused[0] | excused[1]) & ~same & ~((a - b).abs() <= s + t)
            flips, same = int(ties.sum()), same | ties
        error = torch.where(same, 0.0, (a - b).abs())
        bound = (s + t).expand_as(error)
        sound = (error <= bound) & bound.isfinite()  # nan compares false
        ok = bool((sound | same).all())
        if error.numel() == 0:
            continue
        relative = torch.where(same, 0.0, error / bound.clamp(min=1e-300)).nan_to_num(torch.inf)
        index = int(relative.argmax())
        if float(relative.flatten()[index]) > ratio:
            ratio = float(relative.flatten()[index])
            worst = Verdict(
                ok, float(error.flatten()[index]), float(bound.flatten()[index]),
                _said(flips, error.numel()) if ok else "differs by more than rounding can explain",
            )  # fmt: skip
        if not ok:
            return worst
    return worst


def _explained(
    a: torch.Tensor, b: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> Verdict | None:
    """The verdict on two values that are finite and differ by no more than rounding; None for others,
    which take a closer look. `left` and `right` are their rounding bounds."""
    if a.shape != b.shape or not a.is_floating_point() or not a.numel():
        return None
    bound = left + right
    if not math.isfinite(largest(bound)):
        return None
    error = (a - b).abs_()
    bound = bound.expand_as(error)
    ratio = error / bound
    at = torch.unravel_index(ratio.argmax(), ratio.shape)
    if not ratio[at] <= 1:  # nan compares false
        return None
    return Verdict(True, float(error[at]), float(bound[at]))


def _compare_choices(
    site: Site, old: fx.Node, new: fx.Node, tied: Sequence[torch.Tensor | None]
) -> Verdict:
    """Whether two comparisons differ only where one of them is within rounding of a tie."""
    differ = site.values[old] != site.values[new]
    unexplained = differ
    for one in tied:
        unexplained = unexplained if one is None else unexplained & ~one
    count = int(differ.sum())
    if bool(unexplained.any()):
        return Verdict(
            False, reason=f"{count} of {differ.numel()} comparisons differ, not all are ties"
        )
    return Verdict(True, 0.0, 0.0, _said(count, differ.numel()))


def _said(count: int, total: int) -> str:
    return f"{count} of {total} comparisons are ties that rounding decides" if count else ""


def together(pairs: Sequence[Pair]) -> list[tuple[Sequence[Pair], list[fx.Node]]]:
    """Pairs as sites, each with the nodes to compute, in graph order. Pairs are one site, and have in common
    what they compute, if no value that two sides share is computed by another pair."""
    cuts = [cut(*pair) for pair in pairs]
    shared, inner = ({node for one in cuts for node in one[side]} for side in (0, 1))
    if shared & inner:
        return [([pair], one) for pair, (_, one) in zip(pairs, cuts, strict=True)]
    return [(pairs, sorted(inner))]


def cut(old: fx.Node, new: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes at which the computations of `old` and `new` meet, and the nodes above them.

    Walks both backwards in reverse graph order: every reader of a node within the site has been
    seen when the node is reached, so a node that both sides reached is where they meet.
    """
    reached: dict[fx.Node, int] = {old: 1}
    reached[new] = reached.get(new, 0) | 2
    heap = [_Latest(node) for node in reached]
    heapq.heapify(heap)
    shared, inner = [], []
    while heap:
        node = heapq.heappop(heap).node
        side = reached[node]
        if side == 3 or node.op != "call_function":
            shared.append(node)
            continue
        inner.append(node)
        for one in node.all_input_nodes:
            if one not in reached:
                heapq.heappush(heap, _Latest(one))
            reached[one] = reached.get(one, 0) | side
    return shared, inner[::-1]


class _Latest:
    """Heap order: nodes later in the graph first."""

    __slots__ = ("node",)

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    def __lt__(self, other: _Latest) -> bool:
        return other.node < self.node


BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bitwise_equal(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return bool(a == b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_floating_point():
        if a.layout is b.layout is torch.strided:
            if torch.equal(*(one.resolve_neg().view(BITS[one.itemsize]) for one in (a, b))):
                return True
            if not a.sum().isnan():
                return False
        same = ((a == b) & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan())
        return bool(same.all())
    return torch.equal(a, b)


def _leaves(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]
