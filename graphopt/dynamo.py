"""torch.compile(model, backend="graphopt"): each graph that Dynamo captures, optimized on its first call.

Dynamo passes parameters and buffers as inputs and does not look at their values again. So by default they
stay values (mode "tune"): whatever is written to them later is in the next result, and gradients reach them.
`options={"mode": "deploy"}` folds them for calls without gradients; a weight that is replaced or written to
is noticed, but for writes through `.data`, and the graph is optimized anew.

What cannot be optimized (graphs that draw random numbers; under autocast; sizes that no tensor has; what
cannot be captured) runs as Dynamo captured it, and the log says why.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

from graphopt.backends.auto import Tuning
from graphopt.backends.base import find
from graphopt.backends.inductor import plain
from graphopt.ir.graph import is_random, written
from graphopt.ir.source import first_line
from graphopt.module import InputError, OptimizedModule
from graphopt.optimize import MODES, optimize
from graphopt.pipeline import Pipeline

log = logging.getLogger(__name__)

OPTIONS = ("mode", "passes", "backend", "tune_seconds")
ANEW = 3  # times that a graph is optimized with weights as constants, and for other numbers


class Unfit(ValueError):
    """A graph that is left as it is, and why."""


def backend(
    module: fx.GraphModule, example_inputs: Sequence[Any], *,
    options: Mapping[str, Any] | None = None, mode: str | None = None,
) -> Callable[..., Any]:  # fmt: skip
    """What the entry point of `torch_dynamo_backends` names.

    Args:
        module, example_inputs: a graph of Dynamo's.
        options: `mode` ("tune", the default, or "deploy"); `backend` and `tune_seconds` as for
            `graphopt.optimize`; `passes` in place of the preset of "deploy".

    Raises:
        ValueError, TypeError: for other options or values.
    """
    if mode is not None:
        raise ValueError(f'mode={mode!r} is of another backend; use options={{"mode": "deploy"}}')
    return Compiled(module, checked(options or {}))


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as arguments of `optimize`."""
    for name in options:
        if name not in OPTIONS:
            raise ValueError(f"unknown option {name!r}; expected one of {', '.join(OPTIONS)}")
    found = {"mode": "tune", "backend": "eager", **options}
    if found["mode"] not in MODES:
        raise ValueError(
            f"option mode: expected one of {', '.join(MODES)}, found {found['mode']!r}"
        )
    if "passes" in found:
        if found["mode"] != "deploy":
            raise ValueError('option passes: needs "mode": "deploy", for passes may fold weights')
        if not isinstance(found["passes"], Pipeline):
            found["passes"] = Pipeline(found["passes"])
    if found["backend"] != "auto":
        find(found["backend"])
    Tuning(found.get("tune_seconds", 0.0))
    return found


