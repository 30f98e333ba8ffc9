"""Pairs of products by matrices that are looked up by row, in a graph: regions for `low_rank`.

table A [ids]  and  table B [ids],     x A_i B_i,     then * scale [ids] and + base, where they follow
"""

from __future__ import annotations

import dataclasses
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from graphopt.backends.triton import interpreting
from graphopt.backends.triton.families.common import (
    Found,
    bytes_of,
    expression,
    numel,
    power,
    sizes_for,
    tensor,
    unit,
    widened,
)  # fmt: skip
from graphopt.backends.triton.families.looking import (
    PRODUCTS,
    bare,
    between,
    by_ids,
    chained,
    follow,
    lookup,
    reshapes,
)  # fmt: skip
from graphopt.backends.triton.families.low_rank import Form, low_rank, tile_columns
from graphopt.backends.triton.ptx import Unit, pointer
from graphopt.backends.triton.region import Launcher, Outside, Region
from graphopt.ir.affine import same, same_shape

aten = torch.ops.aten
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST = 128  # the rank that a tile holds


@dataclasses.dataclass(eq=False)
class Grouped(Region):
    """A region of kind "grouped"; `role` maps x, a, b, ids, scale, base to the nodes they are made
    from, `turned` the tables that are read transposed."""

    role: dict[str, fx.Node]
    turned: frozenset[str]
    shape: tuple[Any, ...]

    @property
    def form(self) -> Form:
        value = tensor(self.role["x"])
        modules = ", ".join(self.origins) or "the graph"
        steps = value.shape[1] if value.ndim == 3 else 1
        sequenced = isinstance(steps, int) and steps >= 16
        return Form(self.name, f"For {modules}.", self.rank, sequenced, "scale" in self.role,
                    "base" in self.role, widened(value.dtype, interpreting()))  # fmt: skip

    @property
    def rank(self) -> int:
        return int(tensor(self.role["a"]).shape[1 if "a" in self.turned else 2])

    @property
    def source(self) -> str:
        return self.form.source

    def launcher(self) -> Launcher:
        places = {name: self.inputs.index(node) for name, node in self.role.items()}

        form = self.form

        def launch(*args: Any) -> tuple[Tensor, ...]:
            given = {name: args[place] for name, place in places.items()}
            for name in self.turned:
                given[name] = given[name].mT
            check(given["ids"], given["b"].shape[0])
            for name in ("x", "base"):
                if name in given and given[name].ndim == 2:
                    given[name] = given[name].unsqueeze(1)
            if "scale" in given:
                given["scale"] = given["scale"].flatten()
            y = low_rank(form, **given)
            return (y.squeeze(1) if len(self.shape) == 2 else y,)

        return launch

    def units(self) -> list[Unit]:
        x, out = tensor(self.role["x"]), tensor(self.outputs[0])
        kind = pointer(x.dtype)
        pointers = dict.fromkeys(
            ("x_ptr", "a_ptr", "b_ptr", "y_ptr", "scale_ptr", "base_ptr"), kind
        )
        pointers |= {"h_ptr": "*fp32", "tile_ptr": "*i32", "order_ptr": "*i32"}
        pointers["ids_ptr"] = pointer(tensor(self.role["ids"]).dtype)
        source = dataclasses.replace(self.form, wide="").source
        wide, to = tile_columns(x.dtype, x.shape[-1], out.shape[-1])
        rows = 32 if x.dtype == torch.float32 else 64
        blocks = {"IN": x.shape[-1], "OUT": out.shape[-1], "PART": 512, "PARTS": 2, "ROWS": rows,
                  "RANK": max(16, power(self.rank))}  # fmt: skip
        return [
            unit(source, f"{self.name}_shrink", pointers, {**blocks, "COLUMNS": wide}),
            unit(source, self.name, pointers, {**blocks, "COLUMNS": to}),
        ]

    def work(self) -> tuple[sympy.Expr, sympy.Expr]:
        """Every table counts once, as if the batch used all adapters."""
        out = tensor(self.outputs[0])
        wide = expression(tensor(self.role["x"]).shape[-1])
        rows = numel(out) / expression(out.shape[-1])
        flops = 2 * rows * self.rank * (wide + expression(out.shape[-1]))
        flops += numel(out) * (("scale" in self.role) + ("base" in self.role))
        return bytes_of([*self.inputs, *self.outputs]), flops


def check(ids: Tensor, adapters: int) -> None:
    """IndexError (on a GPU, an assertion there) for an adapter that does not exist."""
    if ids.is_cuda:  # pragma: no cover
        torch._assert_async(((ids >= 0) & (ids < adapters)).all(), "adapter out of range")
    elif ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < adapters):
        raise IndexError(
            f"adapter out of range: expected 0 to {adapters - 1}, found {ids.tolist()}"
        )


