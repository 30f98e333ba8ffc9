"""adapt_norm(): a model whose batch norms have the statistics of the data that it is used on."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from graphopt.adaptation import frozen
from graphopt.adaptation.online import NORMS
from graphopt.adaptation.sites import AdaptError, AdaptReport, Site, adaptable, find
from graphopt.adaptation.statistics import Statistics
from graphopt.ir import capture as capturing
from graphopt.ir.driver import Session
from graphopt.ir.graph import Graph
from graphopt.ir.inputs import as_call, declared_inputs
from graphopt.ir.source import copy_module
from graphopt.module import attach, build
from graphopt.passes.canonicalize import Canonicalize
from graphopt.training.swaps.swapping import _free, _has_effect


class Adaptation(nn.Module):
    """The norms that adapt on every call, by name, and the report."""

    def __init__(self, report: AdaptReport) -> None:
        super().__init__()
        self.report = report
        self._initial: dict[str, Tensor] = {}

    def add(self, name: str, norm: nn.Module) -> None:
        self.add_module(name, norm)
        for state, value in norm.named_buffers():
            self._initial[f"{name}.{state}"] = value.clone()

    def forward(self, name: str, *operands: Any) -> Tensor:
        return self._modules[name](*operands)  # type: ignore[misc, no-any-return]

    def reset(self) -> None:
        """Forget the target: all states are as they were made from the source."""
        for name, state in self.named_buffers():
            state.copy_(self._initial[name])


def adapt_norm(
    model: nn.Module, batches: Iterable[Any] | None = None, method: str = "adabn", *,
    online: bool = False, inputs: Any = None, dynamic_shapes: Any = None, **options: Any,
) -> fx.GraphModule:  # fmt: skip
    """A copy of `model` whose batch norms are adapted to target data, without labels or training.

    Frozen, the statistics of all `batches` together become running statistics, norm by norm: the inputs
    of a norm are those that it has with the norms before it adapted already. The batches are walked
    through the graph side by side, each once, so the activations of all of them must fit in memory;
    how the data is cut into batches makes no difference. `graphopt.optimize` folds the result like any
    batch norm. With `online` the norms adapt on every call instead, in eval mode too; their states are
    buffers.

    Args:
        model: any nn.Module that is captured as one graph; it is not changed. It is taken in eval mode.
        batches: the inputs of each call: a tensor, a tuple of positional inputs, or a mapping. With
            `online` the model is called on each in turn, if there are any.
        method: adabn, alpha-bn, adamixbn or unmix-tns; the last is online only.
        online: whether the norms adapt while the model is used.
        inputs: example inputs, as for `graphopt.optimize`, in place of the first batch.
        dynamic_shapes: as for `torch.export.export`, in place of the dynamic first axis.
        options: of alpha-bn `alpha`, the weight of the target's statistics; online, of adabn and
            alpha-bn `momentum`, the weight of a batch in them; of unmix-tns `components`, `momentum`
            (per 64 instances) and `seed`.

    Returns:
        A `torch.fx.GraphModule` in eval mode. Parameters have the model's names; a statistic that
        only one norm reads too. `adaptation.report` lists the norms, `adaptation.reset()` forgets
        what online norms have learned.

    Raises:
        AdaptError: for options out of range, batches that are missing or too small, or a model with
            batch norms that cannot be adapted, or none.
        CaptureError: if the model is not captured as one graph.
    """
    chosen = _options(method, online, options)
    if isinstance(batches, (Tensor, Mapping)):
        raise AdaptError(
            f"batches: expected a sequence of batches, found a {type(batches).__name__}; for one "
            "batch, [x]"
        )
    calls = [] if batches is None else [_call(number, one) for number, one in enumerate(batches)]
    if not calls and not online:
        raise AdaptError("expected batches to take statistics from, found none")
    if inputs is not None:
        args, kwargs = as_call(inputs, None)
    else:
        args, kwargs = calls[0] if calls else declared_inputs(model)
    if args is None:
        raise AdaptError("expected batches or inputs: the model declares no example inputs")
    source = copy_module(model).eval()
    graph = capturing.capture(source, args, dict(kwargs or {}), dynamic_shapes).graph
    Canonicalize().run(Session(graph))
    sites = find(graph)
    report = AdaptReport()
    taken = [one for one in sites if adaptable(graph, one, method, online, report)]
    if not taken:
        raise AdaptError(f"no batch norm can be adapted: {report.kept[0].reason}")
    flat = [_leaves(graph, number, *one) for number, one in enumerate(calls)]
    if online:
        module = _with_online(graph, taken, method, chosen, report)
        with torch.no_grad():
            for args, kwargs in calls:
                module(*args, **dict(kwargs or {}))
        return module
    return _with_statistics(graph, frozen.statistics(graph, taken, flat, method, chosen), report)


# -- what is asked for ------------------------------------------------------------------------------


def _options(method: str, online: bool, given: Mapping[str, Any]) -> dict[str, Any]:
    if method not in NORMS:
        raise AdaptError(f"method is {method!r}, expected one of {_listed(method, NORMS)}")
    if not online and method not in frozen.METHODS:
        raise AdaptError(
            f"{method} normalizes every instance with statistics of its own, so there are none that "
            "could be frozen or folded: expected online=True"
        )
    known = NORMS[method].OPTIONS if online else frozen.METHODS[method]
    for name in given:
        if name not in known:
            how = "online" if online else "frozen"
            raise AdaptError(f"{method} ({how}) has no option {name!r}: {_listed(name, known)}")
    chosen = {**known, **given}
    for name, low in (("alpha", 0.0), ("momentum", math.ulp(0.0))):
        if name in chosen and not low <= chosen[name] <= 1:
            above = "from 0" if low == 0 else "above 0, up"
            raise AdaptError(f"{name} is {chosen[name]}, expected a number {above} to 1")
    count = chosen.get("components", 1)
    if not isinstance(count, int) or count < 1:
        raise AdaptError(f"components is {count!r}, expected a whole number of at least 1")
    return chosen


def _listed(value: Any, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(value), list(known), n=1, cutoff=0.5)
    return (", ".join(known) or "there are none") + (f"; did you mean {near[0]}?" if near else "")


def _call(number: int, batch: Any) -> tuple[tuple[Any, ...], Mapping[str, Any] | None]:
    try:
        args, kwargs = as_call(batch, None)
    except TypeError as error:
        raise AdaptError(f"batches[{number}]: {error}") from None
    if args is None:
        raise AdaptError(f"batches[{number}]: expected inputs, found None")
    return args, kwargs


def _leaves(
    graph: Graph, number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
) -> list[Any]:
    leaves, spec = pytree.tree_flatten((args, dict(kwargs or {})))
    if spec != graph.signature.in_spec:
        raise AdaptError(
            f"batches[{number}]: expected inputs of the form {graph.signature.in_spec}, found {spec}; "
            "labels are no inputs"
        )
    return leaves


def _with_statistics(
    graph: Graph, found: Sequence[tuple[Site, Statistics]], report: AdaptReport
) -> fx.GraphModule:
    """The graph as a module with other running statistics, a pair for every norm."""
    module, twin = _built(graph)
    for site, statistics in found:
        node = twin[site.node]
        args = list(node.args)
        fields = ((frozen.MEAN, "running_mean"), (frozen.VAR, "running_var"))
        for (place, field), value in zip(fields, statistics, strict=True):
            old = site.node.args[place]
            assert isinstance(old, fx.Node)
            own = old.op == "get_attr" and graph.states[str(old.target)].kind == "buffer"
            if own and len(old.users) == 1:
                name = str(old.target)
            else:
                where = graph.where(site.node)
                name = _new_name(
                    module, f"{where}.{field}" if where else f"{site.node.name}.{field}"
                )
            attach(module, name, value, "buffer", True)
            with module.graph.inserting_before(node):
                args[place] = module.graph.get_attr(name)
        node.args = tuple(args)
    module.add_module(_free(module, "adaptation"), Adaptation(report))
    return _finished(module)


# -- online -----------------------------------------------------------------------------------------


def _with_online(
    graph: Graph, sites: Sequence[Site], method: str, options: Mapping[str, Any],
    report: AdaptReport,
) -> fx.GraphModule:  # fmt: skip
    """The graph as a module in which every norm is a call of one that adapts."""
    module, twin = _built(graph)
    adaptation = Adaptation(report)
    home = _free(module, "adaptation")
    module.add_module(home, adaptation)
    for number, site in enumerate(sites):
        own = dict(options)
        if "seed" in own:
            own["seed"] += number
        name = re.sub(r"\W", "_", graph.where(site.node)) or site.node.name
        name = _free(adaptation, name)
        adaptation.add(name, NORMS[method](site.op.eps, site.source, **own))
        node = twin[site.node]
        with module.graph.inserting_before(node):
            call = module.graph.call_module(home, (name, *node.args[: frozen.VAR + 1]))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
    return _finished(module)


# -- the module -------------------------------------------------------------------------------------


def _built(graph: Graph) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    module = build(graph)
    return module, dict(zip(graph.fx.nodes, list(module.graph.nodes), strict=True))


def _finished(module: fx.GraphModule) -> fx.GraphModule:
    module.graph.eliminate_dead_code(is_impure_node=_has_effect)
    for node in module.graph.nodes:  # what a later capture of this module says of its place
        if node.op == "call_function" and node.meta.get("where"):
            where = node.meta["where"]
            node.meta["nn_module_stack"] = {where: (where, "torch.nn.Module")}
    module.recompile()
    return module.eval()


def _new_name(module: nn.Module, name: str) -> str:
    """The dotted name, or one with a number behind it, that no state has."""
    taken = {*(one for one, _ in module.named_parameters(remove_duplicate=False)),
             *(one for one, _ in module.named_buffers(remove_duplicate=False))}  # fmt: skip
    free, count = name, 0
    while free in taken:
        count += 1
        free = f"{name}_{count}"
    return free