class Compiled:
    """One graph of Dynamo's as a callable; `state` says what it runs, `report` what was done to it."""

    def __init__(self, module: fx.GraphModule, options: dict[str, Any]) -> None:
        self.module, self.options = module, options
        self.state = "not called yet"
        self.report: Any = None
        self._run: Callable[..., Any] | None = None
        self._folded: list[tuple[int, Tensor, int]] = []  # position, weight, version
        self._left = ANEW
        self._numbers: dict[int, float] = {}  # that are constants, by position
        self._changes = ANEW  # of these that are left

    def __call__(self, *args: Any) -> Any:
        current = all(self._current(args, *one) for one in self._folded)
        if self._run is None or not current or not self._same_numbers(args):
            self._run = self._prepare(args)
        try:
            return self._run(*args)
        except InputError as error:  # sizes that its capture has fixed
            log.info("%s; running the graph as captured", error)
            return self.module(*args)

    @staticmethod
    def _current(args: Sequence[Any], position: int, weight: Tensor, version: int) -> bool:
        return args[position] is weight and _version(weight) == version

    def _same_numbers(self, args: Sequence[Any]) -> bool:
        return all(args[position].item() == one for position, one in self._numbers.items())

    def _prepare(self, args: Sequence[Any]) -> Callable[..., Any]:
        changed = not self._same_numbers(args)
        self._folded, self._numbers = [], {}
        trains = torch.is_grad_enabled() and any(
            one.requires_grad for one in args if isinstance(one, Tensor)
        )
        try:
            with torch.inference_mode(False):  # what is made there cannot be trained later
                if changed and self._changes == 0:
                    raise Unfit("a number that it gets keeps changing")
                self._changes -= changed
                return self._optimized(args, trains)
        except Exception as error:
            self.state = f"eager: {error if isinstance(error, Unfit) else first_line(error)}"
            log.warning("the graph runs as captured: %s", self.state.removeprefix("eager: "))
            return self.module.forward

    def _optimized(self, args: Sequence[Any], trains: bool) -> Callable[..., Any]:
        devices = {one.device.type for one in args if isinstance(one, Tensor)}
        if any(map(torch.is_autocast_enabled, devices)):
            raise Unfit("autocast is on")
        if trains and any(_has_own_gradient(node) for node in self.module.graph.nodes):
            raise Unfit("it has a gradient of its own (torch.autograd.Function)")
        folds = self.options["mode"] == "deploy" and not trains and self._left > 0
        source = Source(self.module, args, folds)
        options = {**self.options, "mode": "deploy" if folds else "tune"}
        if not folds:
            options.pop("passes", None)
        self._numbers = source.numbers
        result = optimize(
            source.module, source.inputs(args), dynamic_shapes=source.shapes, **options
        )
        self.report = result.report
        self.state = options["mode"]
        _refuse_effects(result, folds)
        if not folds:
            return with_weights(result, source)
        self._left -= 1
        self._folded = [(at, args[at], _version(args[at])) for at in source.weights.values()]
        return lambda *args: result(*source.inputs(args))