def match(graph: fx.Graph) -> Found:
    """Every pair of products by looked-up matrices in a graph."""
    found = Found([], [])
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target not in PRODUCTS or node in taken or lookup(node.args[1]) is None:
            continue
        try:
            region = _region(node)
        except Outside as reason:
            found.reasons.append((node, str(reason)))
            continue
        if region is not None:
            taken |= set(region.nodes)
            found.regions.append(region)
    return found


def _region(first: fx.Node) -> Grouped | None:
    """The region of two products of which `first` is the first; None if it is the second of two."""
    if (inner := bare(first.args[0])).target in PRODUCTS and lookup(inner.args[1]) is not None:
        return None
    nodes = [first, *between(first, first.args[1])]
    a, ids, turned_a = lookup(first.args[1])  # type: ignore[misc]
    second = follow(first, nodes)
    if second is None or second.target not in PRODUCTS or bare(second.args[0]) is not first:
        raise Outside("a product by one looked-up matrix, which no second one alone reads")
    if (other := lookup(second.args[1])) is None or other[1] is not ids:
        raise Outside(f"{second.name}: expected matrices looked up by {ids.name}")
    nodes += [second, *between(second, second.args[1])]
    b, _, turned_b = other
    x = first.args[0]
    if (plain := bare(x)) is not x and tensor(plain).ndim == 2:
        x = plain
    role: dict[str, Any] = {"x": x, "a": a, "b": b, "ids": ids}
    _require(first, second, role)
    last = _epilogue(second, nodes, role)
    flipped = frozenset(name for name, yes in (("a", turned_a), ("b", turned_b)) if yes)
    order = {node: i for i, node in enumerate(first.graph.nodes)}
    chosen = sorted(set(nodes), key=order.__getitem__)
    for node in chosen:
        if node is not last and set(node.users) - set(nodes):
            raise Outside(f"{node.name} is used elsewhere")
    region = Grouped(
        f"grouped_{last.name.lstrip('_')}", "grouped", tuple(chosen),
        tuple(dict.fromkeys(role.values())), (last,), (), role, flipped, tuple(tensor(last).shape),
    )  # fmt: skip
    region.sizes = sizes_for([*region.inputs, *region.nodes])
    return region


def _require(first: fx.Node, second: fx.Node, role: dict[str, fx.Node]) -> None:
    x, ids, h, y = (tensor(one) for one in (first.args[0], role["ids"], first, second))  # type: ignore
    if x.ndim != 3 or y.ndim != 3 or not same(x.shape[0], ids.shape[0]):
        raise Outside(f"{first.name}: expected a matrix for every entry of the first axis")
    if not same_shape(tensor(second.args[0]).shape, h.shape):  # type: ignore[arg-type]
        raise Outside(f"{second.name}: the first product is read in another shape")
    if x.dtype not in DTYPES:
        raise Outside(f"{first.name}: products of {x.dtype} are the framework's")
    if not isinstance(h.shape[2], int) or h.shape[2] > LARGEST:
        raise Outside(f"{first.name}: rank {h.shape[2]} is more than {LARGEST}")
    if not isinstance(y.shape[2], int) or not isinstance(x.shape[2], int):
        raise Outside(f"{first.name}: expected fixed channels")


def _epilogue(second: fx.Node, nodes: list[fx.Node], role: dict[str, fx.Node]) -> fx.Node:
    """The last node of a region: after the scale and the sum, where they follow."""
    last = second
    shape = tensor(second).shape
    flat = (shape[0], shape[2]) if same(shape[1], 1) else shape
    for target, name in ((aten.mul.Tensor, "scale"), (aten.add.Tensor, "base")):
        passed: list[fx.Node] = []
        user = follow(last, passed)
        if user is None or user.target is not target or user.kwargs or len(user.args) != 2:
            continue
        if not (same_shape(tensor(user).shape, shape) or same_shape(tensor(user).shape, flat)):
            break
        mine = passed[-1] if passed else last
        others = [one for one in user.args if one is not mine]
        other = others[0] if len(others) == 1 else None
        if not isinstance(other, fx.Node) or tensor(other).dtype != tensor(last).dtype:
            continue
        if name == "base":
            if not same_shape(tensor(other).shape, tensor(user).shape):
                break
            role[name] = other
        else:
            scale = by_ids(bare(other))
            width = tensor(other).shape
            if scale is None or scale[1] is not role["ids"] or tensor(scale[0]).ndim != 1 or (
                len(width) != tensor(user).ndim or any(not same(one, 1) for one in width[1:])
            ):  # fmt: skip
                continue
            role[name] = scale[0]
            nodes += [bare(other), *chained(other)]
        nodes += [*passed, user]
        last = user
    end: fx.Node = last
    while len(end.users) == 1 and reshapes(reader := next(iter(end.users))):
        end = reader
        if same_shape(tensor(end).shape, flat):
            nodes += [*chained(end, last)]
            return end
    return last
