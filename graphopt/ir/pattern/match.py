"""Matching a term against values of a graph, and writing one into it.

Only what every rewriter offers is used, so the prover's patterns are matched by the same code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from graphopt.ir import ops
from graphopt.ir.ops.base import Op
from graphopt.ir.pattern.terms import (
    Apply,
    Fact,
    Formula,
    Inferred,
    Literal,
    Many,
    Number,
    Tensor,
    Term,
)
from graphopt.ir.rewrite import Rewriter
from graphopt.ir.value import Value

COMMUTATIVE = (ops.Add, ops.Mul)
# Options that say how a value is computed, or that matter in training alone.
IDLE = ("cudnn_enable", "momentum", "p", "path", "scale_grad_by_freq", "sparse", "sparse_grad")
MISFITS = (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError)


@dataclasses.dataclass(frozen=True)
class Match:
    """What wildcards stand for and what computes the parts of a pattern; `later` holds literals to
    compare once all wildcards are known."""

    found: Mapping[Term, Any] = dataclasses.field(default_factory=dict)
    later: tuple[tuple[Term, Any], ...] = ()

    def with_(self, term: Term, found: Any) -> Match:
        return Match({**self.found, term: found}, self.later)

    @property
    def wildcards(self) -> dict[str, Any]:
        """The tensors and numbers by the names of the wildcards."""
        return {
            term.name: found for term, found in self.found.items()
            if isinstance(term, (Tensor, Number))
        }  # fmt: skip

    @property
    def holds(self) -> bool:
        return all(same(found, evaluate(term, self.found)) for term, found in self.later)


def matches(term: Apply, op: Op, match: Match) -> Iterator[Match]:
    """Every way in which `op` is what `term` says: operands of sums and products in both orders."""
    asked = [
        name for name, part in term.named.items()
        if not (name in IDLE and isinstance(part, Literal))
    ]  # fmt: skip
    parts = [term.named[name] for name in asked]
    found = [_field(op, name) for name in asked]
    orders = [found]
    if isinstance(op, COMMUTATIVE) and parts[0] != parts[1]:
        orders.append(found[::-1])
    for order in orders:
        for one in _all(parts, order, match):
            yield one.with_(term, op.out)


def _field(op: Op, name: str) -> Any:
    """A field; the shape of a view as it comes out."""
    if name == "shape" and isinstance(op, (ops.Reshape, ops.Expand)):
        return op.out.shape
    return getattr(op, name)


def _all(terms: Sequence[Term], found: Sequence[Any], match: Match) -> Iterator[Match]:
    if not terms:
        yield match
        return
    for one in _each(terms[0], found[0], match):
        yield from _all(terms[1:], found[1:], one)


def _each(term: Term, found: Any, match: Match) -> Iterator[Match]:
    if isinstance(term, (Tensor, Number, Apply)) and term in match.found:
        if match.found[term] == found:
            yield match
    elif isinstance(term, Tensor):
        if isinstance(found, Value) and hasattr(found.meta, "dtype"):
            yield match.with_(term, found)
    elif isinstance(term, Number):
        kinds = int if term.whole else (int, float)
        if isinstance(found, kinds) and not isinstance(found, bool):
            yield match.with_(term, found)
    elif isinstance(term, Apply):
        op = found.op if isinstance(found, Value) else None
        if isinstance(op, term.cls):
            yield from matches(term, op, match)
    elif isinstance(term, Many):
        if isinstance(found, (tuple, list)) and len(found) == len(term.items):
            yield from _all(term.items, found, match)
    elif isinstance(term, Literal):
        if same(found, term.value):
            yield match
    elif isinstance(term, (Fact, Formula)):
        yield Match(match.found, (*match.later, (term, found)))
    else:
        yield match


def same(found: Any, wanted: Any) -> bool:
    """Whether two options are equal; symbolic sizes are compared without guarding on them."""
    if isinstance(found, Value):
        found = found.meta
        if not isinstance(found, torch.SymInt):
            return False
    if isinstance(found, torch.SymInt) or isinstance(wanted, torch.SymInt):
        return bool(_expr(found) == _expr(wanted))
    if isinstance(wanted, bool):
        return bool(found) == wanted
    return bool(found == wanted)


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def evaluate(term: Term, found: Mapping[Term, Any]) -> Any:
    """The number, size, dtype or option that a term comes to."""
    if term in found:
        return found[term]
    if isinstance(term, Fact):
        meta = found[term.of].meta
        return meta.shape[term.axis] if term.what == "shape" else getattr(meta, term.what)
    if isinstance(term, Formula):
        return term.function(*(evaluate(one, found) for one in term.operands))
    if isinstance(term, Inferred):
        return -1
    assert isinstance(term, Literal), term
    return term.value


def emit(term: Term, found: dict[Term, Any], rw: Rewriter, like: Op | None = None) -> Any:
    """Write a term into the graph; parts that the match found there are taken as they are."""
    if term in found:
        return found[term]
    if isinstance(term, Many):
        return tuple(emit(one, found, rw) for one in term.items)
    if not isinstance(term, Apply):
        return evaluate(term, found)
    fields = {name: emit(one, found, rw) for name, one in term.named.items()}
    if term.cls is ops.Expand:
        fields["shape"] = tuple(-1 if _dynamic(size) else size for size in fields["shape"])
    elif term.cls is not ops.Reshape and any(map(_dynamic, fields.values())):
        rw.decline(f"{term} needs a size that is dynamic here")
    try:
        value = rw.emit(term.cls(**fields), like=like)
    except MISFITS as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        rw.decline(f"{term} does not fit here: {first}")
    found[term] = value
    return value


def _dynamic(found: Any) -> bool:
    if isinstance(found, tuple):
        return any(map(_dynamic, found))
    return isinstance(found, (torch.SymInt, torch.SymFloat))
