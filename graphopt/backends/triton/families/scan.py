"""State scans: T steps of a pointwise recurrence in one kernel, the states in registers.

    y_t, v_t = step(x_t, v_{t-1}, w),      t = 0 .. T-1

Spiking neurons are the case in mind (integrate and fire, leaky, adaptive threshold, synaptic current),
but the step is whatever `graphopt.ir.recurrence` finds. Every x_t is read once and every y_t written
once: the least traffic there is, where step by step each operation reads and writes all of it. One program
instance owns BLOCK places of the state and walks through time; neighbouring places are neighbouring
addresses, whatever the time axis is. States are kept in float32 (float64) even where tensors are halves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from graphopt.backends.triton.families import formulas
from graphopt.backends.triton.families.common import (
    HEADER,
    Found,
    block,
    bytes_of,
    cdiv,
    example,
    is_pointwise,
    numel,
    sizes_for,
    tensor,
    unit,
)  # fmt: skip
from graphopt.backends.triton.families.series import (
    Read,
    Written,
    axes_by_stride,
    full_text,
    written,
)
from graphopt.backends.triton.families.strided import Layout, layout
from graphopt.backends.triton.ptx import Unit, pointer
from graphopt.backends.triton.region import Launcher, Outside, Region, extract
from graphopt.backends.triton.runtime import load
from graphopt.backends.triton.scalars import register, spelled
from graphopt.ir.recurrence.chain import Chain, chains
from graphopt.ir.recurrence.steps import filled

aten = torch.ops.aten
UNROLLED = 8  # steps up to which the loop is unrolled, so that loads of several are under way


@dataclasses.dataclass(eq=False)
class Scan(Region):
    """A region of kind "scan"; see `graphopt.ir.recurrence.chain.Chain` for the fields of `chain`."""

    chain: Chain
    written: tuple[Written, ...]

    @cached_property
    def series(self) -> list[Read]:
        """What is read at every step."""
        return [Read.of(f"x{i}", nodes) for i, nodes in enumerate(self.chain.inputs)]

    @cached_property
    def single(self) -> list[Read]:
        """What is read once: what only the first step reads, what every step does, given states."""
        chain = self.chain
        first = enumerate(chain.first_inputs)
        found = [Read.of(f"f{i}", [one]) for i, one in first if filled(one) is None]
        every = enumerate(chain.invariants)
        found += [Read.of(f"w{i}", [one]) for i, one in every if filled(one) is None]
        states = [(i, one) for i, one in enumerate(chain.initial) if isinstance(one, fx.Node)]
        return found + [Read.of(f"v{i}", [one]) for i, one in states if filled(one) is None]

    @cached_property
    def reference(self) -> fx.GraphModule:
        reads = {one for node in self.nodes for one in node.all_input_nodes}
        full = [one for one in reads if filled(one) is not None]
        return extract([*self.nodes, *full], self.inputs, self.sizes, self.outputs)

    @property
    def unrolled(self) -> bool:
        last = self.chain.steps - 1
        return (
            self.chain.steps <= UNROLLED
            or any(one.several for one in self.series)
            or any(one.step not in (None, last) for one in self.written)
        )

    @property
    def source(self) -> str:
        inputs = list(map(example, self.inputs))
        _, views, steps = self._pointers(inputs, self._outputs(inputs))
        return self.printed(self._layout(views, steps)[0])

    # -- printing ---------------------------------------------------------------------------------

    def printed(self, where: Layout) -> str:
        """The kernel for operands of one layout."""
        reads = [*self.series, *self.single]
        spots = {one.name: where.offset(i, one.name) for i, one in enumerate(reads)}
        spots |= {
            one.name: where.offset(len(reads) + i, one.name) for i, one in enumerate(self.written)
        }
        chain, steps = self.chain, self.chain.steps
        head = [*where.index(), "inside = i < count"]
        head += [self._load(one, spots[one.name]) for one in self.single]
        for letter, group in (("f", chain.first_inputs), ("w", chain.invariants)):
            head += [
                f"{letter}{number} = {full_text(value, tensor(one).dtype)}"
                for number, one in enumerate(group) if (value := filled(one)) is not None
            ]  # fmt: skip
        if chain.first is not None:
            own = [f"f{i}" for i in range(len(chain.first_inputs))]
            own += [f"w{i}" for i in range(len(chain.invariants))]
            made, roots = formulas.lines(chain.first.graph, own)
            head += [*made, *(self._first_stores(roots, spots) if chain.start else ())]
        else:
            roots = []
        starts = zip(chain.initial, self._state_types(), strict=True)
        for number, (start, dtype) in enumerate(starts):
            if isinstance(start, int):
                begin = roots[start]
            elif (value := filled(start)) is not None:
                begin = full_text(value, dtype)
            else:
                begin = f"v{number} + tl.zeros([BLOCK], {spelled(dtype)})"
            head.append(f"v{number} = {begin}")
        loop = [self._load(one, spots[one.name]) for one in self.series]
        loop += [f"{one.name}_ptr += {one.name}_step" for one in self.series if not one.several]
        names = [one.name for one in self.series]
        names += [f"v{i}" for i in range(len(chain.links))]
        names += [f"w{i}" for i in range(len(chain.invariants))]
        made, roots = formulas.lines(chain.body.graph, names)
        loop += made
        tail = []
        for one in self.written:
            if one.step is not None and one.step < chain.start:
                continue  # of the first step
            store = f"tl.store({one.name}_ptr{spots[one.name]}, {roots[one.root]}, mask=inside)"
            if one.step is None:
                loop += [store, f"{one.name}_ptr += {one.name}_step"]
            elif one.step == steps - 1:
                tail.append(store)
            else:
                loop += [f"if t == {one.step}:", "    " + store]
        # The next states last: what is stored after the loop is read before they change names.
        moved = [(f"v{i}", roots[link]) for i, link in enumerate(chain.links) if link is not None]
        if moved:
            loop.append(", ".join(a for a, _ in moved) + " = " + ", ".join(b for _, b in moved))
        ranged = "tl.static_range" if self.unrolled else "range"
        if not self.unrolled:
            head += [f"{root} = tl.zeros([BLOCK], {spelled(self._type_of(one))})"
                     for one, root in self._carried(roots)]  # fmt: skip
        lines = [
            *head, f"for t in {ranged}({chain.start}, {steps}):", *("    " + one for one in loop), *tail
        ]  # fmt: skip
        place = "tl.program_id(0)" + (".to(tl.int64)" if where.wide else "")
        return HEADER + "\n".join([
            "@triton.jit",
            f"def {self.name}({', '.join(self._parameters(where))}, BLOCK: tl.constexpr):",
            f'    """{self._title()}"""',
            f"    i = {place} * BLOCK + tl.arange(0, BLOCK)",
            *("    " + one for one in lines),
            "",
        ])  # fmt: skip

    def _title(self) -> str:
        modules = ", ".join(self.origins) or "the graph"
        return (
            f"{self.chain.steps} steps of a pointwise recurrence, states in registers: {modules}."
        )

    def _parameters(self, where: Layout) -> list[str]:
        names = [one.name for one in (*self.series, *self.single)]
        names += [one.name for one in self.written]
        stacks = [one.name for one in self.series if not one.several]
        stacks += [one.name for one in self.written if one.step is None]
        return [*(f"{name}_ptr" for name in names), "count", *(f"{one}_step" for one in stacks),
                *where.arguments(names)]  # fmt: skip

    def _load(self, one: Read, spot: str) -> str:
        dtype = tensor(one.nodes[0]).dtype
        pointer = f"{one.name}_ptr"
        if one.several:
            pointer += f"[t - {self.chain.start}]" if self.chain.start else "[t]"
        text = f"tl.load({pointer}{spot}, mask=inside)" if spot else f"tl.load({pointer})"
        if register(dtype) != dtype:
            text += f".to({spelled(register(dtype))})"
        return f"{one.name} = {text}"

    def _first_stores(self, roots: Sequence[str], spots: dict[str, str]) -> list[str]:
        lines = []
        for one in self.written:
            if one.step not in (None, 0):
                continue
            at = self._first_root(one)
            lines.append(f"tl.store({one.name}_ptr{spots[one.name]}, {roots[at]}, mask=inside)")
            if one.step is None:
                lines.append(f"{one.name}_ptr += {one.name}_step")
        return lines

    def _first_root(self, one: Written) -> int:
        return self.chain.first_roots.index(one.node if one.step is not None else one.parts()[0])

    def _type_of(self, root: int) -> torch.dtype:
        (returned,) = self.chain.body.graph.output_node().args
        return register(tensor(returned[root]).dtype)  # type: ignore

    def _carried(self, names: Sequence[str]) -> list[tuple[int, str]]:
        """The roots that are stored after the loop, which must exist before it."""
        last = [one.root for one in self.written if one.step == self.chain.steps - 1]
        return [(root, names[root]) for root in dict.fromkeys(last)]

    def _state_types(self) -> list[torch.dtype]:
        held = [n for n in self.chain.body.graph.nodes if n.op == "placeholder"]
        first = len(self.chain.inputs)
        return [register(tensor(one).dtype) for one in held[first:][: len(self.chain.links)]]

    # -- running ----------------------------------------------------------------------------------

    def _operands(self, inputs: Sequence[Tensor]) -> tuple[list[Any], list[Tensor], list[int]]:
        """(pointers, one tensor of each operand, strides over time)."""
        tensors = dict(zip(self.inputs, inputs, strict=True))
        pointers: list[Any] = []
        views, steps = [], []
        for one in (*self.series, *self.single):
            given = [tensors[node] for node in one.nodes]
            if one.several:
                if len({value.stride() for value in given}) > 1:
                    given = [value.contiguous() for value in given]
                pointers.append(tuple(given))
                views.append(given[0])
            else:
                views.append(one.view(given))
                pointers.append(views[-1])
                if one.name.startswith("x"):
                    steps.append(one.stride(given[0]))
        return pointers, views, steps

    def _outputs(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """New tensors, time outermost in memory and the other axes ordered as in the first input."""
        _, views, _ = self._operands(inputs)
        shape = torch.broadcast_shapes(*(one.shape for one in views))  # type: ignore[no-untyped-call]
        order = axes_by_stride(views[0].expand(shape))
        back = [order.index(axis) for axis in range(len(shape))]
        outputs = []
        for one in self.written:
            sizes = [shape[axis] for axis in order]
            options: Any = {"dtype": tensor(one.node).dtype, "device": inputs[0].device}
            if one.step is None:
                value = torch.empty([self.chain.steps, *sizes], **options)
                value = value.permute(0, *(axis + 1 for axis in back)).movedim(0, one.axis)
            else:
                value = torch.empty(sizes, **options).permute(back)
            outputs.append(value)
        return outputs

    def _pointers(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> tuple[list[Any], list[Tensor], list[int]]:
        """(what the kernel gets, one tensor of each operand, strides over time)."""
        pointers, views, steps = self._operands(inputs)
        for one, value in zip(self.written, outputs, strict=True):
            if one.step is None:
                value = value.movedim(one.axis, 0)
                steps.append(value.stride(0) * (-1 if one.backwards else 1))
                value = value[-1 if one.backwards else 0]
            views.append(value)
            pointers.append(value)
        return pointers, views, steps

    def _layout(self, views: Sequence[Tensor], steps: Sequence[int]) -> tuple[Layout, list[int]]:
        """(layout, the integers that the kernel gets)."""
        shape, order = views[-1].shape, axes_by_stride(views[-1])
        moved = [one.expand(shape).permute(order) for one in views]
        reach = max((abs(step) for step in steps), default=0)
        where, values = layout(moved[-1].shape, moved, reach)
        return where, [shape.numel(), *steps, *values]

    def launcher(self) -> Launcher:
        known: dict[Any, tuple[Any, list[int]]] = {}  # (kernel, integers) of shapes and strides

        def launch(*args: Any) -> tuple[Tensor, ...]:
            inputs = args[: len(self.inputs)]
            outputs = self._outputs(inputs)
            if outputs[0].numel():
                key = tuple((one.shape, one.stride()) for one in inputs)
                pointers, views, steps = self._pointers(inputs, outputs)
                if key not in known:
                    where, numbers = self._layout(views, steps)
                    known[key] = load(self.printed(where), self.name), numbers
                kernel, numbers = known[key]
                size = block(numbers[0], 1024)
                kernel[(cdiv(numbers[0], size),)](*pointers, *numbers, BLOCK=size)
            return tuple(outputs)

        return launch

    def units(self) -> list[Unit]:
        if any(one.several for one in self.series):
            return []  # arguments that are tuples
        pointers = {
            f"{one.name}_ptr": pointer(tensor(one.nodes[0]).dtype)
            for one in (*self.series, *self.single)
        } | {f"{one.name}_ptr": pointer(tensor(one.node).dtype) for one in self.written}
        return [unit(self.source, self.name, pointers, {"BLOCK": 1024})]

    def work(self) -> tuple[sympy.Expr, sympy.Expr]:
        chain = self.chain
        moved = [one for nodes in chain.inputs for one in nodes]
        once = (*chain.first_inputs, *chain.invariants, *chain.initial)
        moved += [one for one in once if isinstance(one, fx.Node) and filled(one) is None]
        places = numel(tensor(next(one for one in chain.roots[0] if one)))
        rest = formulas.flops(chain.body.graph) * (chain.steps - chain.start)
        first = formulas.flops(chain.first.graph) if chain.first else 0
        return bytes_of([*moved, *self.outputs]), places * (rest + first)


def match(graph: fx.Graph) -> Found:
    """Every scan of a graph."""
    found = Found([], [])
    for steps in chains(graph, is_pointwise):
        if not isinstance(steps, Chain):
            found.reasons.append(steps)
            continue
        try:
            found.regions.append(_region(steps))
        except Outside as reason:
            found.reasons.append((steps.nodes[0], str(reason)))
    return found


def _region(steps: Chain) -> Scan:
    results = written(steps)
    stacks = [one.node for one in results if one.step is None]
    order = {node: i for i, node in enumerate(steps.nodes[0].graph.nodes)}
    region = Scan(
        f"scan_{results[0].node.name.lstrip('_')}", "scan",
        tuple(sorted({*steps.nodes, *stacks}, key=order.__getitem__)), (),
        tuple(one.node for one in results), (), steps, results,
    )  # fmt: skip
    reads = [node for one in (*region.series, *region.single) for node in one.nodes]
    region.inputs = tuple(dict.fromkeys(reads))
    region.sizes = sizes_for([*region.inputs, *region.nodes])
    _ = region.source  # an operation without a formula shows here
    try:
        _ = region.reference
    except KeyError as reason:
        raise Outside(f"the states start like something else: {reason}") from None
    return region
