"""Fewer loop axes: neighbours that every index walks through as one become one.

a, b  ->  t = a B + b     where every index is, as a function of t, no more complicated
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import sympy

from graphopt.backends.triton import loops
from graphopt.backends.triton.index import Quotient, Ranges, Remainder, weight

Groups = Sequence[Sequence[loops.Axis]]


def merged(kernel: loops.Kernel) -> loops.Kernel:
    """The same kernel with as few axes as its indices allow, called i (rows) and j (columns)."""
    groups, stores, ranges = merge_groups(
        (kernel.rows, kernel.columns), "ij", kernel.stores, kernel.ranges
    )
    return dataclasses.replace(
        kernel, rows=groups[0], columns=groups[1], stores=stores, ranges=ranges
    )


def merge_groups(
    groups: Groups, letters: str, stores: Sequence[loops.Store], before: Ranges
) -> tuple[list[tuple[loops.Axis, ...]], tuple[loops.Store, ...], Ranges]:
    """Stores over as few axes as their indices allow, each group's called by its letter.

    Symbols of `before` that are in no group stay.
    """
    ranges = Ranges()
    values = [store.value for store in stores]
    table = {index: index for one in loops.walk(*values) for index in one.indices}
    table |= {store.offset: store.offset for store in stores}
    ranges.size.update(before.size)
    merging = [_merge(list(axes), table, ranges) for axes in groups]
    final = Ranges()
    loose = set(before.size) - {axis.symbol for axes in groups for axis in axes}
    final.size.update({one: size for one, size in before.size.items() if one in loose})
    names: dict[sympy.Symbol, sympy.Expr] = {}
    found = []
    for letter, axes in zip(letters, merging, strict=True):
        wide = len(axes) > 1
        found.append(tuple(
            loops.Axis(final.axis(f"{letter}{n}" if wide else letter, axis.size), axis.size)
            for n, axis in enumerate(axes)
        ))  # fmt: skip
        names |= {old.symbol: new.symbol for old, new in zip(axes, found[-1], strict=True)}
    renamed = {old: rebuilt(new.xreplace(names), final) for old, new in table.items()}
    return found, _with_indices(stores, renamed.__getitem__), final


def _merge(
    axes: list[loops.Axis], table: dict[sympy.Expr, sympy.Expr], ranges: Ranges
) -> list[loops.Axis]:
    position = len(axes) - 2
    while position >= 0:
        outer, inner = axes[position], axes[position + 1]
        size = sympy.expand(outer.size * inner.size)
        whole = sympy.Symbol(f"{outer.symbol}_{inner.symbol}", integer=True, nonnegative=True)
        ranges.size[whole] = size
        changed = _joined(outer, inner, whole, table, ranges)
        if changed is not None:
            table.update(changed)
            axes[position : position + 2] = [loops.Axis(whole, size)]
        position -= 1
    return axes


def _joined(
    outer: loops.Axis, inner: loops.Axis, whole: sympy.Symbol,
    table: dict[sympy.Expr, sympy.Expr], ranges: Ranges,
) -> dict[sympy.Expr, sympy.Expr] | None:  # fmt: skip
    """Every index in terms of the joint axis; None if one becomes more complicated."""
    changed = {}
    parts = {
        outer.symbol: Quotient(whole, inner.size),
        inner.symbol: Remainder(whole, inner.size),
    }
    for key, index in table.items():
        if index.free_symbols & set(parts):
            polynomial = not index.has(Quotient, Remainder)
            if polynomial and not _proportional(index, outer, inner):
                return None
            changed[key] = rebuilt(index.xreplace(parts), ranges)
            if weight(changed[key]) > weight(index):
                return None
    return changed


def _proportional(index: sympy.Expr, outer: loops.Axis, inner: loops.Axis) -> bool:
    """Whether a polynomial's step along the outer axis is that of the whole inner one."""
    steps = sympy.diff(index, outer.symbol), sympy.diff(index, inner.symbol)
    return bool(sympy.expand(steps[0] - inner.size * steps[1]) == 0)


def rebuilt(e: sympy.Expr, ranges: Ranges) -> sympy.Expr:
    """The expression, simplified for the ranges of the axes that are now in it."""
    if not e.has(Quotient, Remainder):
        return e
    if isinstance(e, (Quotient, Remainder)):
        a, d = (rebuilt(one, ranges) for one in e.args)
        return ranges.quotient(a, d) if isinstance(e, Quotient) else ranges.remainder(a, d)
    return ranges.joined(e.func(*(rebuilt(one, ranges) for one in e.args)))


def _with_indices(
    stores: Sequence[loops.Store], change: Callable[[sympy.Expr], sympy.Expr]
) -> tuple[loops.Store, ...]:
    twins: dict[loops.Expr, loops.Expr] = {}
    for one in loops.walk(*(store.value for store in stores)):
        new: dict[str, object] = {}
        for field in dataclasses.fields(one):
            value = getattr(one, field.name)
            if isinstance(value, loops.Expr):
                new[field.name] = twins[value]
            elif field.name == "args":
                new["args"] = tuple(twins[arg] for arg in value)
            elif field.name == "at":
                new["at"] = tuple((symbol, twins[position]) for symbol, position in value)
            elif field.name == "conditions":
                new["conditions"] = tuple(map(change, value))
            elif isinstance(value, sympy.Expr):
                new[field.name] = change(value)
        twins[one] = dataclasses.replace(one, **new)  # type: ignore[arg-type]
    return tuple(
        dataclasses.replace(store, offset=change(store.offset), value=twins[store.value])
        for store in stores
    )
