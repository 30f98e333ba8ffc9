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
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from graphopt.files import beside, replace
from graphopt.fleet.mapped import INDEX, CheckpointError, Files, bounded
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
    validate: bool = True, progress: Callable[[str], None] | None = None,
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

    Raises:
        CheckpointError: if names or shapes do not fit, a needed tensor is in no file, or a result would
            have to be computed from what has no value.
        CaptureError: if the model is not captured as one graph.
    """
    target, say = Path(output), progress or (lambda _: None)
    if target.exists() and not (target / f"model.safetensors{INDEX}").is_file():
        raise CheckpointError(f"{target} exists and is no sharded checkpoint; not overwriting it")
    pipeline = passes if isinstance(passes, Pipeline) else Pipeline(passes)
    args, kwargs = as_call(inputs, None)
    files = Files(weights)
    with bounded(files, memory):
        assign(model, files, read_as)
        say("capturing")
        graph = capture(model.eval(), args or (), kwargs).graph
        used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        unread = [name for name, one in graph.states.items() if one.saved and name not in used]
        leaves = pytree.tree_leaves(clone_inputs(args or (), dict(kwargs or {})))
        if not across:
            hold_foreign(graph, pipeline)
        session = Session(graph, SiteValidator(graph, leaves) if validate else None)
        pipeline.run(session, say)
        session.validator = None
        found = _Result(graph, unread)
        with beside(target) as work:
            os.chmod(work, 0o755)
            shards = tuple(_written(found, work, shard, write_as, say))
            replace(work, target)
    return Rewritten(
        target, shards, len(found.expressions), len(found.copies), session.applied,
        session.remaining_refusals(), session.rolled_back,
    )  # fmt: skip


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


def renamed(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


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


class _Result:
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


def _written(
    found: _Result,
    folder: Path,
    limit: int,
    write_as: Sequence[tuple[str, str]],
    say: Callable[[str], None],
) -> Iterator[str]:
    """Write the shards and their index; their names."""
    from safetensors.torch import save_file

    parts: list[list[str]] = [[]]
    room = limit
    sizes = dict(found.sizes())
    for name, size in sizes.items():
        if size > room and parts[-1]:
            parts.append([])
            room = limit
        parts[-1].append(name)
        room -= size
    where: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        say(f"writing {file}")
        tensors: dict[str, Tensor] = {}
        for name in part:
            stored = renamed(name, write_as)
            if stored in where:
                raise CheckpointError(f"two tensors of the result are called {stored}")
            where[stored] = file
            tensors[stored] = found.value(name)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        os.chmod(folder / file, 0o644)
        yield file
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
    (folder / f"model.safetensors{INDEX}").write_text(
        json.dumps(index, indent=1, sort_keys=True) + "\n"
    )
