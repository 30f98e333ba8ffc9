"""Groups of entries of a model's own parameters: what is measured, shrunk and set to zero as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.ir import ops
from graphopt.ir.builder import Builder
from graphopt.ir.channels import Groups
from graphopt.passes.pruning.zeros import ZeroInvariant, zero_invariant
from graphopt.training.branches import Branch


class TrainingError(ValueError):
    """A model that is not the one the groups are of, or options that cannot be met."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Entries of an axis of a parameter, each with the group that it belongs to.

    An entry of several groups is listed once for each.
    """

    parameter: nn.Parameter
    axis: int
    entries: Tensor
    groups: Tensor

    def per_entry(self, values: Tensor) -> Tensor:
        """The sum of all elements of every entry, for a tensor of the parameter's shape."""
        values = values.reshape(-1) if values.ndim == 0 else values
        others = [one for one in range(values.ndim) if one != self.axis]
        return values.sum(others) if others else values

    def laid_out(self, values: Tensor) -> Tensor:
        """A vector with a value for every entry, in a shape that broadcasts with the parameter."""
        ndim = self.parameter.ndim
        return values.view([-1 if i == self.axis else 1 for i in range(ndim)])

    @property
    def size(self) -> int:
        return self.parameter.shape[self.axis] if self.parameter.ndim else 1


class ParameterGroups:
    """Groups of entries of parameters, in families of which a fraction may become zero.

    Attributes:
        parts: which entries belong to which group, a part for every axis of a parameter.
        count: the number of groups; all vectors over groups have this length.
        families: the groups of every family, as indices.
        labels: what a group stands for: the label of a channel group, or the number of a branch.
        sizes: the number of elements of every group.
        excluded: what has no group, and why.
    """

    def __init__(
        self, parts: Sequence[Part], families: Sequence[Sequence[int]], labels: Sequence[int],
        excluded: Iterable[tuple[str, str]] = (),
    ) -> None:  # fmt: skip
        self.parts = list(parts)
        self.count = len(labels)
        self.families = [torch.tensor(list(one), dtype=torch.long) for one in families]
        self.labels = list(labels)
        self.excluded = list(excluded)
        self.parameters = list({id(one.parameter): one.parameter for one in parts}.values())
        self.sizes = self.sums(torch.ones_like)

    def __len__(self) -> int:
        return self.count

    def __str__(self) -> str:
        lines = [f"{self.count} groups in {len(self.families)} families"]
        return "\n".join([*lines, *(f"excluded: {what}: {why}" for what, why in self.excluded)])

    def sums(self, of: Callable[[nn.Parameter], Tensor]) -> Tensor:
        """For every group, the sum of all its elements of tensors in the shapes of the parameters."""
        first = next(iter(self.parameters), torch.zeros(0))
        dtype = torch.promote_types(first.dtype, torch.float32)
        total = torch.zeros(self.count, dtype=dtype, device=first.device)
        for part in self.parts:
            along = part.per_entry(of(part.parameter).to(dtype))
            total = total.index_add(0, part.groups, along[part.entries])
        return total

    @torch.no_grad()
    def norms(self) -> Tensor:
        """The l2 norm of every group."""
        return self.sums(lambda one: one.square()).sqrt()

    @torch.no_grad()
    def zero(self) -> Tensor:
        """Whether every element of a group is exactly zero."""
        return self.sums(lambda one: one != 0) == 0

    @torch.no_grad()
    def scale_(self, factors: Tensor) -> None:
        """Multiply all elements of every group by its factor; 0 makes them zero, whatever they are."""
        for part in self.parts:
            given = factors[part.groups].to(part.parameter.dtype)
            along = torch.ones(part.size, dtype=given.dtype, device=given.device)
            along = along.scatter_reduce(0, part.entries, given, "prod")
            along = part.laid_out(along)
            part.parameter.copy_((part.parameter * along).masked_fill(along == 0, 0.0))

    def within(self, others: ParameterGroups, chosen: Tensor) -> Tensor:
        """Which of these groups are all part of some of the other ones."""
        covered = {
            id(one): torch.zeros(one.shape, dtype=torch.bool, device=one.device)
            for one in self.parameters
        }
        for part in others.parts:
            if id(part.parameter) in covered:
                entries = part.entries[chosen[part.groups]]
                along = torch.zeros(part.size, dtype=torch.bool, device=entries.device)
                along[entries] = True
                covered[id(part.parameter)] |= part.laid_out(along)
        return self.sums(lambda one: ~covered[id(one)]) == 0


