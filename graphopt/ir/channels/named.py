"""Rules of ops that have no view, by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from graphopt.ir.channels.labels import Labels, Layers
from graphopt.ir.channels.trace import NAMED, Trace, leading, name_of, shape_of
from graphopt.ir.ops.base import Call
from graphopt.ir.value import Value

Rule = Callable[[Call, Trace], Any]

POINTWISE = {
    "log_sigmoid", "floor_divide", "special_expit", "type_as", "conj", "zeros_like", "ones_like",
    "full_like", "empty_like", "rand_like", "randn_like", "nan_to_num", "lerp",
}  # fmt: skip
SPATIAL = {
    "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d", "grid_sampler",
    "grid_sampler_2d", "adaptive_max_pool2d", "reflection_pad2d", "replication_pad2d",
}  # fmt: skip
STATISTICS = {
    "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "logsumexp", "norm", "prod",
    "linalg_norm", "linalg_vector_norm",
}  # fmt: skip
ALONG = {"sort", "topk", "argsort", "cummax", "cummin", "cumprod", "logcumsumexp"}
MADE = {"new_zeros", "new_ones", "new_full", "new_empty"}  # read no values


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        NAMED.update(dict.fromkeys(names, rule))
        return rule

    return register


def _shapes(call: Call) -> list[tuple[int, ...]]:
    found = call.node.meta["val"]
    return [shape_of(one) for one in (found if isinstance(found, (list, tuple)) else [found])]


def _input(call: Call) -> Value:
    found = next(one for one in call.arguments.values() if isinstance(one, Value))
    assert isinstance(found, Value)
    return found


def _like_outputs(call: Call, labels: list[Labels]) -> Any:
    return labels if isinstance(call.node.meta["val"], (list, tuple)) else labels[0]


@_rule(*POINTWISE)
def _(call: Call, t: Trace) -> Any:
    tensors = [one for one in call.arguments.values() if isinstance(one, Value) and one.is_tensor]
    return t.elementwise(_shapes(call)[0], *(t[one] for one in tensors))


@_rule(*MADE)
def _(call: Call, t: Trace) -> Any:
    (shape,) = _shapes(call)
    return Labels(shape, fresh={axis for axis, size in enumerate(shape) if size > 1})


@_rule(*SPATIAL)
def _(call: Call, t: Trace) -> Any:
    for one in call.arguments.values():
        if isinstance(one, Value) and one != _input(call) and one.is_tensor:
            t.fix(t[one], range(one.ndim), "it says where values are taken from")
    labels = t[_input(call)]
    found = [t.passed(labels, shape, *range(2, len(shape))) for shape in _shapes(call)]
    return _like_outputs(call, found)


@_rule(*ALONG)
def _(call: Call, t: Trace) -> Any:
    x, dim = t[_input(call)], call.arguments.get("dim")
    if not isinstance(dim, int) or any(len(one) != len(x.shape) for one in _shapes(call)):
        return None
    return _like_outputs(call, [t.passed(x, shape, dim) for shape in _shapes(call)])


@_rule(*STATISTICS)
def _(call: Call, t: Trace) -> Any:
    x, dims = t[_input(call)], call.arguments.get("dim")
    if isinstance(call.arguments.get("other"), Value):  # of two tensors, entry by entry
        return t.elementwise(_shapes(call)[0], x, t[call["other"]])
    picks = len(_shapes(call)) > 1 and "mean" not in name_of(call.node)  # values and their places
    count = len(x.shape)
    gone = (
        {dims % count} if isinstance(dims, int) else {dim % count for dim in dims or range(count)}
    )
    t.coupling.materialize(x)
    if picks:
        t.fix(x, gone, f"{call.node.name} tells a place along the axis")
    elif any(x.layers(axis) for axis in gone):
        t.statistics[call.node] = f"{name_of(call.node)} over the axis"
    found = []
    for shape in _shapes(call):
        left = list(range(count)) if len(shape) == count else sorted(set(range(count)) - gone)
        axes = {i: x.layers(axis) for i, axis in enumerate(left) if axis not in gone}
        found.append(Labels(shape, {i: layers for i, layers in axes.items() if layers}))
    return _like_outputs(call, found)


@_rule("_weight_norm")
def _(call: Call, t: Trace) -> Any:
    v, g, (shape,) = t[call["v"]], t[call["g"]], _shapes(call)
    dim = call["dim"] % len(shape)
    t.coupling.materialize(v)
    t.join("it scales what is fixed", (v, dim), (g, dim))
    if any(layers for axis, layers in v.axes.items() if axis != dim):
        t.statistics[call.node] = "norm over the axis"
    return Labels(shape, dict(v.axes))


@_rule("glu")
def _(call: Call, t: Trace) -> Any:
    x, (shape,) = t[call["self"]], _shapes(call)
    dim = call["dim"] % len(shape)
    out = t.passed(x, shape)
    halves = [np.split(one, 2) for one in x.layers(dim)]
    for a, b in halves:
        t.coupling.couple(a, b)
    out.axes[dim] = tuple(a for a, _ in halves)
    return out


@_rule("im2col")
def _(call: Call, t: Trace) -> Any:
    x, (shape,) = t[call["self"]], _shapes(call)
    out = t.passed(x, x.shape, -1, -2)
    axis, times = len(shape) - 2, math.prod(call["kernel_size"])
    axes = {one: layers for one, layers in out.axes.items() if one < axis}
    axes[axis] = tuple(np.repeat(one, times) for one in x.layers(axis))
    return Labels(shape, axes)


@_rule("col2im")
def _(call: Call, t: Trace) -> Any:
    x, (shape,) = t[call["self"]], _shapes(call)
    out = t.passed(x, x.shape, -1)
    axis, times = len(shape) - 3, math.prod(call["kernel_size"])
    rows = [one.reshape(-1, times) for one in x.layers(axis)]
    for one in rows:
        t.coupling.couple(one[:, 1:], one[:, :1])
    axes = {one: layers for one, layers in out.axes.items() if one < axis}
    axes[axis] = tuple(one[:, 0] for one in rows)
    return Labels(shape, axes)


@_rule("bilinear")
def _(call: Call, t: Trace) -> Any:
    weight, (shape,) = t[call["weight"]], _shapes(call)
    for axis, name in ((1, "input1"), (2, "input2")):
        t.join("it is multiplied with what is fixed", (t[call[name]], -1), (weight, axis))
    bias = [] if call["bias"] is None else [(t[call["bias"]], 0)]
    out = t.elementwise(shape[:-1], *(leading(t[call[name]], 1) for name in ("input1", "input2")))
    made = t.join("its bias is fixed", (weight, 0), *bias)
    return Labels(shape, {**out.axes, len(shape) - 1: made})


@_rule("lstm", "gru")
def _(call: Call, t: Trace) -> Any:
    """Gates are blocks of rows, one row of each for every hidden unit."""
    arguments = call.arguments
    if "params" not in arguments or "input" not in arguments:
        return None  # packed sequences
    lstm = name_of(call.node) == "lstm"
    states = list(arguments["hx"]) if isinstance(arguments["hx"], tuple) else [arguments["hx"]]
    params = list(arguments["params"])
    ways = 2 if arguments["bidirectional"] else 1
    each = len(params) // (arguments["num_layers"] * ways)
    if each not in (2, 4):
        return None  # projections
    x = t[arguments["input"]]
    t.coupling.materialize(x)
    t.fix(x, [0, 1], "it runs along the axis")
    hidden = t[params[1]].shape[1]
    gates = 4 if lstm else 3
    into: Layers = x.layers(-1)
    kept: list[Any] = []
    for layer in range(arguments["num_layers"]):
        units = [t.coupling.new(hidden) for _ in range(ways)]
        kept += units
        for way, unit in enumerate(units):
            of = params[(layer * ways + way) * each :][:each]
            rows = (np.tile(unit, gates),)
            t.meets(t[of[0]], 1, into)
            t.meets(t[of[1]], 1, (unit,))
            for one in of:
                t.meets(t[one], 0, rows)
        into = (np.concatenate(units),)
    shapes = _shapes(call)
    for state in states:
        t.fix(t[state], [0, 1], "it is a state for every layer")
        axis = len(t[state].shape) - 1
        for unit in kept:
            t.meets(t[state], axis, (unit,))
    if len(kept) > 1:
        # One state tensor for all layers and directions: their units go together.
        for unit in kept[1:]:
            t.coupling.couple(unit, kept[0])
    last = (kept[0],)
    return [Labels(shapes[0], {len(shapes[0]) - 1: into}),
            *(Labels(shape, {len(shape) - 1: last}) for shape in shapes[1:])]  # fmt: skip
