"""Property tests of rewrites, for their authors: `graphopt.testing.check`."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

from graphopt.ir.distance import relative_error
from graphopt.ir.driver import DidNotConverge, Record
from graphopt.ir.rewrite import Rewrite, rewrite as as_rewrite
from graphopt.optimize import optimize
from graphopt.passes.base import Pass, RewritePass
from graphopt.testing.instance import Around, Code, Numbers, load
from graphopt.verify.proof.pattern import Infeasible
from graphopt.verify.proof.prove import Visit, explore, show

NUMBERS = (0.5, 2.0, -1.5, 1.0, 0.0, -1.0, 3.0)


class Counterexample(AssertionError):
    """A graph that a rewrite makes wrong; `source` is a file that defines `model` and `inputs`."""

    def __init__(self, message: str, source: str) -> None:
        super().__init__(f"{message}\n\n{source}")
        self.source = source


def check(rewrite: Any, *, max_examples: int = 100, graphs: Any = None, paths: int = 1500) -> int:
    """Test that a rewrite, or a pass, is right wherever it applies. Returns how often it applied.

    Graphs in which it matches are built from what it asks about (its root and its requirements),
    graphs in which it must not from its refusals; sizes, numbers, dtype, spelling, sharing and other
    readers of inner values are drawn. Every application is validated in float64.

    Args:
        rewrite: a `Rewrite`, a function that `graphopt.rewrite` would take, or a `Pass`.
        max_examples: how many graphs are drawn.
        graphs: a strategy of `graphopt.testing.strategies.Network`, in place of graphs made from
            the rewrite's own questions. Passes that are not sets of rewrites need it.
        paths: how many ways through the rewrite are looked for first.

    Raises:
        Counterexample: an AssertionError with a minimal graph, as runnable PyTorch code.
        AssertionError: if it never applied.
    """
    passes = [rewrite if isinstance(rewrite, (Rewrite, Pass, type)) else as_rewrite(rewrite)]
    if graphs is not None:
        return _check_networks(passes, graphs, max_examples)
    if isinstance(passes[0], Rewrite):
        return _check_rewrite(passes[0], max_examples, paths)
    if isinstance(passes[0], RewritePass) or (
        isinstance(passes[0], type) and issubclass(passes[0], RewritePass)
    ):
        return sum(
            check(one, max_examples=max_examples, paths=paths) for one in passes[0].all_rewrites()
        )
    raise TypeError(f"{passes[0]!r} is not a set of rewrites; pass graphs=, a strategy of networks")


def patterns(rewrite: Rewrite, paths: int) -> tuple[list[Visit], list[Visit]]:
    """Patterns that a rewrite matches and patterns that it nearly matches, the smallest first."""
    matched: dict[str, Visit] = {}
    refused: dict[Any, Visit] = {}
    orderly = (explore(rewrite, depth) for depth in range(4))
    random = (itertools.islice(explore(rewrite, 1 + n % 3, n), 10) for n in range(paths))
    visits = itertools.chain(
        itertools.islice(itertools.chain.from_iterable(orderly), paths // 2),
        itertools.islice(itertools.chain.from_iterable(random), paths - paths // 2),
    )
    for visit in visits:
        if visit.result is not None and not _constant(visit):
            matched.setdefault(show(visit.pattern), visit)
        elif visit.declined is not None and visit.near:
            refused.setdefault((visit.declined, len(visit.pattern.nodes)), visit)
    return (
        sorted(matched.values(), key=lambda one: len(one.pattern.nodes)),
        sorted(refused.values(), key=lambda one: len(one.pattern.nodes)),
    )


def _constant(visit: Visit) -> bool:
    """Whether no leaf of the pattern depends on an input."""
    return all(node.computed or node.constant for node in visit.pattern.nodes)


def _check_rewrite(rewrite: Rewrite, max_examples: int, paths: int) -> int:
    matched, refused = patterns(rewrite, paths)
    if not matched:
        reasons = "; ".join(list(dict.fromkeys(str(one.declined) for one in refused))[:5])
        raise AssertionError(f"{rewrite.name}: no graph was found that it matches ({reasons})")
    applied = 0
    fates: Counter[str] = Counter()

    @settings(
        max_examples=max_examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
        print_blob=False, report_multiple_bugs=False,
    )  # fmt: skip
    @given(st.data())
    def run(data: st.DataObject) -> None:
        nonlocal applied
        draw = data.draw
        kept = refused if refused and draw(st.integers(0, 4)) == 4 else matched
        visit = kept[draw(st.integers(0, len(kept) - 1))]
        around = Around(
            draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16])),
            draw(st.booleans()), draw(st.integers(0, 2)), draw(st.booleans()),
        )  # fmt: skip
        source = _instance(visit, draw, around)
        if source is None:
            fates["no sizes fit"] += 1
            return
        count = _examine(rewrite, *load(source), source, fates)
        applied += count

    try:
        run()
    except Counterexample as found:
        raise found from None
    if applied == 0:
        raise AssertionError(f"{rewrite.name}: never applied in {max_examples} graphs ({fates})")
    return applied


def _instance(visit: Visit, draw: Any, around: Around) -> str | None:
    """The source of a graph with a pattern in it; None if no sizes were found for it."""
    for _ in range(8):
        try:
            numbers = Numbers(
                visit.pattern, lambda name: draw(st.integers(0, 4), label=name),
                lambda name: draw(st.sampled_from(NUMBERS), label=name),
            )  # fmt: skip
            if not numbers.as_asked:
                continue
            return Code(visit.pattern, visit.root.out, numbers, around).source()
        except Infeasible:
            continue
    return None


def _examine(rewrite: Any, model: Any, inputs: Any, source: str, fates: Counter[str]) -> int:
    """Optimize with the rewrite alone and compare; how often it was applied."""
    try:
        with torch.no_grad():
            model(*inputs)
    except (RuntimeError, IndexError, ValueError) as error:
        fates[f"does not run: {str(error).splitlines()[0][:80]}"] += 1
        return 0
    try:
        result = optimize(model, inputs, passes=[rewrite])
    except DidNotConverge as error:
        raise Counterexample(f"{error}", source) from None
    report = result.report
    for record in report.rolled_back:
        raise Counterexample(f"{record.rewrite} {_fate(record)}", source)
    if report.check is not None and not report.check.ok:
        raise Counterexample(f"the rewritten model is wrong: {report.check.reason}", source)
    if all(one.dtype is torch.float64 for one in inputs):
        with torch.no_grad():
            truth, found = model(*inputs), result(*inputs)
        off = relative_error(found, truth)
        limit = report.check.limit if report.check is not None else 0.0
        if not off <= max(1e-9, limit):
            raise Counterexample(f"float64 outputs differ by {off:.1e} (relative)", source)
    for record in report.refused:
        fates[f"refused: {record.reason}"] += 1
    return len(report.applied)


def _fate(record: Record) -> str:
    if record.reason.startswith("raised"):
        return f"{record.reason}; decline with rw.require where it does not apply"
    measured = f": error {record.error:.1e}, bound {record.bound:.1e}" if record.bound > 0 else ""
    return f"is wrong at {record.where or record.node}: {record.reason}{measured}"


def _check_networks(passes: list[Any], graphs: Any, max_examples: int) -> int:
    applied = 0

    @settings(
        max_examples=max_examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
        print_blob=False, report_multiple_bugs=False,
    )  # fmt: skip
    @given(graphs)
    def run(network: Any) -> None:
        nonlocal applied
        kwargs = getattr(network, "kwargs", None) or None
        report = optimize(network.module, network.inputs, kwargs, passes=passes).report
        for record in report.rolled_back:
            raise Counterexample(f"{record.rewrite} {_fate(record)}", str(network))
        if report.check is not None and not report.check.ok:
            raise Counterexample(f"the model is wrong: {report.check.reason}", str(network))
        applied += len(report.applied)

    try:
        run()
    except Counterexample as found:
        raise found from None
    return applied
