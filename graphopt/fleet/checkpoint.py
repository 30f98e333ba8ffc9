"""Weights rewritten from checkpoint to checkpoint, tensor by tensor: models that are larger than memory.

    graph of the model, its states windows on the files
    ->  passes  ->  every new weight evaluated in float64, rounded once, written, and forgotten

What a pass computes from parameters alone is an expression in the graph (design.md); here each is evaluated
only when its shard is written. The values are bit for bit those that `graphopt.optimize` stores with the same
passes. Sites are checked as there, on activations of the example inputs, which run through the model layer by
layer. A value that is computed from nothing in the files, a table of positions for instance, is no weight.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from graphopt.files import beside, replace
from graphopt.fleet.mapped import CheckpointError, Files, bounded
from graphopt.fleet.runners import connected
from graphopt.fleet.shards import check_target, layout, renamed, write_index, write_shard
from graphopt.fleet.spread import Recorded, Spread
from graphopt.ir.capture import capture
from graphopt.ir.driver import Record, Session
from graphopt.ir.graph import Graph
from graphopt.ir.inputs import as_call
from graphopt.ir.interpret import Evaluator
from graphopt.ir.source import clone_inputs
from graphopt.ir.tiles import Tiles
from graphopt.passes.materialize import Materialize, cone_of, frontier, role, rounds_inside
from graphopt.pipeline import Pipeline
from graphopt.verify import SiteValidator

MERGE = (
    "canonicalize,recognize-norms,[collect-terms,merge-sequences,merge-branches],merge-regions,"
    "multiply-out"
)
MATERIALIZE = Materialize()
EVALUATED = 1 << 27  # bytes of values kept while one weight is evaluated


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """What was written: files, how many tensors were computed and how many copied, and the records."""

    path: Path
    shards: tuple[str, ...]
    computed: int
    copied: int
    applied: list[Record]
    refused: list[Record]
    rolled_back: list[Record]

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.computed} weights computed, {self.copied} copied, "
            f"{len(self.shards)} files"
        ]
        for title, records in (("refused", self.refused), ("rolled back", self.rolled_back)):
            lines += [
                f"  {title} {one.rewrite} at {one.where}: {one.reason}" for one in records[:12]
            ]
        return "\n".join(lines)


def rewrite_checkpoint(
    model: nn.Module, inputs: Any, weights: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str],
    *,
    passes: str | Pipeline = MERGE, across: bool = False, read_as: Sequence[tuple[str, str]] = (),
    write_as: Sequence[tuple[str, str]] = (), memory: int = 2 << 30, shard: int = 256 << 20,
    validate: bool = True, progress: Callable[[str], None] | None = None, ray: str | None = None,
) -> Rewritten:  # fmt: skip
    """Run passes on the weights of a checkpoint, and write the result as another one.

    Args:
        model: the model, its parameters on the meta device (buffers that are in no file must have values:
            `accelerate.init_empty_weights()` makes such models). It takes over the tensors of the files.
        inputs: example inputs, a tuple, a tensor or a mapping; small ones, as the model runs on them.
        weights: safetensors files, indices of sharded ones, or folders of either.
        output: a folder, which is replaced whole at the end.
        passes: a pipeline, without `materialize`; by default one that merges adapters and branches, and
            leaves norms and the sizes of layers as they are.
        across: whether weights of one module may go into those of another, a norm's into a convolution's for
            instance. Without, each module keeps its own, and the result fits the model it is a variant of.
        read_as: (pattern, replacement) as of `re.sub`, in order: from names in files to those of the model.
        write_as: the same for names of the result, which are those of the model's modules.
        memory: bytes this process is to hold at most. What is read of the files is given back before that;
            one tensor in float64, and a shard, must fit beside what Python needs.
        shard: bytes of a file of the result at most, unless one tensor is larger.
        validate: check every site, which reads the weights about three times more.
        progress: called with a line of text at each step.
        ray: the address of a Ray cluster whose nodes write the files of the result, each holding `memory` at
            most; "auto" for the one that there is, "local" to start one. They must see the same paths.

    Raises:
        CheckpointError: if names or shapes do not fit, a needed tensor is in no file, or a result would
            have to be computed from what has no value.
        CaptureError: if the model is not captured as one graph.
        ConfigError: if Ray is not installed, or there is no cluster at the address.
    """
    target, say = Path(output), progress or (lambda _: None)
    check_target(target)
    places = tuple(os.path.abspath(one) for one in weights)
    task = Task(model, inputs, places, passes, across, tuple(read_as), memory)
    with ExitStack() as stack:
        spread = None
        if ray is not None:
            say("connecting")
            spread = Spread(stack.enter_context(connected(ray)), task)
        files = Files(places)
        stack.enter_context(bounded(files, memory))
        found, session, verdicts = task.done(files, SiteValidator if validate else None, say)
        shards = layout(found.sizes(), shard, write_as)
        work = stack.enter_context(beside(target))
        os.chmod(work, 0o755)
        if spread is not None:
            spread.write(shards, work, verdicts, found.told(), say)
        else:
            for one in shards:
                say(f"writing {one.file}")
                write_shard(one, found.value, work)
        write_index(shards, work)
        replace(work, target)
    return Rewritten(
        target, tuple(one.file for one in shards), len(found.expressions), len(found.copies),
        session.applied, session.remaining_refusals(), session.rolled_back,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Task:
    """All that decides the weights of the result; the same in every process."""

    model: nn.Module
    inputs: Any
    weights: tuple[str, ...]
    passes: str | Pipeline
    across: bool
    read_as: tuple[tuple[str, str], ...]
    memory: int

    def done(
        self, files: Files, validator: Callable[[Graph, list[Any]], Any] | None,
        say: Callable[[str], None] = lambda _: None,
    ) -> tuple[Result, Session, list[Any] | None]:  # fmt: skip
        """The result, nothing of which is computed yet; the session, and what its checks said."""
        pipeline = self.passes if isinstance(self.passes, Pipeline) else Pipeline(self.passes)
        args, kwargs = as_call(self.inputs, None)
        assign(self.model, files, self.read_as)
        say("capturing")
        graph = capture(self.model.eval(), args or (), kwargs).graph
        used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        unread = [name for name, one in graph.states.items() if one.saved and name not in used]
        leaves = pytree.tree_leaves(clone_inputs(args or (), dict(kwargs or {})))
        if not self.across:
            hold_foreign(graph, pipeline)
        recorded = None if validator is None else Recorded(validator(graph, leaves))
        session = Session(graph, recorded)
        pipeline.run(session, say)
        session.validator = None
        return Result(graph, unread), session, None if recorded is None else recorded.verdicts


def assign(model: nn.Module, files: Files, rename: Sequence[tuple[str, str]] = ()) -> None:
    """Let the states of a model be the tensors of the files.

    Raises:
        CheckpointError: naming the first tensor that does not fit.
    """
    own = dict(model.state_dict(keep_vars=True))
    found: dict[str, Tensor] = {}
    for stored, tensor in files.tensors.items():
        name = renamed(stored, rename)
        if name not in own:
            near = difflib.get_close_matches(name, own, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise CheckpointError(f"{stored}: the model has no {name!r}{hint}")
        if own[name].shape != tensor.shape:
            raise CheckpointError(
                f"{stored} has the shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}"
            )
        may_change = not isinstance(own[name], nn.Parameter)
        found[name] = tensor.clone() if may_change else tensor
    tied: dict[int, str] = {}
    for name, tensor in own.items():  # a tied weight is stored once
        twin = tied.setdefault(id(tensor), name)
        if name not in found and twin in found:
            found[name] = found[twin]
    model.load_state_dict(found, strict=False, assign=True)
    for name, one in (*model.named_parameters(), *model.named_buffers()):
        if one.device.type == "meta":
            raise CheckpointError(
                f"{name} has no value: it is in no file, and the model is made without"
            )
        one.requires_grad_(False)


def hold_foreign(graph: Graph, pipeline: Pipeline) -> None:
    """Keep states out of all expressions that would put them into the weights of another module: to
    passes they are like states that the model writes to. Found by a run without values."""
    while True:
        trial = graph.clone()
        pipeline.run(Session(trial), lambda _: None)
        foreign = {
            str(one.target)
            for node in frontier(trial) for one in cone_of(node)
            if one.op == "get_attr" and not _inside(str(one.target), role(trial, node))
        }  # fmt: skip
        foreign = {name for name in foreign if name in graph.states and graph.states[name].saved}
        if not foreign:
            return
        graph.hold(foreign)


def _module(state: str) -> str:
    return state.rpartition(".")[0]


def _inside(state: str, weight: str) -> bool:
    """Whether a state belongs to the module whose weight is named, or to one inside it."""
    module = _module(weight)
    return not module or f"{state}.".startswith(f"{module}.")


class Result:
    """The states of a rewritten graph: expressions that are to be evaluated, and copies. States that the
    model has and never reads are copied with the module that they belong to."""

    def __init__(self, graph: Graph, unread: Collection[str]) -> None:
        self.graph = graph
        self.expressions: dict[str, tuple[fx.Node, bool]] = {}
        made: list[tuple[fx.Node, bool]] = []  # and whether the model rounds inside
        read = {
            str(node.target) for node in graph.nodes
            if node.op == "get_attr" and any(not graph.is_constant(user) for user in node.users)
        }  # fmt: skip
        for node in frontier(graph):
            cone = cone_of(node)
            states = [str(one.target) for one in cone if one.op == "get_attr"]
            if not MATERIALIZE.worthwhile(graph, node, cone):
                read |= set(states)
            elif any(graph.states[name].saved for name in states):
                made.append((node, rounds_inside(graph, node, cone)))
        kept = [name for name in graph.states if name in read and graph.states[name].saved]
        for node, own in made:
            name = role(graph, node)
            if name in kept or name in self.expressions:
                name = f"{graph.where(node)}.{node.name}".lstrip(".")
            self.expressions[name] = node, own
        modules = {_module(name) for name in (*kept, *self.expressions)}
        gone = {_module(name) for name in graph.states if name not in unread} - modules
        self.copies = [*kept, *(name for name in unread if _module(name) not in gone)]
        self._constants, self._twins = graph.constants()

    def sizes(self) -> Iterator[tuple[str, int]]:
        """The bytes of every tensor of the result, in the order of names."""
        found = {name: node.meta["val"] for name, (node, _) in self.expressions.items()}
        found |= {name: self.graph.states[name].tensor for name in self.copies}
        for name in sorted(found):
            yield name, found[name].numel() * found[name].element_size()

    def told(self) -> str:
        """All that the tensors are computed from and by, as text; it is the same in every process."""
        lines = [
            f"{name} = {cone_of(node)} {own}" for name, (node, own) in self.expressions.items()
        ]
        return "\n".join([*lines, *self.copies, *map(str, self.sizes())])

    def value(self, name: str) -> Tensor:
        if name not in self.expressions:
            return self.graph.states[name].tensor.detach()
        node, own = self.expressions[name]
        twin, lifted = self._twins[node], Evaluator(self._constants, limit=EVALUATED)
        if own:
            value = Evaluator(self._constants, lifted=False, limit=EVALUATED).evaluate(twin)
        elif (value := Tiles(self._constants, lifted).rounded(twin)) is None:
            value = lifted.evaluate(twin)
        result: Tensor = value.detach().to(node.meta["val"].dtype)
        return result.contiguous()
