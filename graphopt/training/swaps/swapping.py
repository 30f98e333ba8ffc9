"""swap_norm(), swap_attention(): a trainable module in which norms or attentions are replaced step by
step. It is the captured graph, so that any model will do; what is swapped is found in the graph."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt.ir import capture as capturing, ops
from graphopt.ir.affine import same
from graphopt.ir.builder import Builder
from graphopt.ir.driver import Record, Session
from graphopt.ir.graph import Graph, written
from graphopt.ir.inputs import as_call, declared_inputs
from graphopt.ir.source import copy_module
from graphopt.module import build
from graphopt.passes.canonicalize import Canonicalize, drop_dropout
from graphopt.training.swaps.attention import LinearAttention
from graphopt.training.swaps.find import (
    AttentionSite,
    NormSite,
    Site,
    find_attentions,
    find_norms,
    square,
)
from graphopt.training.swaps.norms import NORMS, Old
from graphopt.training.swaps.schedule import BatchNorm, Progressive, SwapReport, Swaps

ATTENTIONS = ("sla",)
ATTENTION_OPTIONS = {"convolution": True, "position": True, "class_tokens": 0, "order": "auto"}


class SwapError(ValueError):
    """Options that cannot be met, or a model in which nothing can be swapped."""


def swap_norm(
    model: nn.Module, args: Any = None, kwargs: Mapping[str, Any] | None = None, *,
    to: str = "prepbn", steps: int, warm: int = 0, only: str | Sequence[str] = "*",
    eval_new: bool = False, dynamic_shapes: Any = None, **options: Any,
) -> nn.Module:  # fmt: skip
    """`swap` for layer norms and RMS norms; `options` are those of the norm `to`."""
    return swap(
        model, args, kwargs, norm=to, steps=steps, warm=warm, only=only, eval_new=eval_new,
        dynamic_shapes=dynamic_shapes, norm_options=options,
    )  # fmt: skip


def swap_attention(
    model: nn.Module, args: Any = None, kwargs: Mapping[str, Any] | None = None, *,
    to: str = "sla", steps: int, warm: int = 0, only: str | Sequence[str] = "*",
    eval_new: bool = False, dynamic_shapes: Any = None, **options: Any,
) -> nn.Module:  # fmt: skip
    """`swap` for attentions with softmax; `options` are those of the attention `to`."""
    return swap(
        model, args, kwargs, attention=to, steps=steps, warm=warm, only=only, eval_new=eval_new,
        dynamic_shapes=dynamic_shapes, attention_options=options,
    )  # fmt: skip


def swap(
    model: nn.Module, args: Any = None, kwargs: Mapping[str, Any] | None = None, *,
    steps: int, warm: int = 0, norm: str | None = None, attention: str | None = None,
    only: str | Sequence[str] = "*", eval_new: bool = False, dynamic_shapes: Any = None,
    norm_options: Mapping[str, Any] | None = None,
    attention_options: Mapping[str, Any] | None = None,
) -> nn.Module:  # fmt: skip
    """A trainable copy of `model` in which norms or attentions give way to others while it trains.

    Every call in training mode advances the schedule (see `Swaps`): `warm` calls of the old modules
    alone, then `share * old + (1 - share) * new` with a share that falls to 0 within `steps` calls,
    then the new ones alone. The counter is in the state dict. Parameters keep their names, shared ones
    stay shared; the new ones are under `swaps`, where `swaps.report` is too. After training,
    `graphopt.optimize(swapped.eval(), args)` leaves nothing of the old ones.

    Args:
        model: any nn.Module that is captured as one graph; it is not changed.
        args, kwargs: example inputs, as for `graphopt.optimize`.
        norm: what takes the place of layer norms and RMS norms: prepbn, batchnorm, dyt, rmsnorm,
            powernorm, groupnorm or evonorm.
        attention: what takes the place of attention with softmax: sla.
        steps: the number of training calls within which the share falls from 1 to 0.
        warm: the number of training calls before that.
        only: patterns (`fnmatch`) of module paths; others are left alone.
        eval_new: whether eval mode uses the new modules alone before the schedule is over.
        dynamic_shapes: as for `torch.export.export`, in place of the dynamic first axis.
        norm_options: momentum and alpha of prepbn, momentum of batchnorm, alpha of dyt, groups and
            momentum of powernorm, groups of groupnorm and evonorm.
        attention_options: convolution, position, class_tokens, order; see `LinearAttention`.

    Returns:
        A `torch.fx.GraphModule` in training mode.

    Raises:
        SwapError: for options out of range, or if there is nothing that can be swapped.
        CaptureError: if the model is not captured as one graph.
    """
    if steps < 0 or warm < 0:
        raise SwapError(f"steps is {steps} and warm {warm}, expected at least 0")
    kinds: list[tuple[str, Callable[[Graph], Iterator[Any]], _Make]] = []
    if norm is not None:
        _known("norm", norm, NORMS)
        chosen = _options(norm, NORMS[norm].OPTIONS, norm_options)
        kinds.append((f"swap-norm{{to={norm}}}", find_norms, partial(_new_norm, norm, chosen)))
    if attention is not None:
        _known("attention", attention, ATTENTIONS)
        chosen = _options(attention, ATTENTION_OPTIONS, attention_options)
        _known("order", chosen["order"], ("auto", "linear", "quadratic"))
        name = f"swap-attention{{to={attention}}}"
        kinds.append((name, find_attentions, partial(_new_attention, chosen)))
    if not kinds:
        raise SwapError("expected norm=... or attention=..., found neither")
    if any(isinstance(one, Swaps) and not one.finished for one in model.modules()):
        raise SwapError(
            "a swap of this model is not over: train on, or swap norms and attentions together "
            "with graphopt.training.swap(norm=..., attention=...)"
        )
    graph = _captured(model, args, kwargs, dynamic_shapes)
    report = SwapReport()
    patterns = (only,) if isinstance(only, str) else tuple(only)
    sites: list[tuple[Site, nn.Module]] = []
    for name, find, make in kinds:
        for site in find(graph):
            where = graph.where(site.out)
            if not any(fnmatch.fnmatchcase(where, one) for one in patterns):
                continue
            new, reason = (None, site.reason) if site.reason else make(graph, site)
            record = Record(name, where, "Calibrated", reason, node=site.out.name)
            (report.refused if new is None else report.swapped).append(record)
            if new is not None:
                sites.append((site, new))
    if not sites:
        found = "; ".join(f"{one.where or one.node}: {one.reason}" for one in report.refused)
        raise SwapError(f"nothing can be swapped: {found or 'no such op in the graph'}")
    return _rebuilt(graph, sites, Swaps(warm, steps, eval_new, report))


def _known(what: str, value: str, known: Any) -> None:
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise SwapError(f"{what} is {value!r}, expected one of {', '.join(known)}{hint}")


def _options(of: str, known: Mapping[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
    for name in given or {}:
        if name not in known:
            raise SwapError(f"{of} has no option {name!r} (options: {', '.join(known) or 'none'})")
    return {**known, **(given or {})}


@dataclasses.dataclass(frozen=True)
class _Canonical(Canonicalize):
    """Canonicalization that keeps dropout, which trains."""

    rewrites = tuple(  # type: ignore[assignment]
        one for one in Canonicalize.rewrites if one is not drop_dropout
    )


def _captured(
    model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None, dynamic_shapes: Any
) -> Graph:
    """The canonical graph of a copy of the model in eval mode."""
    args, kwargs = as_call(args, kwargs)
    if args is None:
        args, kwargs = declared_inputs(model)
    if args is None:
        raise SwapError("expected example inputs: the model declares none")
    source = copy_module(model).eval()
    graph = capturing.capture(source, args, dict(kwargs or {}), dynamic_shapes).graph
    _Canonical().run(Session(graph))
    return graph


# -- what takes the place of a site ---------------------------------------------------------------

Made = tuple[nn.Module | None, str]  # the new module of a site, or the reason why there is none
_Make = Callable[[Graph, Any], Made]


def _new_norm(to: str, options: Mapping[str, Any], graph: Graph, site: NormSite) -> Made:
    x = site.inputs[0].meta["val"]
    channels, groups = x.shape[site.axis], options.get("groups")
    if groups is not None and (groups < 1 or channels % groups):
        return None, f"its {channels} channels do not make {groups} groups"
    gain, shift = (
        None if one is None else value_of(graph, one).detach().reshape(-1)
        for one in (site.gain, site.shift)
    )
    old = Old(site.axis, x.ndim, channels, site.eps, gain, shift, _like(x))
    return NORMS[to](old, **options), ""


def _new_attention(options: Mapping[str, Any], graph: Graph, site: AttentionSite) -> Made:
    q, k, v = (one.meta["val"] for one in site.inputs)
    skipped, convolution = options["class_tokens"], options["convolution"]
    tokens, channels = v.shape[-2], v.shape[-1]
    if convolution:
        if not isinstance(channels, int) or not isinstance(tokens, int):
            return None, "its number of tokens is dynamic; convolution=False will do"
        if not same(q.shape[-2], tokens):
            return None, "its queries and keys differ in number; convolution=False will do"
        if not square(tokens - skipped):
            hint = "; class_tokens=1 would" if square(tokens - 1) else ""
            return None, f"its {tokens} tokens ({skipped} apart) do not fill a square{hint}"
    like, position = _like(v), None
    keys = (*k.shape[:-2], k.shape[-1], k.shape[-2]) if site.transposed else tuple(k.shape)
    if options["position"] and all(isinstance(size, int) for size in keys[-2:]):
        heads = keys[-3:-2] if len(keys) > 3 and isinstance(keys[-3], int) else ()
        position = like.new_zeros((*heads, *keys[-2:]))
    return LinearAttention(
        channels, position, convolution, skipped, site.transposed, options["order"], like
    ), ""


def _like(x: Tensor) -> Tensor:
    """An empty tensor of the dtype and on the device of new states: at least float32."""
    return torch.empty(0, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def value_of(graph: Graph, node: fx.Node) -> Tensor:
    """The value of a node that depends on parameters alone."""
    if node.op == "get_attr":
        return graph.states[str(node.target)].tensor
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda one: value_of(graph, one))
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator, no-any-return]


# -- the module ---------------------------------------------------------------------------------


def _rebuilt(graph: Graph, sites: Sequence[tuple[Site, nn.Module]], swaps: Swaps) -> fx.GraphModule:
    """The graph as a module in which every site is a call of a `Progressive`."""
    position = {node: index for index, node in enumerate(graph.nodes)}
    module = build(graph)
    code = module.graph
    twin = dict(zip(graph.fx.nodes, list(code.nodes), strict=True))
    home = _free(module, "swaps")
    module.add_submodule(home, swaps)
    first = next(one for one in code.nodes if one.op not in ("placeholder", "get_attr"))
    with code.inserting_before(first):
        share = code.call_module(home)
    for site, new in sites:
        operands, old = _region(graph, site, position)
        takes = tuple(operands.index(one) for one in site.inputs)
        name = re.sub(r"\W", "_", graph.where(site.out)) or site.out.name
        name = _free(swaps, name)
        swaps.add_module(name, Progressive(old, new, takes))
        out = twin[site.out]
        with code.inserting_before(out):
            call = code.call_module(f"{home}.{name}", (share, *(twin[one] for one in operands)))
        call.meta = dict(out.meta)
        out.replace_all_uses_with(call)
    code.eliminate_dead_code(is_impure_node=_has_effect)
    for node in graph.calls:
        _trains(module, twin[node], Builder(graph, node).view(node), swaps.report)
    for node in code.nodes:  # what a later capture of this module says of its place
        if node.op == "call_function" and node.meta.get("where"):
            where = node.meta["where"]
            node.meta["nn_module_stack"] = {where: (where, "torch.nn.Module")}
    code.eliminate_dead_code(is_impure_node=_has_effect)
    module.recompile()
    return module.train()


def _has_effect(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output") or bool(written(node))


def _region(
    graph: Graph, site: Site, position: Mapping[fx.Node, int]
) -> tuple[list[fx.Node], fx.GraphModule]:
    """The piece of a graph from the inputs of a site to its value, and its operands: the inputs,
    parameters, and whatever is computed before them."""
    start = min(position[one] for one in site.inputs)
    inside: set[fx.Node] = set()
    operands = dict.fromkeys(site.inputs)
    stack = [site.out]
    while stack:
        node = stack.pop()
        if node in inside or node in operands:
            continue
        if node.op != "call_function" or graph.is_constant(node) or position[node] < start:
            operands[node] = None
            continue
        inside.add(node)
        stack += node.all_input_nodes
    code = fx.Graph()
    copied = {one: code.placeholder(one.name) for one in operands}
    for node in sorted(inside, key=position.__getitem__):
        copied[node] = code.node_copy(node, copied.__getitem__)
        copied[node].meta = {}
    code.output(copied[site.out])
    return list(operands), fx.GraphModule(nn.Module(), code, "Old")


def _trains(module: fx.GraphModule, node: fx.Node, op: Any, report: SwapReport) -> None:
    """Dropout and batch norms of the source follow the mode of the module."""
    if node._erased or not node.users:
        return
    made: nn.Module
    if isinstance(op, ops.Dropout):
        if node.target is not torch.ops.aten.dropout.default:
            report.notes.append(f"{op.out.where or node.name}: {node.target} stays off")
            return
        made, args = nn.Dropout(op.p), (node.args[0],)
    elif isinstance(op, ops.BatchNorm) and not op.uses_batch_statistics:
        made, args = BatchNorm(op.momentum, op.eps), node.args[:5]  # type: ignore[assignment]
    else:
        return
    name = _free(module, f"mode_{node.name}")
    module.add_submodule(name, made)
    with module.graph.inserting_before(node):
        call = module.graph.call_module(name, args)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)


def _free(module: nn.Module, name: str) -> str:
    """The name, or one with a number behind it, that a module has no attribute of."""
    free, count = name, 0
    while hasattr(module, free):
        count += 1
        free = f"{name}_{count}"
    return free
