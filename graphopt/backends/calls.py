"""Reading calls of ATen operators."""

from __future__ import annotations

from typing import Any

from torch import fx


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name, defaults included."""
    found = {}
    for position, one in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        default = one.default_value if one.has_default_value() else None
        found[one.name] = (
            node.args[position] if position < len(node.args) else node.kwargs.get(one.name, default)
        )
    return found


def spread(sizes: Any, rank: int) -> list[int]:
    """One size for each axis, where one may stand for all."""
    found: list[int] = list(sizes) if isinstance(sizes, (list, tuple)) else [sizes]
    return found * rank if len(found) == 1 else found
