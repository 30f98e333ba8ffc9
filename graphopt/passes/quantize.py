"""Convolutions and linear maps in int8, for processors that multiply bytes faster than floats.

    W x + b  ->  s_x s_w (q_w (q_x - z)) + b'      |difference| / |f(x)| <= budget for every output, measured

Weights are int8 with a scale for every output channel, activations uint8 with one scale and zero point, both
fitted to the data (`graphopt.passes.quantizing.scales`). What a map reads is rounded where the map before it
writes it, sums behind maps and max pooling included, so that integers go from kernel to kernel; everything
else is float32 as it was. Rounding shifts the mean of an output channel; the bias takes that back as far as
the data tells it (Nagel et al., 2019, section 4.2, measured instead of derived):

    b' = b - E[(W_q x_q) - W x]

Channels that lie between two maps get one range first, where that makes the error smaller
(`graphopt.passes.quantizing.equalizing`). Whatever a comparison or a loop over time depends on stays in
float32. Where the whole is over the budget, the maps that alone put the outputs off most stay in float32, as
many as it takes. The quantized graph is another function: it is what later passes and backends are judged
against. See docs/int8.md.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir import ops
from graphopt.ir.driver import Session
from graphopt.ir.graph import Graph
from graphopt.ir.interpret import Evaluator
from graphopt.ir.provenance import origins
from graphopt.passes.precision.measured import Measured, distance, mixed, outputs
from graphopt.passes.quantizing.equalizing import equalized
from graphopt.passes.quantizing.observing import Noise, noise, ranges
from graphopt.passes.quantizing.places import Places, candidates
from graphopt.passes.quantizing.rewriting import Codes, Rewriting
from graphopt.passes.quantizing.scales import Affine, weight_codes


@dataclasses.dataclass(frozen=True)
class Quantize(Measured):
    """Convolutions and linear maps compute in int8, where the outputs stay within a budget."""

    name = "quantize"
    budget: float = 0.1  # of the error of any output, relative in the 2-norm
    keep: str = ""  # patterns of modules that stay in float32, as in "conv1;head.*"
    correct: bool = True  # whether biases take back the mean error of each channel
    equalize: bool = True  # whether channels get one range, where that helps
    force: bool = False  # also where integers are not known to be faster

    def run(self, session: Session) -> None:
        graph = session.graph
        if session.applications.exhausted:
            return
        if reason := mixed(graph) or ("" if self.force else unsupported(graph.device)):
            return self.refuse(session, reason)
        maps, refused = candidates(graph, slow=self.force)
        kept, unknown = self._kept(graph, maps)
        for node, reason in {**refused, **kept}.items():
            self.refuse(session, reason, node)
        maps = [one for one in maps if one not in kept]
        if not maps:
            return self.refuse(session, "there is nothing to compute in int8")
        data = self.inputs(session)
        search = _Search(graph, maps, data, self.correct)
        if self.equalize and (even := equalized(graph, data)) is not None:
            twin = dict(zip(graph.nodes, even.nodes, strict=True))
            other = _Search(even, [twin[one] for one in maps], data, self.correct)
            if other.error < search.error:
                search = other
        result, error, left = search.within(self.budget)
        origin = dict(zip(search.graph.nodes, graph.nodes, strict=True))
        for node, reason in left.items():
            self.refuse(session, reason, origin[node])
        done = f"{len(maps) - len(left)} of {len(maps) + len(kept)} maps"
        done += ", channels equalized" if search.graph is not graph else ""
        done += "".join(f", none is called {one!r}" for one in unknown)
        said = self.said(session, done, error, search.before)
        if result is None:
            return self.refuse(session, f"{said}; the budget is {self.budget:g}", error=error)
        self.commit(session, result, said, error)
        return None

    def _kept(self, graph: Graph, maps: Sequence[fx.Node]) -> tuple[dict[fx.Node, str], list[str]]:
        """The maps that stay, for a pattern names them or what was merged into them, and why; and the
        patterns that name none."""
        found: dict[fx.Node, str] = {}
        unknown = []
        for pattern in filter(None, map(str.strip, self.keep.split(";"))):
            named = [one for one in maps if fnmatch.filter(origins(graph, [one]), pattern)]
            found |= dict.fromkeys(named, f"it is kept by {pattern!r}")
            unknown += [] if named else [pattern]
        return found, unknown


class _Search:
    """What is known about the maps of one graph, and the graphs with some of them on integers."""

    def __init__(
        self, graph: Graph, maps: list[fx.Node], data: list[list[Any]], correct: bool
    ) -> None:
        self.graph, self.data = graph, data
        self.truth = [outputs(graph, one, lifted=True) for one in data]
        self.before = self._error(graph)
        self.unknown: dict[fx.Node, str] = {}
        self.integers: dict[fx.Node, Affine] = {}
        maps = self._observe(maps)
        constants, twins = graph.constants()
        self._lifted, self._twins = Evaluator(constants), twins
        places = Places(graph, maps)
        self.codes: dict[fx.Node, Codes] = {}
        measured = {}
        for node in maps:
            op: Any = places.view(node)
            weight = op.weight.node
            if weight not in self.codes:
                self.codes[weight] = weight_codes(self.constant(weight))
            source = op.input.node
            integers = self.integers[places.root(source)]
            axis = op.channel_axis if isinstance(op, ops.Conv) else op.out.ndim - 1
            measured[node] = source, integers, weight, self.decoded(weight), axis
        self.noise: dict[fx.Node, Noise] = noise(graph, measured, data)
        self.maps = maps
        self.biases: dict[fx.Node, Tensor] = {}
        if correct:
            for node in maps:
                op = places.view(node)
                shift = self.noise[node].mean()
                if bool(shift.any()):
                    bias = 0.0 if op.bias is None else self.constant(op.bias.node)
                    self.biases[node] = bias - shift
        self.whole: Graph | None = None  # with all maps on integers
        self.error = math.inf
        if maps:
            self.whole, self.error = self._with(maps)

    def _observe(self, maps: list[fx.Node]) -> list[fx.Node]:
        """See the ranges of all that may become integers; the maps of which these are known."""
        places = Places(self.graph, maps)
        sources = {places.source(one) for one in maps}
        found = ranges(self.graph, places.values | sources, self.data)
        self.integers = found
        self.unknown = {
            one: "what it reads is not finite on the data"
            for one in maps if not {places.source(one), places.root(places.source(one))} <= set(found)
        }  # fmt: skip
        return [one for one in maps if one not in self.unknown]

    def constant(self, node: fx.Node) -> Tensor:
        """The float64 value of what depends on parameters alone."""
        found: Tensor = self._lifted.evaluate(self._twins[node])
        return found

    def decoded(self, weight: fx.Node) -> Tensor:
        codes, scale = self.codes[weight]
        return codes * scale.view(-1, *(1 for _ in codes.shape[1:]))

    def within(self, budget: float) -> tuple[Graph | None, float, dict[fx.Node, str]]:
        """The graph with as many maps on integers as the budget allows, those that matter least first; its
        error; and why others stay."""
        left = dict(self.unknown)
        worst = self.error
        if worst <= budget:
            return self.whole, worst, left
        alone = {one: self._with([one], self.data[:1])[1] for one in self.maps}
        order = sorted(self.maps, key=lambda one: alone[one])
        best: tuple[Graph | None, float] = (None, worst)
        low, high = 0, len(order) - 1  # so many are within the budget; more than `high` are not
        while low < high:
            middle = (low + high + 1) // 2
            graph, error = self._with(order[:middle])
            if error <= budget:
                low, best = middle, (graph, error)
            else:
                high = middle - 1
        if best[0] is not None:
            for one in order[low:]:
                left[one] = (
                    f"alone it would put the outputs off by {alone[one]:.1e}, all by {worst:.1e}"
                )
        return *best, left

    def _with(
        self, maps: Sequence[fx.Node], data: Sequence[Sequence[Any]] | None = None
    ) -> tuple[Graph, float]:
        """The graph with some maps on integers, and its error."""
        places = Places(self.graph, maps)
        graph = Rewriting(places, self.integers, self.codes, self.biases).result()
        return graph, self._error(graph, data)

    def _error(self, graph: Graph, data: Sequence[Sequence[Any]] | None = None) -> float:
        found = [outputs(graph, one) for one in (self.data if data is None else data)]
        return max(map(distance, found, self.truth))


def unsupported(device: str) -> str:
    """Why int8 would not be faster on a device; empty if it is."""
    if device != "cpu":
        return f"int8 is not known to be faster on {device}"
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this torch is built without oneDNN"
    if not torch.cpu._is_vnni_supported():
        return "this processor has no instructions for int8 (avx512_vnni)"
    return ""