def zero_invariant_groups(
    groups: Groups, model: nn.Module, inputs: Sequence[Any] | None = None
) -> ParameterGroups:
    """The parameters that make every channel of a model: once they are zero, so is the channel, and
    removing it changes no output (zero-invariant groups, arXiv 2107.07467).

    Args:
        groups: `graphopt.channel_groups(model.eval(), args)`.
        model: the model that is trained; the result refers to its own parameters.
        inputs: flat inputs to find them with; by default generic ones of the example's sizes.

    Raises:
        TrainingError: if the model is not that of the groups, or the graph was captured in training
            mode, where norms take the statistics of the batch.
    """
    _check_eval(groups)
    known = zero_invariant(groups, inputs)
    named = _named(groups, model, {name for name, _ in known.producers})
    frozen = _frozen(known, named)
    families = [family.labels.tolist() for family in groups.families()]
    usable = [[one for one in family if one not in known.refused and one not in frozen]
              for family in families]  # fmt: skip
    labels = [label for family in usable for label in family]
    index = {label: number for number, label in enumerate(labels)}
    parts = []
    for axis in sorted(known.producers):
        pairs = [
            (e, index[g]) for e, g in zip(*map(list, known.pairs(axis)), strict=True) if g in index
        ]
        if pairs:
            parameter = named[axis[0]]
            entries, members = torch.tensor(pairs, device=parameter.device).unbind(1)
            parts.append(Part(parameter, axis[1], entries, members))
    excluded = []
    for family in groups.families():
        reasons = {known.refused.get(one.label) or frozen.get(one.label) for one in family} - {None}
        what = ", ".join(f"{one.name}[{one.axis}]" for one in family[0].members)
        excluded += [(what, str(reason)) for reason in sorted(map(str, reasons))]
    return ParameterGroups(
        parts, [[index[one] for one in family] for family in usable if family], labels, excluded
    )


def branch_groups(branches: Sequence[Branch], groups: Groups, model: nn.Module) -> ParameterGroups:
    """The parameters of every branch, a group for each; all are of one family.

    Raises:
        TrainingError: if the model is not that of the groups.
    """
    named = _named(groups, model, {name for one in branches for name in one.parameters})
    parts = []
    for number, branch in enumerate(branches):
        for name in branch.parameters:
            parameter = named[name]
            size = parameter.shape[0] if parameter.ndim else 1
            entries = torch.arange(size, device=parameter.device)
            parts.append(Part(parameter, 0, entries, torch.full_like(entries, number)))
    return ParameterGroups(parts, [range(len(branches))], range(len(branches)))


def joined(one: ParameterGroups, other: ParameterGroups) -> ParameterGroups:
    """The groups of both; those of `other` are counted on from those of `one`."""
    moved = [dataclasses.replace(part, groups=part.groups + len(one)) for part in other.parts]
    families = [family.tolist() for family in one.families]
    families += [(family + len(one)).tolist() for family in other.families]
    return ParameterGroups(
        [*one.parts, *moved], families, [*one.labels, *other.labels],
        [*one.excluded, *other.excluded],
    )  # fmt: skip


def _check_eval(groups: Groups) -> None:
    for node in groups.graph.calls:
        op = Builder(groups.graph, node).view(node)
        if isinstance(op, ops.BatchNorm) and op.training:
            raise TrainingError(
                f"{groups.graph.where(node)} takes the statistics of the batch: find the groups "
                "of the model in eval mode, graphopt.channel_groups(model.eval(), args)"
            )


def _named(groups: Groups, model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """The model's own parameters under the names of the graph."""
    found = dict(model.named_parameters(remove_duplicate=False))
    for alias, name in groups.graph.aliases.items():
        if alias in found and name in found and found[alias] is not found[name]:
            raise TrainingError(f"{alias} and {name} are one parameter in the groups, not here")
    for name in sorted(names):
        if name not in found:
            raise TrainingError(
                f"{type(model).__name__} has no parameter {name}; expected the model that the "
                "groups were found in"
            )
        expected = tuple(groups.states[name].shape)
        if tuple(found[name].shape) != expected:
            raise TrainingError(
                f"{name} has shape {list(found[name].shape)}, expected {list(expected)} as in the "
                "model that the groups were found in"
            )
    return found


def _frozen(known: ZeroInvariant, named: dict[str, nn.Parameter]) -> dict[int, str]:
    """Groups with a producer that is not trained."""
    return {
        label: f"{axis[0]} is not trained"
        for axis in sorted(known.producers) if not named[axis[0]].requires_grad
        for label in known.pairs(axis)[1].tolist()
    }  # fmt: skip