def _has_own_gradient(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "autograd_function_apply"


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _refuse_effects(result: OptimizedModule, folds: bool) -> None:
    if result.graph_module is None:
        raise Unfit("it is not captured as one graph")
    for node in result.graph_module.graph.nodes:
        if is_random(node):
            raise Unfit("it draws random numbers")
        if folds and written(node):
            raise Unfit("it writes to what it folds")


# -- weights and sizes of Dynamo's graphs ------------------------------------------------------------


class Source:
    """Dynamo's graph as a module that owns its weights and takes tensors alone.

    Without `folds`, weights are the floating ones: what is an integer may decide what the graph is.
    `weights` has the position of each among the inputs of Dynamo's graph, by its name in `module`;
    `others` the positions of the tensors that stay inputs; `numbers` the values, by position, of numbers
    that Dynamo passes as tensors (the eps of a norm, where all is dynamic) and that are constants.
    """

    def __init__(self, module: fx.GraphModule, args: Sequence[Any], folds: bool) -> None:
        graph = copy.deepcopy(module.graph)
        self.weights: dict[str, int] = {}
        self.others: list[int] = []
        self.numbers: dict[int, float] = {}
        dynamic: list[Any] = []
        root = fx.GraphModule(module, graph)
        graph = root.graph
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        fakes = [node.meta.get("example_value") for node in inputs]
        for position, (node, fake, given) in enumerate(zip(inputs, fakes, args, strict=True)):
            if isinstance(fake, torch.SymInt):
                continue
            if not isinstance(given, Tensor):
                raise Unfit(f"its input {node.name} is a {type(given).__name__}")
            if _is_number(node, given):
                self.numbers[position] = given.item()
                for user in list(node.users):
                    with graph.inserting_before(user):
                        _replace(user, graph.call_function(float, (given.item(),)))
                graph.erase_node(node)
                continue
            floating = given.is_floating_point() or given.is_complex()
            if _is_weight(node, given) and (folds or floating):
                self.weights[node.name] = position
                register(root, node.name, given, floating)
                with graph.inserting_before(node):
                    _replace(node, graph.get_attr(node.name))
            else:
                self.others.append(position)
                dynamic.append(_dynamic(fake))
        for node, fake in zip(inputs, fakes, strict=True):
            if isinstance(fake, torch.SymInt):
                self._derive(graph, node, fake, inputs, fakes)
        for node in graph.nodes:
            node.meta = {}
        root.recompile()
        self.module = root
        self.shapes = tuple(dynamic)

    def inputs(self, args: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(args[position] for position in self.others)

    def _derive(
        self, graph: fx.Graph, node: fx.Node, size: torch.SymInt, inputs: Sequence[fx.Node],
        fakes: Sequence[Any],
    ) -> None:  # fmt: skip
        """A size that Dynamo passes beside the tensor that has it."""
        for position in self.others:
            for axis, one in enumerate(fakes[position].shape):
                if isinstance(one, torch.SymInt) and one.node.expr == size.node.expr:
                    with graph.inserting_after(inputs[self.others[-1]]):
                        found = graph.call_method("size", (inputs[position], axis))
                    _replace(node, found)
                    return
        if node.users:
            raise Unfit(f"its size {node.name} is none of a tensor that it gets")
        graph.erase_node(node)


def _replace(node: fx.Node, found: fx.Node) -> None:
    node.replace_all_uses_with(found)
    node.graph.erase_node(node)


def _is_weight(node: fx.Node, given: Tensor) -> bool:
    known = node.meta.get("tensor_dict") or {}
    return isinstance(given, nn.Parameter) or "_dynamo_static_input_type" in known


def _is_number(node: fx.Node, given: Tensor) -> bool:
    scalar = given.ndim == 0 and given.dtype == torch.float64 and given.is_cpu
    read = all(user.op == "call_method" and user.target == "item" for user in node.users)
    return scalar and read and bool(node.users)


def register(root: nn.Module, name: str, tensor: Tensor, floating: bool) -> None:
    """Floating weights are parameters, so that no rewrite looks at their values."""
    if floating:
        setattr(root, name, nn.Parameter(tensor.detach(), tensor.requires_grad))
    else:
        root.register_buffer(name, tensor)


def _dynamic(fake: Any) -> Any:
    """The axes of an input that are not fixed, as `torch.export` wants them."""
    sizes = fake.shape if isinstance(fake, Tensor) else ()
    return {axis: torch.export.Dim.AUTO
            for axis, one in enumerate(sizes) if isinstance(one, torch.SymInt)} or None  # fmt: skip


def with_weights(result: OptimizedModule, source: Source) -> Callable[..., Any]:
    """The optimized graph with weights as inputs again; takes what Dynamo's graph takes."""
    assert result.graph_module is not None
    twin = plain(result.graph_module)
    graph, names = twin.graph, list(source.weights)
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        fed = {name: graph.placeholder(f"weight_{name}") for name in names}
    for node in list(graph.nodes):
        if node.op == "get_attr" and node.target in fed:
            fed[node.target].meta = dict(node.meta)
            _replace(node, fed[node.target])
    twin = fx.GraphModule(twin, graph)  # without the copies of the weights
    run: Callable[..., Any] = twin.forward
    if result.report.backend != "eager":
        run = find(result.report.backend).lower(_as_module(twin), True)
    weights, others = list(source.weights.values()), source.others
    fixed = all(one is None for one in source.shapes)

    def call(*args: Any) -> Any:
        inputs = [args[position] for position in others]
        if not fixed:
            result._bind(tuple(inputs), {})
        return run(*[args[position] for position in weights], *inputs)

    result.__dict__["_run"] = None
    return call


def _as_module(twin: fx.GraphModule) -> fx.GraphModule:
    """A function of leaves with the description that backends read."""
    nodes = twin.graph.nodes
    names = [node.name for node in nodes if node.op == "placeholder"]
    (found,) = twin.graph.output_node().args
    in_spec = pytree.tree_flatten((tuple(names), {}))[1]
    out_spec = pytree.tree_flatten(tuple(str(one) for one in found))[1]  # type: ignore[union-attr]
    graph = copy.deepcopy(twin.graph)
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(names, in_spec, out_spec)))
    return fx.GraphModule(twin, graph)
