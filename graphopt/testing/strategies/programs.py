"""Free-form programs: statement after statement on the values there are, after NNSmith (Liu et al.,
ASPLOS 2023), whose shapes come from a solver where ours come from running."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.utils._pytree as pytree
from hypothesis import assume, strategies as st

from graphopt.testing.strategies import arithmetic, mechanisms, motion
from graphopt.testing.strategies.network import Draw, Network, seeds
from graphopt.testing.strategies.sketch import STATEMENTS, Sketch

WRITERS: tuple[ModuleType, ...] = (arithmetic, mechanisms, motion)  # they fill STATEMENTS
SHAPES = ((4,), (3, 5), (3, 4, 4), (2, 6, 6), (1,), (4, 3, 4, 3), (6, 4), (2, 2, 2))
RESULTS = (
    "{a}", "{a}, {b}", "[{a}, {b}]", '{{"logits": {a}, "rest": ({b}, {c})}}', "({a}, ({b}, [{c}]))",
    "{a}, {a}", "{a}, x0", "{a}, {b}[:1]", "{a}, {a}.flatten()", "{a}, None, 3", "{a}, {b}, {c}",
    "{a}, x0[:, :1]", "{a}.detach(), {b}",
)  # fmt: skip
CONSTANTS = {"gain": (1.5, "x0 = x0 * gain"), "flag": (True, "if flag: x0 = -x0")}


@st.composite
def programs(draw: Draw, *, most: int = 20) -> Network:
    """Up to `most` statements on one to three inputs; one or several outputs, in any structure."""
    s = Sketch(draw, draw(seeds()))
    positional: list[str] = ["x0"]
    keyword: list[str] = []
    s.input("x0", draw(st.sampled_from(SHAPES)))
    for name in ("x1", "x2")[: draw(st.integers(0, 2))]:
        s.input(name, draw(st.sampled_from(SHAPES)))
        (keyword if draw(st.integers(0, 2)) == 2 else positional).append(name)
    given = {name: s.value(name).clone() for name in (*positional, *keyword)}
    constants = draw(st.sampled_from([None, None, None, *CONSTANTS]))
    named = {name: given[name] for name in keyword}
    if constants is not None:
        named[constants], line = CONSTANTS[constants]
        s.define(constants, named[constants])
        s.run(line)
        keyword.append(f"{constants}=None")
    names = ["", *sorted(STATEMENTS)]  # none at all is the simplest: statements shrink away
    for _ in range(most):
        if not draw(st.integers(0, 63)):
            break
        name = draw(st.sampled_from(names))
        if name:
            STATEMENTS[name](s)
    newest = list(reversed(s.pool))
    a, b, c = (draw(st.sampled_from(newest[i:] or newest)) if i else newest[0] for i in range(3))
    signature = ", ".join([*positional, *(["*", *keyword] if keyword else [])])
    module = s.finish(signature, draw(st.sampled_from(RESULTS)).format(a=a, b=b, c=c))
    network = Network(module, tuple(given[name] for name in positional), named)
    assume(_runs(network))
    return network


def _runs(network: Network) -> bool:
    """Whether it runs from start to end (a hook may have come late) and gives finite numbers."""
    kept = [(one, one.clone()) for one in network.module.buffers()]
    inputs = pytree.tree_map_only(torch.Tensor, torch.clone, (network.inputs, network.kwargs))
    try:
        with torch.no_grad():
            found = pytree.tree_leaves(network.module(*inputs[0], **inputs[1]))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
    tensors = [one for one in found if isinstance(one, torch.Tensor)]
    return all(bool(one.isfinite().all()) and one.numel() > 0 for one in tensors)
