"""What the steps of residual streams are, where they end, and which of them repeat."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.ir.blocks import Stream, find_streams
from graphopt.ir.capture import capture
from graphopt.ir.dependence import Dependence
from tests.helpers import Net, prepare, tensor

X = (2, 5, 8)


def streams(body: Callable[..., Any], *shapes: tuple[int, ...], **more: nn.Module) -> list[Stream]:
    """Of a body over the maps a .. h and the norms n .. q."""
    maps = {name: nn.Linear(8, 8) for name in "abcdefgh"}
    norms = {name: nn.LayerNorm(8) for name in "nopq"}
    model = prepare(Net(body, **{**maps, **norms, **more}))
    inputs = tuple(tensor(*shape) for shape in shapes or (X,))
    return find_streams(capture(copy.deepcopy(model), inputs).graph)


def ends(found: list[Stream]) -> list[list[str]]:
    """The op that every step ends in."""
    return [[str(s.end.target).split(".")[1] for s in one.steps] for one in found]


def attend(x: Tensor) -> Tensor:
    return x.softmax(-1) @ x.mT @ x


def test_pre_norm() -> None:
    """The norm at the end is none of the last step, even where several read it."""

    def body(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + m.a(attend(m.n(x)))
        x = x + m.b(m.o(x).relu())
        x = x + m.c(attend(m.p(x)))
        x = m.d(m.q(x).relu()) + x
        x = m.n(x)
        return x, m.h(x)

    (found,) = streams(body)
    assert ends([found]) == [["add"] * 4]
    assert found.period == 2
    assert [len(one.steps) for one in found.blocks()] == [2, 2]
    assert [len(one.steps) for one in found.blocks(1)] == [1] * 4
    assert found.steps[0].start.op == "placeholder"
    assert [one.start for one in found.steps[1:]] == [one.end for one in found.steps[:-1]]
    assert found.blocks()[0].parameters == {
        f"{name}.{kind}" for name in "anbo" for kind in ("weight", "bias")
    }


def test_norms_between_two_stacks_belong_to_neither() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        for one in (m.a, m.b):
            x = x + one(m.n(x).relu())
        x = m.o(x)
        for one in (m.c, m.d, m.e):
            x = x + one(m.p(x).relu())
        return m.h(m.q(x))

    found = streams(body)
    assert ends(found) == [["add"] * 2, ["add"] * 3]


@pytest.mark.parametrize("last", [True, False])
def test_post_norm(last: bool) -> None:
    """Norms end their steps, the last one too, whether or not several read it."""

    def body(m: Any, x: Tensor) -> Any:
        x = m.n(x + m.a(attend(x)))
        x = m.o(m.b(x).relu() + x)
        x = m.p(x + m.c(attend(x)))
        x = m.q(m.d(x).relu() + x)
        return (x, m.h(x)) if last else m.h(x)

    (found,) = streams(body)
    assert ends([found]) == [["layer_norm"] * 4]
    assert found.period == 2


def test_tails_may_alternate() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        for one, norm, other in ((m.a, m.n, m.b), (m.c, m.o, m.d)):
            x = norm(x + one(attend(x)))
            x = x + other(x).relu()
        return m.h(m.p(x))

    (found,) = streams(body)
    assert ends([found]) == [["layer_norm", "add", "layer_norm", "add"]]


def test_two_branches_are_one_step() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = x + m.a(m.n(x)) + m.b(m.o(x).relu())
        x = m.c(m.p(x)) + m.d(m.q(x).relu()) + x
        return m.h(x)

    found = streams(body)
    assert sum(len(one.steps) for one in found) == 2
    assert {name for one in found for s in one.steps for name in s.parameters} >= {
        f"{name}.weight" for name in "abcd"
    }
    assert not any(s.reason for one in found for s in one.steps)


def test_a_stream_goes_on_through_reshapes() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = x + m.a(x).relu()
        x = x.unflatten(1, (1, 5))
        x = x + m.b(x).relu()
        x = x.flatten(1, 2)
        return m.h(x + m.c(x).relu())

    (found,) = streams(body)
    assert len(found.steps) == 3


def test_other_operands_do_not_matter() -> None:
    """Three steps make a decoder layer: itself, the other sequence, an MLP."""

    def body(m: Any, x: Tensor, y: Tensor) -> Tensor:
        y = m.g(y)
        for one, two, three in ((m.a, m.b, m.c), (m.d, m.e, m.f)):
            x = x + one(attend(m.n(x)))
            x = x + two(m.o(x).softmax(-1) @ y.mT @ y)
            x = x + F.dropout(three(m.p(x).relu()), training=False)
        return m.h(x)

    (found,) = streams(body, X, X)
    assert found.period == 3
    assert not any(one.reason for one in found.steps)


def test_without_a_repetition_every_step_is_a_block() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = x + m.a(x).relu()
        x = x + m.b(x).sigmoid()
        return m.h(x + m.c(x).tanh())

    (found,) = streams(body)
    assert found.period == 1


def test_streams_in_branches() -> None:
    """What holds one step may go as a whole, what holds two goes step by step."""

    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        y = y + m.b(y).relu()
        x = x + m.c(y)
        z = m.d(x).relu()
        z = z + m.e(z).relu()
        z = z + m.f(z).relu()
        return m.h(x + m.g(z))

    found = streams(body)
    said = {one.parameters: one.reason for s in found for one in s.steps}
    said = {"".join(sorted({name[0] for name in names})): reason for names, reason in said.items()}
    assert said == {
        "b": "", "abc": "", "e": "", "f": "",
        "defg": "it holds 2 other steps, which go one by one",
    }  # fmt: skip


@pytest.mark.parametrize("straight", [True, False])
def test_steps_in_branches_end_before_the_sum_around_them(straight: bool) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        for one, two, three in ((m.a, m.b, m.e), (m.c, m.d, m.f)):
            y = x if straight else m.g(x)
            y = y + one(y).tanh()
            x = (x if straight else 0.5 * x) + two(y)
            x = x + three(x).relu()
        return m.h(x)

    found = [one for s in streams(body) for one in s.steps]
    inner = [
        one for one in found if one.parameters in ({"a.weight", "a.bias"}, {"c.weight", "c.bias"})
    ]
    assert len(inner) == 2
    assert all(one.end is one.sum for one in inner)


def test_scaled_shortcuts_stay() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = x + m.a(x).relu()
        x = 0.5 * x + m.b(x).relu()
        x = x + m.c(x).relu()
        return m.h(x + m.d(x).relu())

    found = streams(body)
    assert [[one.reason for one in s.steps] for s in found] == [
        [""], ["its shortcut is not the identity"], ["", ""],
    ]  # fmt: skip


def test_activations_and_scores_are_no_steps() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y = 0.5 * y * (1 + torch.tanh(y + 0.04 * y**3))
        z = m.b(y)
        return m.h(z * z.cos() + z.flip(-1) * z.sin())

    assert streams(body) == []


def test_dependence() -> None:
    """On values, not on constants; a size depends on what its value is computed from."""

    def body(m: Any, x: Tensor, y: Tensor) -> Tensor:
        z = m.a(x) * m.b.weight.sum()
        return m.c(z + y).relu().reshape(x.shape[0], -1)

    model = prepare(Net(body, a=nn.Linear(8, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 8)))
    graph = capture(model, (tensor(*X), tensor(*X))).graph
    found = Dependence(graph)
    x, y = graph.inputs
    by = {str(node.target).split(".")[1]: node for node in graph.calls if "." in str(node.target)}
    mul, add, relu, total = by["mul"], by["add"], by["relu"], by["sum"]
    assert found.on(mul, x) and not found.on(mul, y) and found.on(relu, y) and found.on(x, x)
    assert found.meet(mul, relu) is mul and found.meet(relu, y) is y and found.meet(mul, y) is None
    assert not found.varies(total) and not found.on(mul, total) and found.meet(total, mul) is None
    assert found.between(mul, relu)[0] is add and found.between(mul, relu)[-1] is relu
    assert found.between(y, mul) == ()
    sizes = [node for node in graph.calls if not isinstance(node.meta["val"], Tensor)]
    assert sizes and not any(found.on(one, x) for one in sizes)
    with graph.fx.inserting_after(relu):
        size = graph.fx.call_function(torch.ops.aten.sym_size.int, (relu, 0))
    size.meta["val"] = 2
    found = Dependence(graph)
    assert found.on(size, add) and not found.on(size, relu)
