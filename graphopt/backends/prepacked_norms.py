"""Batch norms that no convolution takes in, and the concatenations that grow in front of them.

    relu(batch_norm(x))                 =  relu(t + x s)            one multiply-add, relu in its place
    cat(a, b), cat(a, b, c), ...        =  parts of one tensor      into which each piece is copied once

s = weight / sqrt(var + eps) and t = bias - mean s are computed in float64 and stored. Densely connected
networks are made of these: every layer normalizes all that the layers before it gave. The framework copies
all of it again for every layer, and its norm reads what lies in a larger tensor three times as slowly.
Medians in us on one core in float32, batch 1, channels last:

                     batch norm, relu   multiply-add, relu   of a part    cat    one piece copied
    128 x 56 x 56          148                  65               84        45           26
    480 x 28 x 28          137                  59               57        49           17
    992 x 14 x 14           78                  34               32        33           13

A depthwise convolution by oneDNN with relu in the same call takes 111, 105 and 74.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


class Norms:
    """Rewrites one program in place; `names` are the states that it has read."""

    def __init__(
        self, program: fx.GraphModule, kinds: dict[fx.Node, Any], read: Callable[[str], Tensor]
    ) -> None:
        self.program, self.graph, self.kinds, self.read = program, program.graph, kinds, read
        self.names: list[str] = []
        self._scaled: dict[fx.Node, None] = {}  # multiply-adds

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.target is aten.batch_norm.default:
                self._norm(node)
        chains: list[list[fx.Node]] = []
        for node in self.graph.nodes:
            if node.target is aten.cat.default and self._grows(node):
                found = next((one for one in chains if _begins(one[-1], node)), None)
                if found is None:
                    chains.append([node])
                else:
                    found.append(node)
        for chain in chains:
            if len(chain) > 1:
                self._share(chain)

    # -- norms ------------------------------------------------------------------------------------

    def _norm(self, node: fx.Node) -> None:
        source, *states = node.args[:5]
        training, eps = node.args[5], float(node.args[7])  # type: ignore[arg-type]
        kind = self.kinds.get(source)  # type: ignore[arg-type]
        if training or kind is None or kind[1] != torch.float32 or len(kind[0]) < 3:
            return
        found = [self._state(one) for one in states]
        weight, bias, mean, var = found
        if mean is None or var is None or any(
            a is None and b is not None for a, b in zip(found, states, strict=True)
        ):  # fmt: skip
            return
        scale = torch.rsqrt(var.double() + eps)
        scale = scale if weight is None else scale * weight.double()
        shift = -mean.double() * scale
        shift = shift if bias is None else shift + bias.double()
        self.names += [one.target for one in states if isinstance(one, fx.Node)]  # type: ignore[misc]
        shape = (1, -1, *(1,) * (len(kind[0]) - 2))
        user = next(iter(node.users)) if len(node.users) == 1 else None
        with self.graph.inserting_before(node):
            terms = [self._kept(one.float().reshape(shape)) for one in (shift, scale)]
            new = self.graph.call_function(aten.addcmul.default, (terms[0], source, terms[1]))
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        self._scaled[new] = None
        self.kinds[new] = kind
        if user is not None and user.target is aten.relu.default:
            user.target = aten.relu_.default

    def _state(self, node: Any) -> Tensor | None:
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        found = self.read(str(node.target)).detach()
        return found if found.dtype == torch.float32 and found.device.type == "cpu" else None

    def _kept(self, tensor: Tensor) -> fx.Node:
        name = f"_norm_{sum(str(one.target).startswith('_norm_') for one in self.graph.nodes)}"
        setattr(self.program, name, tensor)
        return self.graph.create_node("get_attr", name)

    # -- concatenations ---------------------------------------------------------------------------

    def _grows(self, node: fx.Node) -> bool:
        """Whether a concatenation of channels of images is read by multiply-adds alone."""
        pieces, axis = node.args[0], node.args[1] if len(node.args) > 1 else 0
        kinds = [self.kinds.get(one) for one in (node, *pieces)]  # type: ignore[misc, union-attr]
        images = all(
            one is not None and len(one[0]) == 4 and one[1] == torch.float32 for one in kinds
        )
        return images and axis in (1, -3) and all(one in self._scaled for one in node.users)

    def _share(self, chain: Sequence[fx.Node]) -> None:
        """Each of a chain as a part of one tensor, which has the size of the last."""
        total, done = self.kinds[chain[-1]][0][1], 0
        whole: fx.Node | None = None
        for node in chain:
            pieces: Any = node.args[0]
            start = sum(self.kinds[one][0][1] for one in pieces[:done])
            with self.graph.inserting_before(node):
                whole = (
                    self.graph.call_function(begin, (list(pieces), total)) if whole is None
                    else self.graph.call_function(extend, (whole, list(pieces[done:]), start))
                )  # fmt: skip
                channels = self.kinds[node][0][1]
                part = self.graph.call_function(aten.narrow.default, (whole, 1, 0, channels))
            self.kinds[part] = self.kinds[node]
            node.replace_all_uses_with(part)
            self.graph.erase_node(node)
            done = len(pieces)


def _begins(shorter: fx.Node, longer: fx.Node) -> bool:
    """Whether a concatenation has the pieces of another one first, and more."""
    few: Any = shorter.args[0]
    many: Any = longer.args[0]
    return len(few) < len(many) and list(many[: len(few)]) == list(few)


def begin(pieces: Sequence[Tensor], total: int) -> Tensor:
    """An image of `total` channels, channels last, that begins with some pieces."""
    count, _, height, width = pieces[0].shape
    whole = pieces[0].new_empty((count, height, width, total)).permute(0, 3, 1, 2)
    return extend(whole, pieces, 0)


def extend(whole: Tensor, pieces: Sequence[Tensor], start: int) -> Tensor:
    """`whole`, with pieces copied to its channels from `start` on; what is in front stays."""
    for one in pieces:
        whole.narrow(1, start, one.shape[1]).copy_(one)
        start += one.shape[1]
    return whole
