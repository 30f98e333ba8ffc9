"""What a scan reads and writes: tensors, elements of tensors along an axis, stacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from graphopt.backends.triton.families.common import tensor
from graphopt.backends.triton.scalars import literal, register, spelled
from graphopt.ir.recurrence.chain import Chain
from graphopt.ir.recurrence.steps import element

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Read:
    """An operand of the kernel: a tensor, `axis` and `first` telling an element of it, `by` the
    distance of the elements of successive steps; or the tensors of every step."""

    name: str
    nodes: tuple[fx.Node, ...]
    axis: int | None = None
    first: int = 0
    by: int = 0

    @classmethod
    def of(cls, name: str, nodes: Sequence[fx.Node]) -> Read:
        places = [element(node) for node in nodes]
        known = [one for one in places if one is not None]
        if len(known) == len(nodes) and len({one[:2] for one in known}) == 1:
            steps = [one[2] for one in known]
            by = steps[1] - steps[0] if len(steps) > 1 else 0
            if steps == [steps[0] + by * i for i in range(len(steps))]:
                return cls(name, (known[0][0],), known[0][1], steps[0], by)
        return cls(name, tuple(nodes))

    @property
    def several(self) -> bool:
        return len(self.nodes) > 1

    def view(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0] if self.axis is None else tensors[0].select(self.axis, self.first)

    def stride(self, value: Tensor) -> int:
        """Elements from one step to the next."""
        return 0 if self.axis is None else value.stride(self.axis) * self.by


@dataclasses.dataclass(frozen=True)
class Written:
    """An output: root `root` of `step`, or of every step stacked along `axis` (`step` is None), the
    last one first if `backwards`."""

    name: str
    node: fx.Node
    root: int
    step: int | None
    axis: int = 0
    backwards: bool = False

    def parts(self) -> list[fx.Node]:
        """What is stacked, in the order of time."""
        whole = stacked(self.node)
        assert whole is not None
        return whole[1][::-1] if self.backwards else whole[1]


def stacked(node: fx.Node) -> tuple[int, list[fx.Node]] | None:
    """(axis, what is stacked along it) of a node."""
    if node.target not in (aten.stack.default, aten.cat.default):
        return None
    parts = list(node.args[0])  # type: ignore
    axis = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore
    axis %= tensor(node).ndim
    if node.target is aten.stack.default:
        return axis, parts
    if all(one.target is aten.unsqueeze.default for one in parts):
        if {one.args[1] % tensor(one).ndim for one in parts} == {axis}:
            return axis, [one.args[0] for one in parts]
    return None


def written(steps: Chain) -> tuple[Written, ...]:
    """The outputs of a chain, in graph order: stacks of a root over all steps where the graph has them,
    else single nodes that are read outside."""
    place: dict[fx.Node, tuple[int, int]] = {}  # (root, step)
    for number, nodes in enumerate(steps.roots):
        place |= {node: (number, step) for step, node in enumerate(nodes, steps.start) if node}
    if steps.start:
        place |= {node: (number, 0) for number, node in enumerate(steps.first_roots)}
    stacks: dict[fx.Node, Written] = {}
    for node in place:
        for user in node.users:
            for stack in (user, *user.users):
                if (one := _as_stack(stack, steps, place)) is not None:
                    stacks[stack] = one
    gathered = {id(part) for stack in stacks for part in stack.all_input_nodes}
    inside = {*steps.nodes, *stacks}

    def is_read(node: fx.Node) -> bool:
        """Whether something reads it as it is, not only in a stack."""
        between = [user for user in node.users if user not in inside]
        return any(id(user) not in gathered or set(user.users) - set(stacks) for user in between)

    results = [*stacks.values(), *(Written("", n, *place[n]) for n in place if is_read(n))]
    order = {node: i for i, node in enumerate(steps.nodes[0].graph.nodes)}
    results.sort(key=lambda one: order[one.node])
    return tuple(dataclasses.replace(one, name=f"y{i}") for i, one in enumerate(results))


def _as_stack(node: fx.Node, steps: Chain, place: dict[fx.Node, tuple[int, int]]) -> Written | None:
    """A node that stacks one root of all steps, in the order of time or backwards."""
    if (whole := stacked(node)) is None or len(whole[1]) != steps.steps:
        return None
    axis, parts = whole
    times = [place.get(one, (0, -1))[1] for one in parts]
    backwards = times[0] != 0
    if times != list(range(steps.steps))[:: -1 if backwards else 1]:
        return None
    later = [one for one, time in zip(parts, times, strict=True) if time >= steps.start]
    if len(roots := {place[one][0] for one in later}) != 1:
        return None
    return Written("", node, roots.pop(), None, axis, backwards)


def axes_by_stride(value: Tensor) -> list[int]:
    """The axes of a tensor, the one with the longest stride first."""
    return sorted(range(value.ndim), key=value.stride, reverse=True)


def full_text(value: float, dtype: torch.dtype) -> str:
    held = register(dtype)
    return f"tl.full([BLOCK], {literal(value, held)}, {spelled(held)})"
