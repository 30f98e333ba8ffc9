"""A graph with integers around its maps, in the operators that PyTorch's own export of quantized models has.

    y = conv(dequantize(quantize(x)), dequantize(codes)) + bias

By itself this computes in float32 what an integer kernel computes: every backend can run it, and those that
know the pattern (Inductor, frozen; prepacked) replace it by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt.ir.builder import Builder
from graphopt.ir.graph import Graph, State
from graphopt.passes.quantizing.places import Places
from graphopt.passes.quantizing.scales import LEVELS, Affine

library = torch.ops.quantized_decomposed
UNSIGNED = {"quant_min": 0, "quant_max": LEVELS, "dtype": torch.uint8}
SIGNED = {"quant_min": -128, "quant_max": 127, "dtype": torch.int8}
Codes = tuple[Tensor, Tensor]  # int8 [O, ...], float32 [O]


class Rewriting:
    """One copy of a graph, some maps of it on integers."""

    def __init__(
        self, places: Places, integers: Mapping[fx.Node, Affine],
        codes: Mapping[fx.Node, Codes], biases: Mapping[fx.Node, Tensor],
    ) -> None:  # fmt: skip
        self.places, self.integers, self.codes, self.biases = places, integers, codes, biases
        self.graph = places.graph.clone()
        self.twin = dict(zip(places.graph.nodes, self.graph.nodes, strict=True))
        self._weights: dict[fx.Node, fx.Node] = {}
        self._names: list[tuple[str, str]] = []

    def result(self) -> Graph:
        graph, order = self.graph, list(self.places.graph.nodes)
        for value in order:
            if value in self.places.values:
                self._round(value)
        for node in order:
            if node in self.places.maps:
                self._map(node)
        aliases = dict(graph.aliases)
        graph.eliminate_dead_code()
        graph.drop_unread_states()
        for name, wish in self._names:
            if name in graph.states and wish not in graph.states:
                graph.rename_state(name, wish)
        graph.aliases = {a: twin for a, twin in aliases.items() if twin in graph.states}
        return graph

    def _round(self, value: fx.Node) -> None:
        """Let those who read integers read what the integers of a value stand for."""
        twin, readers = self.twin[value], [
            one for one in value.users if self.places.reads_integers(one, value)
        ]  # fmt: skip
        # Behind movement the same ones as in front of it, so that nothing is rounded twice.
        by = self.integers.get(self.places.root(value))
        if by is None or not readers:
            return
        behind = twin.next
        while behind.op in ("placeholder", "get_attr"):
            behind = behind.next
        at = Builder(self.graph, behind)
        how = {"scale": by.scale, "zero_point": by.zero, **UNSIGNED}
        codes = at.call(library.quantize_per_tensor.default, {"input": at.value(twin), **how})
        real = at.call(library.dequantize_per_tensor.default, {"input": codes, **how})
        for one in (codes.node, real.node):
            one.meta["where"] = self.graph.where(twin)
            one.meta.pop("made_by", None)
        for user in readers:
            self.twin[user].replace_input_with(twin, real.node)

    def _map(self, node: fx.Node) -> None:
        twin = self.twin[node]
        at = Builder(self.graph, twin)
        op: Any = self.places.view(node)
        weight = op.weight.node
        if weight not in self._weights:
            self._weights[weight] = self._weight(at, weight, self._name(node, weight, "weight"))
        changed = at.view(twin).replace(weight=at.value(self._weights[weight]))  # type: ignore[union-attr]
        if node in self.biases:
            changed = changed.replace(bias=at.value(self._bias(node, op)))
        new = at.emit(changed, at.view(twin)).node
        inherited = {key: one for key, one in twin.meta.items() if key != "val"}
        new.meta.update(inherited)
        twin.replace_all_uses_with(new)
        self.graph.fx.erase_node(twin)
        self.twin[node] = new

    def _weight(self, at: Builder, weight: fx.Node, name: str) -> fx.Node:
        codes, scale = self.codes[weight]
        zeros = torch.zeros(len(scale), dtype=torch.int64)
        tensors = {"": codes, "_scale": scale, "_zero_point": zeros}
        read = [self._state(f"{name}{end}", one) for end, one in tensors.items()]
        arguments = dict(zip(("input", "scales", "zero_points"), map(at.value, read), strict=True))
        return at.call(
            library.dequantize_per_channel.default, {**arguments, "axis": 0, **SIGNED}
        ).node

    def _bias(self, node: fx.Node, op: Any) -> fx.Node:
        before = None if op.bias is None else op.bias.node
        tensor = nn.Parameter(self.biases[node].float(), requires_grad=False)
        return self._state(self._name(node, before, "bias"), tensor, "parameter")

    def _name(self, node: fx.Node, operand: fx.Node | None, field: str) -> str:
        if operand is not None and operand.op == "get_attr":
            return str(operand.target)
        return f"{self.graph.where(self.twin[node])}.{field}".lstrip(".")

    def _state(self, wish: str, tensor: Tensor, kind: str = "buffer") -> fx.Node:
        node = self.graph.add_state(f"{wish}_int8", State(tensor, kind))
        self._names.append((str(node.target), wish))
        return node
