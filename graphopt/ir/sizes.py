"""Sizes that may be symbols. `==` on these asks for the example's sizes; here it is every size."""

from __future__ import annotations

from typing import Any


def same(a: Any, b: Any) -> bool:
    """Equal sizes for every dynamic size, decided without adding guards."""
    left = getattr(getattr(a, "node", None), "expr", a)
    right = getattr(getattr(b, "node", None), "expr", b)
    return bool(left == right)


def same_shape(a: Any, b: Any) -> bool:
    """Equal shapes for every dynamic size."""
    return len(a) == len(b) and all(map(same, a, b))
