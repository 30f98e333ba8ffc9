"""Rewrites from two plain functions: what to look for, and what to put there."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from graphopt.ir.contracts import Algebraic, Contract
from graphopt.ir.ops.base import Op
from graphopt.ir.pattern.functions import (
    called,
    check_known,
    check_pair,
    examples_for,
    some,
    spelled,
    wildcards_of,
)  # fmt: skip
from graphopt.ir.pattern.match import Match, emit, evaluate, matches, same
from graphopt.ir.pattern.terms import Apply, Term, counts_axes, counts_sizes, walk
from graphopt.ir.pattern.trace import Traced, trace
from graphopt.ir.rewrite import Declined, Rewrite, Rewriter, describe
from graphopt.ir.value import Value

Require = Mapping[str, Callable[..., object]]


def rewrite_from(
    pattern: Callable[..., Any],
    replacement: Callable[..., Any],
    *,
    name: str | None = None,
    inputs: Sequence[Any] | None = None,
    contract: Contract | None = None,
    require: Require | None = None,
) -> Rewrite:
    """The rewrite that replaces what `pattern` computes by what `replacement` computes.

        def pattern(x, w, b):
            return F.linear(x, w) + b

        def replacement(x, w, b):
            return F.linear(x, w, b)

    Parameters of `pattern` stand for any tensor, those annotated `float` or `int` for any number
    literal; one that occurs twice is the same value at each place. `replacement` takes some of
    them, by name, and may calculate with the numbers (`+ - * / // % ** abs`). Sums and products
    match in both orders of their operands, and every spelling of an op matches. Where the functions
    name axes or sizes, tensors match if they have as many axes as the examples.

    It declines where a value inside the pattern is used elsewhere too, unless the replacement keeps
    it, and where the result would have another shape or dtype.

    Args:
        name: what reports call it; by default the pattern's name, or the ops of the two functions.
        inputs: example tensors (and numbers), in the order of the pattern's parameters. By default
            4 x 4 matrices, vectors and images are tried. Their sizes and values do not matter,
            but where a function runs only on a size of 1.
        contract: `Algebraic()` unless said otherwise.
        require: what else must hold, by the reason that the user hears where it does not:
            `{"the bias is not a vector": lambda b: b.ndim == 1}`. A condition gets the values and
            numbers called as its parameters.

    Raises:
        RewriteError: if the functions do not make a rewrite; it names the function, and what was
            expected and found.
    """
    names = called(pattern, "pattern"), called(replacement, "replacement")
    wildcards = wildcards_of(pattern, names[0])
    check_known(replacement, names[1], wildcards, names[0])
    for reason, condition in (require or {}).items():
        check_known(condition, f"the condition {reason!r}", wildcards, names[0])
    examples = examples_for(pattern, replacement, names, wildcards, inputs)
    before = trace(pattern, names[0], examples)
    after = trace(replacement, names[1], some(examples, replacement))
    root = check_pair(before.term, after.term, names, wildcards)
    pair = _Pair(before, after, examples, dict(require or {}))

    def function(op: Op, rw: Rewriter) -> Value:
        return pair.apply(op, rw)

    said = inspect.getdoc(pattern)
    function.__doc__ = "\n\n".join(filter(None, (said, f"{root} = {after.term}")))
    function.__module__, function.__qualname__ = pattern.__module__, pattern.__qualname__
    title = name or (spelled(root, after.term) if names[0] == "pattern" else names[0])
    return Rewrite(function, title.replace("_", "-"), (root.cls,), contract or Algebraic())


class _Pair:
    """Two terms, and how the first becomes the second."""

    def __init__(
        self, pattern: Traced, replacement: Traced, examples: Mapping[str, Any], require: Require
    ) -> None:
        self.pattern, self.replacement, self.require = pattern, replacement, require
        self.ones = sorted(pattern.ones | replacement.ones)
        fixed = self.ones or counts_axes(pattern.term) or counts_axes(replacement.term)
        self.ndim = {
            name: one.ndim for name, one in examples.items()
            if fixed and isinstance(one, torch.Tensor)
        }  # fmt: skip
        sized = counts_sizes(pattern.term) or counts_sizes(replacement.term)
        self.equal = pattern.equal + replacement.equal if sized else ()
        self.kept = _kept(replacement.term, set(walk(pattern.term)))

    def apply(self, op: Op, rw: Rewriter) -> Value:
        """The replacement at the first match that meets all conditions."""
        refusal: Declined | None = None
        assert isinstance(self.pattern.term, Apply)
        for match in matches(self.pattern.term, op, Match()):
            try:
                self._check_axes(match, rw)
                if match.holds:
                    return self._replace(op, match, rw)
            except Declined as declined:
                rw.rollback()
                refusal = refusal or declined
        if refusal is not None:
            raise refusal
        rw.decline("the pattern does not occur here", near=False)

    def _check_axes(self, match: Match, rw: Rewriter) -> None:
        found = match.wildcards
        for name, ndim in self.ndim.items():
            rw.require(
                found[name].ndim == ndim, f"{name} does not have {ndim} axes, as its example has"
            )
        for name, axis in self.ones:
            size = found[name].shape[axis]
            rw.require(same(size, 1), f"axis {axis} of {name} is not of size 1, as in its example")

    def _replace(self, op: Op, match: Match, rw: Rewriter) -> Value:
        for a, b in self.equal:
            rw.require(same(evaluate(a, match.found), evaluate(b, match.found)), f"{a} is not {b}")
        for reason, condition in self.require.items():
            rw.require(condition(**some(match.wildcards, condition)), reason)
        inside = {value.node for term, value in match.found.items() if isinstance(term, Apply)}
        for term, value in match.found.items():
            if isinstance(term, Apply) and value.node is not op.out.node and term not in self.kept:
                rw.require(
                    inside.issuperset(value.users), f"{describe(value)} is used elsewhere too"
                )
        known = {
            term: value for term, value in match.found.items()
            if not isinstance(term, Apply) or term in self.kept
        }  # fmt: skip
        result = emit(self.replacement.term, known, rw, like=op)
        if not _same_type(result, op.out):
            rw.decline("the replacement has another shape or dtype")
        return result  # type: ignore[no-any-return]


def _same_type(new: Value, old: Value) -> bool:
    return (
        new.dtype == old.dtype
        and new.ndim == old.ndim
        and all(same(a, b) for a, b in zip(new.shape, old.shape, strict=True))
    )


def _kept(term: Term, pattern: set[Term]) -> set[Term]:
    """The parts of the pattern that the replacement has too, with all that they read."""
    if term in pattern:
        return set(walk(term))
    return {one for part in term.parts for one in _kept(part, pattern)}
