"""Parameters that are made of integer codes: what a model stores in a byte or less per element.

    q, scale  ->  W  ->  W + D        the weight that codes are decoded to, and what merges made of it

Storing W + D in full takes several times the memory, which is for the user to ask for; so is rounding it
to codes again (`graphopt.ir.codes`), which loses part of D.
"""

from __future__ import annotations

import dataclasses

import networkx
import torch
from torch import Tensor, fx

from graphopt.ir import ops
from graphopt.ir.builder import Builder
from graphopt.ir.codes import Codes, Decoder, NoCodes, Rounded
from graphopt.ir.graph import Graph, is_overload
from graphopt.ir.sizes import same_shape
from graphopt.ir.storage import parameters_read, readers_of, states_of

ALLOWED = "codes may be rounded again"  # in the meta of a state: an `Allowed`
CHEAP = 1 << 18  # elements of a weight that is rounded to say what the error would be
MOVEMENT = (ops.Reshape, ops.Permute, ops.Slice, ops.Select, ops.Detach, ops.Copy, ops.Cast)
SPREADING = (*MOVEMENT, ops.Expand, ops.Repeat, ops.RepeatInterleave, ops.Index, ops.IndexSelect)


@dataclasses.dataclass(frozen=True)
class Allowed:
    """That codes may be rounded again where the error is `budget` of the effect at most; `states` are
    those that they are decoded with. `bits` of a code, if not all that are stored."""

    budget: float
    states: frozenset[str]
    bits: int | None = None


@dataclasses.dataclass(frozen=True)
class Merged:
    """Codes, and what takes the place of the weight that they are decoded to."""

    codes: Codes
    weight: fx.Node

    def rounded(self) -> Rounded:
        return self.codes.rounded(Decoder(self.codes.graph, self.weight)({}))


def compressed(operand: fx.Node) -> fx.Node | None:
    """The largest state in a byte per element, or with several in one, that is expanded to a wider
    parameter."""
    value, found = operand.meta["val"], None
    for state in states_of(operand):
        stored = state.meta["val"]
        narrow = stored.dtype.itemsize == 1 and stored.dtype != torch.bool
        if narrow and value.dtype.itemsize > 1 and _takes_more(value, stored):
            if found is None or stored.numel() > found.meta["val"].numel():
                found = state
    return found


def _takes_more(value: Tensor, stored: Tensor) -> bool:
    """Whether a value takes more bytes than some that are stored, which may be all there is of it."""
    bits = 8 * stored.numel()
    return value.numel() <= bits < 8 * value.numel() * value.dtype.itemsize


def decoding(graph: Graph, codes: fx.Node) -> frozenset[str]:
    """The states that codes are decoded with: those of the reader's operand that has the fewest."""
    weights = [
        frozenset(str(one.target) for one in states)
        for node in set(parameters_read(graph, graph.calls))
        if codes in (states := states_of(node))
    ]
    return min(weights, key=lambda one: (len(one), sorted(one)), default=frozenset())


def merged(graph: Graph, operand: fx.Node, codes: fx.Node, allowed: Allowed) -> Merged | None:
    """What the weight that `codes` are decoded to became, on the way to a parameter-only value; None if
    that is the weight itself, or other axes of it.

    Raises:
        NoCodes: if it cannot be told.
    """
    way = [one for one in _passed(operand, codes) if one.meta["val"].is_floating_point()]
    here = 0
    while here + 1 < len(way) and _decodes(graph, way[here + 1], way[here], allowed.states):
        here += 1
    last = len(way) - 1
    while last > here and _is(graph, way[last], MOVEMENT):
        last -= 1
    if last <= here:
        return None
    shape = way[here].meta["val"].shape
    alike = [one for one in way[last:] if same_shape(one.meta["val"].shape, shape)]
    if not alike:
        raise NoCodes(f"what {codes.target} are decoded to, {list(shape)}, changes its shape")
    found = Codes(graph, way[here], codes, allowed.bits)
    if found.scale is None and not found.read.states >= allowed.states:
        raise NoCodes(f"nothing that is stored is the scale of {codes.target}")
    if found.scale and readers_of(graph, graph.read(found.scale)) - readers_of(graph, codes):
        found.keep_scale()
    return Merged(found, alike[0])


def _decodes(graph: Graph, node: fx.Node, before: fx.Node, states: frozenset[str]) -> bool:
    """Whether a node is one more step of a decoding that has come to `before`: it moves the values, or
    changes each by what is spread over many, of some states."""
    if not {str(one.target) for one in states_of(node)} <= states:
        return False
    others = [one for one in node.all_input_nodes if one is not before]
    pointwise = is_overload(node.target) and torch.Tag.pointwise in node.target.tags  # type: ignore[union-attr]
    size = node.meta["val"].numel()
    return (pointwise or _is(graph, node, MOVEMENT)) and all(
        _is_spread(graph, one, size) for one in others
    )


def _is_spread(graph: Graph, node: fx.Node, size: int) -> bool:
    """Whether a value is made of half as many elements, if any, by data movement alone."""
    while 2 * node.meta["val"].numel() > max(size, 2):
        if not _is(graph, node, SPREADING):
            return False
        node = node.all_input_nodes[0]
    return True


def _is(graph: Graph, node: fx.Node, kinds: tuple[type[ops.Op], ...]) -> bool:
    return isinstance(Builder(graph, node).view(node), kinds)


def _passed(operand: fx.Node, codes: fx.Node) -> list[fx.Node]:
    """The nodes that all ways from `codes` to `operand` lead through, both ends included."""
    ways = networkx.DiGraph()
    stack, seen = [operand], {operand}
    while stack:
        node = stack.pop()
        for one in node.all_input_nodes:
            ways.add_edge(node, one)
            if one not in seen:
                seen.add(one)
                stack.append(one)
    kept = ways.subgraph({codes, *networkx.ancestors(ways, codes)})
    above, found = networkx.immediate_dominators(kept, operand), [codes]
    while found[-1] is not operand:
        found.append(above[found[-1]])
    return found


def refusal(graph: Graph, operand: fx.Node, codes: fx.Node) -> str:
    """Why a parameter made of codes may not be stored; empty if it is to be rounded to codes again."""
    allowed: Allowed | None = codes.meta.get(ALLOWED)
    value = operand.meta["val"]
    reason = f"{codes.target} would be stored as {value.dtype}"
    if allowed is None:
        reason += " (materialize{dequantize=true} before it allows that)"
        if value.numel() > CHEAP:
            return reason
    given = allowed or Allowed(0, decoding(graph, codes))
    try:
        found = merged(graph, operand, codes, given)
        if found is None:
            return reason
        error = found.rounded().error
    except NoCodes as none:
        return reason if allowed is None else f"{reason}, and cannot be rounded again: {none}"
    off = f"it would be off by {error:.2f} of what is merged"
    if allowed is None:
        return f"{reason}; rounded to codes again (requantize before it), {off}"
    if error <= allowed.budget:
        return ""
    return f"rounded to {codes.target} again, {off}; the budget of requantize is {allowed.budget:g}"
