"""Running statistics of all calibration batches together, norm by norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.adaptation.sites import AdaptError, Site
from graphopt.adaptation.statistics import (
    Statistics,
    mixed,
    of_instances,
    per_channel,
    pooled,
    source_shares,
    wide,
)
from graphopt.ir.graph import Graph
from graphopt.ir.interpret import Interpreter

METHODS: dict[str, dict[str, Any]] = {"adabn": {}, "alpha-bn": {"alpha": 0.5}, "adamixbn": {}}
MEAN, VAR = 3, 4  # their places among the operands of a batch norm, and of an instance norm


def statistics(
    graph: Graph, sites: Sequence[Site], inputs: Sequence[Sequence[Any]], method: str,
    options: Mapping[str, Any],
) -> list[tuple[Site, Statistics]]:  # fmt: skip
    """The adapted statistics of every norm: all batches go through the graph side by side, so that a norm
    sees all of its inputs, made with the norms before it adapted."""
    if graph.mutated:
        raise AdaptError(
            f"the model writes its states ({', '.join(sorted(graph.mutated))}) in eval mode: what one "
            "batch leaves is read by the next, and statistics over all of them are not defined"
        )
    by_node = {one.node: one for one in sites}
    run = Interpreter(graph, writes=False)
    last = {used: node for node in graph.nodes for used in node.all_input_nodes}
    envs: list[dict[fx.Node, Any]] = [{} for _ in inputs]
    feeds = [iter(one) for one in inputs]
    found = []
    left = set(by_node)
    with torch.no_grad():
        for node in graph.nodes:
            if not left:
                break
            adapted: Statistics | None = None
            if node in by_node:
                left.discard(node)
                site = by_node[node]
                xs = [env[site.op.input.node] for env in envs]
                adapted = _adapted(site, xs, method, options, graph.where(node) or node.name)
                found.append((site, adapted))
            for env, feed in zip(envs, feeds, strict=True):
                if node.op == "placeholder":
                    env[node] = next(feed)
                elif node.op == "get_attr":
                    env[node] = run.state(str(node.target))
                elif adapted is not None:
                    env[node] = _normalized(node, env, adapted)
                else:
                    env[node] = run.call(node, env)
                for used in node.all_input_nodes:
                    if last[used] is node:
                        env.pop(used, None)
    return found


def _adapted(
    site: Site, xs: Sequence[Tensor], method: str, options: Mapping[str, Any], where: str
) -> Statistics:
    xs = [x for x in xs if len(x)]
    count = sum(map(per_channel, xs))
    if count < 2:
        raise AdaptError(
            f"{where}: expected at least 2 values per channel for a variance, found {count}"
        )
    source = site.source
    target = pooled(xs, unbiased=method != "adabn")
    if method == "adabn":
        mean, var = target
    elif method == "alpha-bn":
        mean, var = mixed(source, target, options["alpha"])
    else:
        own: Statistics = (wide(source[0]), wide(source[1]))
        shares = [source_shares(of_instances(wide(x), True), own, target) for x in xs]
        mean, var = mixed(source, target, 1 - torch.cat(shares).mean())
    return mean.to(source[0]), var.to(source[1])


def _normalized(node: fx.Node, env: Mapping[fx.Node, Any], statistics: Statistics) -> Tensor:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda one: env[one])
    args = (*args[:MEAN], *statistics, *args[VAR + 1 :])
    return node.target(*args, **kwargs)  # type: ignore[operator, no-any-return]
