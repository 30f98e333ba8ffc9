"""The backward of every Function that a trace came by, as a graph.

`gradients.kept` leaves a `with_gradient` for every call. Here the backward of the call is traced, once for
equal calls, with all inputs requiring a gradient, on values with the sizes of those in the graph; on random
values of its own it must then give what the Function's own gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt.ir import text_graph
from graphopt.ir.functional import Normalizer
from graphopt.ir.gradients import Call, Calls, is_differentiable, name_of
from graphopt.ir.graph import is_random
from graphopt.ir.ops.base import hint
from graphopt.ir.ops.gradient import TARGET, Backward


class Untraceable(ValueError):
    """Why a backward cannot be a graph."""


def settle(module: fx.GraphModule, calls: Calls) -> None:
    """Write the backward of every call into the graphs of a traced program; where there is none, let
    readers of the results read what the forward gave, and note why in `calls`."""
    texts: dict[Any, str | Untraceable] = {}
    for inner in module.modules():
        if not isinstance(inner, fx.GraphModule):
            continue
        for node in [one for one in inner.graph.nodes if one.target is TARGET]:
            call = calls.marked[text_graph.read(node.args[0])[1]["call"]]
            types = map(_types, node.args[1:])
            key = (call.function, call.context.key(), str(call.places), str(call.fixed), *types)
            if key not in texts:
                texts[key] = _text(call, *node.args[1:])
            text = texts[key]
            if isinstance(text, str):
                node.update_arg(0, text)
                continue
            calls.refused[name_of(call.function)] = str(text)
            for user in list(node.users):
                user.replace_all_uses_with(node.args[1][user.args[1]])
                inner.graph.erase_node(user)
            inner.graph.erase_node(node)


def _types(nodes: Any) -> Any:
    return tuple((one.meta["val"].dtype, str(tuple(one.meta["val"].shape))) for one in nodes)


def _text(call: Call, results: Any, inputs: Any, saved: Any) -> str | Untraceable:
    """The text of a call's backward, or why there is none."""
    values = [one.meta["val"] for one in saved]
    gradients = [one.meta["val"] for one in results]
    try:
        graph = _trace(call, values, gradients)
        text = call.text(graph, gradients)
    except Untraceable as error:
        return error
    except Exception as error:
        lines = str(error).strip().splitlines()
        return Untraceable(
            f"its backward cannot be traced: {type(error).__name__}: {lines[0] if lines else ''}"
        )
    different = "" if any(map(is_random, graph.nodes)) else _difference(
        call, Backward(text), values, gradients
    )  # fmt: skip
    return Untraceable(different) if different else text


def _trace(call: Call, kept: list[Tensor], results: list[Tensor]) -> fx.Graph:
    """The backward of a call as a graph of what it kept and the gradients of its results."""
    mode: Any = results[0].fake_mode  # type: ignore[attr-defined]
    known = _knowledge(mode)
    with mode, torch.no_grad():
        given = [torch.empty_like(one) for one in kept]
        gradients = [torch.empty_like(one) for one in results]

    def run(saved: list[Tensor], gradient: list[Tensor]) -> list[Tensor | None]:
        return call.backward(call.context.filled(saved), gradient)

    tracing: Any = "fake" if mode.shape_env is None else "symbolic"
    with torch.no_grad():
        made = make_fx(run, tracing_mode=tracing, pre_dispatch=True)(given, gradients)
    if _knowledge(mode) != known:
        raise Untraceable("its backward depends on sizes that may change")
    _without_constants(made)
    graph = fx.Graph()
    normal = Normalizer(graph, mode)
    sources = [node for node in made.graph.nodes if node.op == "placeholder"]
    for source in sources:
        normal.add_external(source, graph.placeholder(source.name))
    normal.run(made)
    if any(normal.places[one].cell.version for one in sources[: len(kept)]):
        raise Untraceable("its backward writes to what the forward saved")
    (leaves,) = next(iter(reversed(made.graph.nodes))).args
    graph.output(tuple(normal.read(one) for one in leaves))
    graph.eliminate_dead_code()
    return graph


def _knowledge(mode: Any) -> Any:
    """What is known about dynamic sizes."""
    env = mode.shape_env
    return None if env is None else (len(env.guards), len(env.replacements))


def _without_constants(module: fx.GraphModule) -> None:
    """Write numbers out that were traced as tensors, and leave switches of the mode out.

    Raises:
        Untraceable: if a tensor is read that is neither saved nor a number.
    """
    for node in list(module.graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            module.graph.erase_node(node)
        if node.op != "get_attr":
            continue
        value = getattr(module, str(node.target))
        fresh = all("lift_fresh" in str(user.target) for user in node.users)
        if not isinstance(value, Tensor) or not fresh or value.numel() != 1 or value.is_complex():
            raise Untraceable("its backward reads a tensor that its forward did not save")
        for user in list(node.users):
            with module.graph.inserting_before(user):
                number = module.graph.call_function(
                    torch.ops.aten.full.default, (list(value.shape), value.item()),
                    {"dtype": value.dtype, "device": value.device},
                )  # fmt: skip
            number.meta = dict(user.meta)
            user.replace_all_uses_with(number)
            module.graph.erase_node(user)
        module.graph.erase_node(node)


def _difference(call: Call, traced: Backward, saved: list[Tensor], results: list[Tensor]) -> str:
    """How a traced backward differs from the Function's own on random values; empty if it does not."""
    generator = torch.Generator().manual_seed(0)
    given = [_random(one, generator) for one in saved]
    gradients = [_random(one, generator) for one in results]

    def outcome(run: Callable[..., Any]) -> Any:
        copies = [[one.clone() for one in values] for values in (given, gradients)]
        try:
            with torch.no_grad():
                return list(run(*copies))
        except Exception as error:
            return type(error).__name__

    own = outcome(lambda a, b: call.backward(call.context.filled(a, hint), b))
    found = outcome(traced)
    if isinstance(own, str) or isinstance(found, str):
        return "" if own == found else f"its backward gives {own} where its trace gives {found}"
    for a, b in zip(own, found, strict=True):
        if (a is None) != (b is None) or (a is not None and not _close(a, b)):
            return "its trace gives another gradient than its backward: it depends on values"
    return ""


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b.to(a.dtype), 1e-3, 1e-5, equal_nan=True)


def _random(value: Tensor, generator: torch.Generator) -> Tensor:
    shape = [hint(size) for size in value.shape]
    if is_differentiable(value):
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    else:
        drawn = torch.randint(0, 2, shape, generator=generator).double()
    return drawn.to(value.dtype).to(value.device)
