"""The story of one module of the source model: its ops, what happened to them, what is left."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from graphopt.ir.builder import Builder
from graphopt.ir.cost import bytes_of, sizes_of
from graphopt.ir.driver import Record
from graphopt.ir.graph import Graph
from graphopt.ir.ops.base import example_sizes
from graphopt.ir.printer import line
from graphopt.ir.provenance import origins
from graphopt.report.plain import plain

if TYPE_CHECKING:
    from graphopt.report.report import Report


class UnknownModule(ValueError):
    """The source model has no module of this path."""


@dataclasses.dataclass(frozen=True)
class Listed:
    """An op as the printer writes it, the path of its module, and of all that it stands for.

    `reads` names the ops and inputs whose values it takes; `flops` and `bytes` are its share of
    `graphopt.ir.cost.Cost`. Reports of older versions have none of these three.
    """

    text: str
    where: str
    origins: tuple[str, ...]
    reads: tuple[str, ...] = ()
    flops: float = 0.0
    bytes: int = 0

    @property
    def name(self) -> str:
        """The name that other ops read it under."""
        return self.text.partition(":")[0]

    @property
    def type(self) -> str:
        """Its dtype and shape, such as `f32[s0, 64, 112, 112]`."""
        return self.text.partition(": ")[2].partition(" = ")[0]

    @property
    def kind(self) -> str:
        """The op view, such as `Conv`, or the name of the function."""
        return self.text.partition(" = ")[2].partition("(")[0]

    def __str__(self) -> str:
        return f"{self.text}  # {self.where}" if self.where else self.text


def listing(graph: Graph, inputs: Sequence[Any] = ()) -> list[Listed]:
    """The ops of a graph, in order, with what each costs in a run on `inputs` (by default, on inputs
    as large as the graph was traced with)."""
    with example_sizes(sizes_of(graph, inputs)):
        return [_listed(graph, node) for node in graph.calls]


def _listed(graph: Graph, node: fx.Node) -> Listed:
    op = Builder(graph, node).view(node)
    values = [node, *node.all_input_nodes]
    return Listed(
        line(graph, node), graph.where(node), origins(graph, [node]),
        tuple(one.name for one in node.all_input_nodes if one.op != "get_attr"),
        float(op.flops) if op is not None else 0.0,
        sum(bytes_of(one.meta.get("val")) for one in values),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Story:
    """What happened to one module and to all that is inside it.

    `before` and `after` are its ops in the captured and in the optimized graph, `absorbed_by` the
    ops of other modules that stand for some of them now. `applied` (in order), `refused` and
    `rolled_back` are the records that concern it. `left_out` has the reason for every module inside
    it, or around it, that was not captured.
    """

    module: str
    before: list[Listed]
    applied: list[Record]
    refused: list[Record]
    rolled_back: list[Record]
    after: list[Listed]
    absorbed_by: list[Listed]
    left_out: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `json.dumps` takes with `allow_nan=False`."""
        return plain(self)  # type: ignore[no-any-return]

    def __str__(self) -> str:
        return "\n".join([self.module, *self._lines()])

    def _lines(self) -> Iterator[str]:
        sections: dict[str, Iterable[object]] = {
            "before": self.before or ["nothing"],
            "applied": map(_application, self.applied),
            "refused": map(_refusal, self.refused),
            "rolled back": map(_refusal, self.rolled_back),
            "after": self.after or ["nothing"],
            "absorbed by": self.absorbed_by,
            "left out": (f"{path or 'the whole'}: {why}" for path, why in self.left_out.items()),
        }
        for title, entries in sections.items():
            if lines := [f"    {one}" for one in entries]:
                yield f"  {title}"
                yield from lines


def _application(record: Record) -> str:
    by = f" (pass {record.stage})" if record.stage != record.rewrite else ""
    place = f"{record.node} ({record.where})" if record.where else record.node
    found = f"error {record.error:.1e}, bound {record.bound:.1e}"
    if math.isnan(record.error):
        found = "not checked"
    elif record.error == record.bound == 0:
        found = "bit for bit the same"
    return f"{record.index}: {record.rewrite}{by} replaced {place}: {found}"


def _refusal(record: Record) -> str:
    return f"{record.rewrite} at {record.where or record.node}: {record.reason}"


def tell(report: Report, module: str) -> Story:
    """The story of one module, as far as a report has it."""
    names = spellings(module, report.modules)

    def inside(*paths: str) -> bool:
        return any(is_within(path, name) for path in paths for name in names)

    def around(path: str) -> bool:
        return any(is_within(name, path) for name in names)

    def concerned(records: list[Record]) -> list[Record]:
        return [one for one in records if inside(one.where, *one.origins)]

    left_out = report.capture.left_out if not any(map(around, report.regions)) else {}
    return Story(
        module,
        [one for one in report.ops_before if inside(one.where)],
        concerned(report.applied),
        concerned(report.refused),
        concerned(report.rolled_back),
        [one for one in report.ops_after if inside(one.where)],
        [one for one in report.ops_after if inside(*one.origins) and not inside(one.where)],
        {path: why for path, why in left_out.items() if inside(path) or around(path)},
    )


# -- module paths -------------------------------------------------------------------------------


def is_within(path: str, module: str) -> bool:
    """Whether a path is that of a module or of something inside it; all is inside the model, ""."""
    return not module or f"{path}.".startswith(f"{module}.")


def modules_of(model: nn.Module) -> dict[str, str]:
    """The paths of all modules inside a model, each with the first path of the same module."""
    first: dict[nn.Module, str] = {}
    return {
        path: first.setdefault(module, path)
        for path, module in model.named_modules(remove_duplicate=False)
        if path
    }


def spellings(module: str, modules: Mapping[str, str]) -> list[str]:
    """All paths of the module that has the path `module`.

    Raises:
        UnknownModule: naming the nearest paths, or else the modules that are inside the innermost
            existing module on the way, if there is none.
    """
    if module in modules:
        return [path for path, first in modules.items() if first == modules[module]]
    around = module
    while around and around not in modules:
        around = around.rpartition(".")[0]
    inside = [path for path in modules if path.rpartition(".")[0] == around]
    hint = f"{around or 'it'} has {', '.join(inside) or 'none'}"
    if near := difflib.get_close_matches(module, modules, n=3, cutoff=0.5):
        hint = f"nearest: {', '.join(near)}"
    raise UnknownModule(f"the model has no module {module!r}; {hint}")
