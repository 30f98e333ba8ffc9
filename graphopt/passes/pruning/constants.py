"""Channels that are the same whatever the input, folded forward into what reads them.

    W relu(bn(x)) + b,  gamma_k = 0   =>   channel k is relu(beta_k):   b' = b + W_k relu(beta_k)

Which entries of a value depend on the input is followed through the graph, entry by entry: an indicator
of "depends" is moved as values are, summed as linear maps sum, with an indicator of nonzero weights in
place of the weights, and joined where entries meet. So a border of padded zeros, which sees less of a
constant channel, is told from the rest: a bias cannot hold it, and such a map is left as it is.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from graphopt.ir import ops
from graphopt.ir.builder import Builder
from graphopt.ir.channels import Groups
from graphopt.ir.channels.trace import MOVEMENT, POINTWISE
from graphopt.ir.interpret import Interpreter, is_getitem
from graphopt.ir.ops.base import hint
from graphopt.passes.pruning.evidence import Evidence, example
from graphopt.passes.pruning.maps import LinearMap, constant, maps

# What sums or moves entries, so that an indicator may run through it as it is.
_SUMS = (*MOVEMENT, ops.Cat, ops.Stack, ops.Pad, ops.Sum, ops.Mean, ops.AvgPool,
         ops.AdaptiveAvgPool, ops.MaxPool)  # fmt: skip


def constants(evidence: Evidence, gone: Collection[int]) -> dict[str, Tensor]:
    """What the channels that go and do not depend on the input add to every map that reads them goes
    into its bias, or into the mean of the batch norm behind it. Needs no data; exact."""
    run = _Constants(evidence.groups, gone)
    run.run(example(evidence.graph))
    return run.biases


class _Constants(Interpreter):
    """Runs the graph on some input, and knows which entries would be the same on any."""

    def __init__(self, groups: Groups, gone: Collection[int]) -> None:
        super().__init__(groups.graph, lifted=True, writes=False)
        self.groups, self.lost = groups, groups.lost(gone)
        self.maps = {one.node: one for one in maps(groups.graph)}
        self.biases: dict[str, Tensor] = {}
        self.depends: dict[fx.Node, Any] = {}  # 1 for every entry that depends on the input, else 0
        self._builder = Builder(groups.graph, groups.graph.output)

    @torch.no_grad()
    def run(self, inputs: Any, seed: int | None = 0) -> tuple[Any, ...]:
        return super().run(inputs, seed)

    def call(self, node: fx.Node, env: Any) -> Any:
        value = super().call(node, env)
        if node in self.maps:
            self._fold(self.maps[node], env)
        found = value[0] if isinstance(value, (tuple, list)) else value
        if isinstance(found, Tensor):
            self.depends[node] = self._followed(node, env, value)
        return value

    # -- which entries depend on the input --------------------------------------------------------

    def _indicator(self, node: fx.Node, value: Any) -> Any:
        if node.op == "get_attr" or self.graph.is_constant(node):
            return torch.zeros_like(value, dtype=torch.float64)
        known = self.depends.get(node)
        return torch.ones_like(value, dtype=torch.float64) if known is None else known

    def _followed(self, node: fx.Node, env: Any, value: Any) -> Any:
        op = self._builder.view(node)
        operands = {one: self._indicator(one, env[one]) for one in node.all_input_nodes
                    if isinstance(env[one], (Tensor, list, tuple))}  # fmt: skip
        if is_getitem(node) or isinstance(op, _SUMS):
            floating = {one: found for one, found in operands.items()
                        if isinstance(found, (list, tuple)) or env[one].is_floating_point()}  # fmt: skip
            return _nonzero(super().call(node, {**env, **floating}))
        if isinstance(op, (ops.Linear, ops.Conv)):
            return self._of_map(op, operands, env)
        if isinstance(op, ops.BatchNorm) and not op.uses_batch_statistics:
            found = operands[op.input.node]
            if op.weight is not None:
                found = found * _nonzero(env[op.weight.node]).view(-1, *(1,) * (found.ndim - 2))
            return found
        if isinstance(op, POINTWISE):
            found = torch.zeros_like(value, dtype=torch.float64)
            for one in operands.values():
                found = torch.maximum(found, one)
            if isinstance(op, ops.Mul):  # a constant zero hides what it is multiplied with
                for one, other in operands.items():
                    found = found * torch.maximum(other, _nonzero(env[one]))
            return found
        return None

    def _of_map(self, op: Any, operands: Any, env: Any) -> Any:
        """An output depends on the input where a nonzero weight meets an entry that does."""
        if op.weight.node not in operands or bool(operands[op.weight.node].any()):
            return None
        if op.bias is not None and bool(operands[op.bias.node].any()):
            return None
        indicators = {op.input.node: operands[op.input.node],
                      op.weight.node: _nonzero(env[op.weight.node])}  # fmt: skip
        return _nonzero(_without_bias(op, indicators))

    # -- what they add -----------------------------------------------------------------------------

    def _fold(self, found: LinearMap, env: Any) -> None:
        kept = self.groups.kept(found.weight, self.lost).get(found.into)
        held = constant(self.graph, found)
        op: Any = found.op
        if (
            kept is None
            or held is None
            or found.out is None
            or not isinstance(op, (ops.Linear, ops.Conv))
        ):
            return
        value, axis = env[found.input], found.channels % env[found.input].ndim
        stays = np.ones(hint(value.shape[axis]), dtype=bool)
        stays[self._away(found, axis)] = False
        others = [one for one in range(value.ndim) if one != axis]
        depends = self._indicator(found.input, value).amax(others).bool()
        folded = ~(depends | torch.from_numpy(stays).to(depends.device))
        shape = [-1 if one == axis else 1 for one in range(value.ndim)]
        states = {found.input: value * folded.view(shape), found.weight: env[found.weight]}
        added = _without_bias(op, states).movedim(found.out, -1).flatten(0, -2)
        if not len(added) or not bool(folded.any()):
            return
        if not torch.allclose(added, added[:1].expand_as(added), rtol=1e-12, atol=1e-300):
            return  # a border sees another sum than the rest
        (state, sign) = held
        name = str(state.target)
        old = self.graph.states[name].tensor.detach()
        now = self.biases.get(name, old).double() + sign * added[0].to(old.device)
        self.biases[name] = now.to(old)

    def _away(self, found: LinearMap, axis: int) -> Any:
        kept = self.groups.kept(found.input, self.lost).get(axis)
        size = hint(found.input.meta["val"].shape[axis])
        return [] if kept is None else np.setdiff1d(np.arange(size), kept)


def _without_bias(op: Any, states: dict[fx.Node, Tensor]) -> Tensor:
    """A linear map without its bias, of other operands."""
    plain = op.replace(bias=None)
    target, arguments = plain.build()
    given = {"input": states[op.input.node], "weight": states[op.weight.node]}
    found: Tensor = target(**{**arguments, **given})
    return found


def _nonzero(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_nonzero, value))
    return (value != 0).double()
