"""Wrong rewrites are caught: a small sample of the table of `benchmarks.mutants`."""

from __future__ import annotations

import ast

import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("benchmarks.mutants", reason="benchmarks are not installed")

from benchmarks.mutants import changes, equivalent, executed, judges, mutate


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("name", ["drop_double_negation", "merge_factors"])
def test_mutant_is_caught(name: str, number: int) -> None:
    row = judges.judged(name, 0, 3, number)
    assert row["together"] == "caught" or row["argument"], row


def test_the_originals_are_accepted() -> None:
    from graphopt.passes.canonicalize import drop_double_negation

    assert judges.by_proof(drop_double_negation)[0] == "survived"
    assert judges.by_site(drop_double_negation)[0] == "survived"


def test_a_change_is_taken_back() -> None:
    before = [(one.change, one.source(one.law.tree)) for one in _sampled()]
    assert before == [(one.change, one.source(one.law.tree)) for one in _sampled()]
    assert all(one.source(one.law.tree) != ast.unparse(one.law.tree) for one in _sampled())


def _sampled() -> list:
    name = "fold_batch_norm"
    return changes.sample(executed.rewrites()[name], name, 0, 5, executed.executed(name))


def test_every_argument_is_about_a_mutant() -> None:
    known = set()
    for name, home in executed.rewrites().items():
        for law in mutate.reached(home, name):
            for one in changes.mutants(law):
                places = law.name, f"{name}: {law.name}"
                known |= {(place, change) for place in places for change in (one.change, "*")}
    assert set(equivalent.EQUIVALENT) <= known
