"""Unrolled recurrences are found, whatever the step is; a step as text; the operator that repeats it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import Phase, given, settings, strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt.ir import ops
from graphopt.ir.builder import Builder
from graphopt.ir.driver import Session
from graphopt.ir.graph import Graph, Signature
from graphopt.ir.interpret import Interpreter
from graphopt.ir.recurrence.body import BodyError, formulas, parse
from graphopt.ir.recurrence.operator import SCAN
from graphopt.passes.roll_steps import is_pointwise
from graphopt.pipeline import Pipeline
from graphopt.verify import SiteValidator
from tests.helpers import tensor

PHASES = (Phase.explicit, Phase.reuse, Phase.generate)  # each run is a second; shrinking takes many
STEP = """def step(x0, v0, w0):
    mul = aten.mul.Tensor(v0, w0)
    add = aten.add.Tensor(mul, x0)
    ge = aten.ge.Scalar(add, 1.0)
    to = aten.to.dtype(ge, x0.dtype)
    sub = aten.sub.Tensor(add, to)
    return to, sub"""


def traced(function: Callable[..., Any], *inputs: Tensor) -> Graph:
    """The graph of a function of tensors, in ATen's primitives."""
    module = make_fx(
        lambda *given: tuple(pytree.tree_leaves(function(*given))), tracing_mode="fake"
    )(*inputs)
    fakes = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    count = len(module.graph.output_node().args[0])
    names = tuple(f"x{i}" for i in range(len(inputs)))
    signature = Signature(
        pytree.tree_structure((inputs, {})), pytree.tree_structure((0,) * count),
        (None,) * len(inputs), tuple((name, 1, None) for name in names), names,
    )  # fmt: skip
    return Graph(module.graph, {}, signature, fakes[0].fake_mode)


def rolled(
    function: Callable[..., Any],
    *inputs: Tensor,
    passes: str = "canonicalize,roll-steps,canonicalize",
) -> tuple[Graph, Session]:
    """A traced function after the pass, which must compute the same in float64, bit for bit but for
    the sign of zeros."""
    graph = traced(function, *inputs)
    truth = Interpreter(graph.clone(), lifted=True).run(inputs)
    session = Session(graph, SiteValidator(graph, list(inputs)))
    Pipeline(passes).run(session)
    assert session.rolled_back == []
    found = Interpreter(graph, lifted=True).run(inputs)
    assert len(found) == len(truth)
    for a, b in zip(found, truth, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    return graph, session


def scans(graph: Graph) -> list[ops.Scan]:
    found = [Builder(graph, node).view(node) for node in graph.calls]
    return [one for one in found if isinstance(one, ops.Scan)]


def left(graph: Graph) -> list[str]:
    """Pointwise nodes outside of scans."""
    return [node.name for node in graph.calls if is_pointwise(graph, node)]


def over_time(
    step: Callable[..., Any], x: Tensor, states: Sequence[Any], *others: Tensor
) -> tuple[list[Any], Any]:
    made = []
    for one in x:
        y, *states = step(one, *states, *others)
        made.append(y)
    return made, states


# -- text -----------------------------------------------------------------------------------------


def test_text_round_trips():
    assert str(parse(STEP)) == STEP


def test_text_for_reading():
    assert formulas(parse(STEP)) == [
        "add = v0 * w0 + x0",
        "to = (add >= 1).to(x0.dtype)",
        "return to, add - to",
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import os", "expected def step"),
        ("def step(x):\n    return y", "names of values"),
        ("def step(x):\n    os.system('true')\n    return x", "expected name = operator"),
        ("def step(x):\n    y = os.system(x)\n    return y", "unknown operator os.system"),
        ("def step(x):\n    y = aten.no_such_op.default(x)\n    return y", "unknown operator"),
        ("def step(x):\n    y = aten.add.Tensor(x, z)\n    return y", "reads z before it is there"),
        (
            "def step(x):\n    y = aten.add.Tensor(x, torch.load)\n    return y",
            "torch.load is no arg",
        ),
        (
            "def step(x):\n    y = aten.add.Tensor(x, (lambda: 1)())\n    return y",
            "dotted name|is no arg",
        ),
        ("def step(x):\n    y = aten.neg.default('x')\n    return y", "is no argument"),
        ("def step(x", "expected one step"),
    ],
)
def test_text_is_not_executed(text: str, reason: str):
    with pytest.raises(BodyError, match=reason):
        parse(text)


@pytest.mark.parametrize(
    "value", [0.1, -2.5, 1, True, None, float("inf"), float("-inf"), torch.float16]
)
def test_arguments_keep_their_values(value: Any):
    text = {None: "None", torch.float16: "torch.float16"}.get(value, repr(value))
    (line,) = parse(f"def step(x):\n    y = aten.add.Tensor(x, {text})\n    return y").lines
    assert line.args[1] == value
    assert type(line.args[1]) is type(value)
    assert (
        parse(str(parse(f"def step(x):\n    y = aten.add.Tensor(x, {text})\n    return y"))).lines[
            0
        ]
        == line
    )


def test_dtypes_follow_the_operands():
    step = parse(STEP)
    for dtype in (torch.float16, torch.float32, torch.float64):
        results = step.run([torch.ones(3, dtype=dtype)] * 3)
        assert {one.dtype for one in results} == {dtype}
    literal = parse("def step(x):\n    y = aten.to.dtype(x, torch.float32)\n    return y")
    assert literal.run([torch.ones(2, dtype=torch.float16)])[0].dtype == torch.float32
    assert literal.run([torch.ones(2, dtype=torch.float64)])[0].dtype == torch.float64


# -- the operator ---------------------------------------------------------------------------------


def test_the_operator_is_the_loop():
    x, v, w = tensor(5, 3, 4), tensor(3, 4, seed=2), tensor(4, seed=3)
    y, last = SCAN(STEP, 5, [v], [x], [w])
    spikes, (state,) = over_time(lambda x, v, w: parse(STEP).run([x, v, w]), x, [v], w)
    assert torch.equal(y, torch.stack(spikes))
    assert torch.equal(last, state)


def test_the_operator_has_gradients_and_vanishes_in_traces():
    body = "def step(x, v):\n    a = aten.mul.Tensor(v, 0.5)\n    b = aten.add.Tensor(a, x)\n    return b, b"
    x, v = tensor(3, 2).requires_grad_(), tensor(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v: SCAN(body, 3, [v], [x], []), (x, v))
    graph = make_fx(lambda x, v: SCAN(body, 3, [v], [x], []))(x, v).graph
    assert not [node for node in graph.nodes if "graphopt" in str(node.target)]


@pytest.mark.parametrize(
    ("states", "xs", "reason"),
    [
        ([], [torch.ones(4, 2)], "takes 3 operands, found 1"),
        ([torch.ones(2)], [torch.ones(3, 2)], "expected 4 steps"),
    ],
)
def test_operands_that_do_not_fit(states: Any, xs: Any, reason: str):
    with pytest.raises(ValueError, match=reason):
        SCAN(STEP, 4, states, xs, [torch.ones(2)] if states else [])


# -- any step -------------------------------------------------------------------------------------

BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "+": torch.add, "-": torch.sub, "*": torch.mul, "max": torch.maximum,
    "where": lambda a, b: torch.where(a > b, a, b * 0.5),
    "spike": lambda a, b: (a >= b).to(a.dtype),
}  # fmt: skip
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh, "half": lambda a: a * 0.5, "1-": lambda a: 1 - a, "detach": Tensor.detach,
    "above": lambda a: (a > 0.25).to(a.dtype),
}  # fmt: skip


@st.composite
def steps(draw: st.DrawFn) -> tuple[int, Callable[..., Any]]:
    """A random step (x, states, w) -> (y, states), and how many states it has. Every state depends on
    itself and on what is read."""
    count = draw(st.integers(1, 3))
    names = ["x", "w", *(f"v{i}" for i in range(count))]
    program: list[tuple[str, Any, str, str]] = []
    for number in range(draw(st.integers(1, 5))):
        left, right = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        kind = draw(st.sampled_from([*BINARY, *UNARY]))
        program.append((f"t{number}", kind, left, right))
        names.append(f"t{number}")
    drives = [draw(st.sampled_from(names)) for _ in range(count)]
    signs = [draw(st.sampled_from(("+", "-", "max"))) for _ in range(count)]
    out = draw(st.sampled_from([name for name in names if name != "w"]))

    def step(x: Tensor, *rest: Tensor) -> Any:
        *states, w = rest
        env = {"x": x, "w": w, **{f"v{i}": one for i, one in enumerate(states)}}
        for name, kind, left, right in program:
            pair = env[left], env[right]
            env[name] = BINARY[kind](*pair) if kind in BINARY else UNARY[kind](pair[0])
        after = [
            torch.tanh(BINARY[sign](one * 0.75, x * (i + 1)) + env[drive])
            for i, (one, sign, drive) in enumerate(zip(states, signs, drives, strict=True))
        ]
        return (env[out] + after[0] > 0.1).to(x.dtype) * env[out], *after

    return count, step


@settings(max_examples=15, phases=PHASES)
@given(steps(), st.integers(3, 6), st.sampled_from(("zeros", "given", "number")))
def test_random_steps_are_rolled(drawn: Any, count: int, start: str):
    states, step = drawn
    x, w = tensor(count, 4, 3), tensor(3, seed=5)
    first = [tensor(4, 3, seed=7 + i) for i in range(states)]

    def run(x: Tensor, w: Tensor, *first: Tensor) -> Any:
        begin: Any = first
        if start != "given":
            begin = [torch.full_like(x[0], 0.0 if start == "zeros" else 0.5) for _ in first]
        return over_time(step, x, begin, w)

    graph, session = rolled(run, x, w, *first)
    assert scans(graph), session.refused  # of states that do not depend on each other, several
    assert all(one.steps >= count - 1 for one in scans(graph))


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("count", [3, 5])
def test_states_alike_stay_apart_in_the_last_step(factor: int, count: int):
    """Nothing follows the last step that would tell which is which."""

    def step(x: Tensor, u: Tensor, v: Tensor) -> Any:
        y = (torch.maximum(u, v) > 0.1).to(x.dtype)
        return y, torch.tanh(0.75 * u + 2 * x), torch.tanh(0.75 * v + factor * x)

    def run(x: Tensor, u: Tensor, v: Tensor) -> Any:
        return over_time(step, x, (u, v))

    graph, session = rolled(run, tensor(count, 4, 3), tensor(4, 3, seed=7), tensor(4, 3, seed=8))
    assert [one.steps for one in scans(graph)] == [count], session.refused


# -- which steps there are ------------------------------------------------------------------------


def lif(x: Tensor, v: Tensor) -> Any:
    v = v + (x - v) / 2.0
    s = (v >= 1.0).to(x.dtype)
    return s, v * (1 - s)


def test_steps_of_an_input_that_stays_the_same():
    """Direct encoding: nothing but the uses of x tells the steps."""

    def run(x: Tensor) -> Any:
        return torch.stack(over_time(lif, [x] * 5, [torch.zeros_like(x)])[0])  # type: ignore[arg-type]

    graph, _ = rolled(run, 3 * tensor(4, 6))
    (scan,) = scans(graph)
    assert (scan.steps, scan.xs, len(scan.others)) == (5, (), 1)
    assert left(graph) == []


def test_layers_between_neurons_of_a_residual_network():
    """Sums connect all neurons; the products between them cut the component."""

    def run(x: Tensor, a: Tensor, b: Tensor) -> Any:
        made, states = [], [torch.zeros(4, 6, dtype=x.dtype)] * 3
        for one in x:
            s, states[0] = lif(one, states[0])
            r, states[1] = lif(s @ a, states[1])
            s = s + r
            r, states[2] = lif(s @ b, states[2])
            made.append(s + r)
        return torch.stack(made)

    graph, _ = rolled(run, 3 * tensor(5, 4, 6), tensor(6, 6, seed=3), tensor(6, 6, seed=4))
    assert [one.steps for one in scans(graph)] == [5, 5, 5]
    assert left(graph) == []


def test_what_hands_nothing_on_is_no_loop():
    def apart(x: Tensor) -> Tensor:
        return torch.stack([torch.relu(one) * 2 for one in x])

    def total(x: Tensor) -> Tensor:
        return x[0] + x[1] + x[2] + x[3]

    def onto(x: Tensor, y: Tensor) -> Tensor:
        return y + x[0] + x[1] + x[2] + x[3]

    def deep(x: Tensor, w: Tensor) -> Tensor:
        for _ in range(4):
            x = torch.relu(x + torch.relu(x @ w))
        return x

    for function, inputs in (
        (apart, [tensor(4, 6)]),
        (total, [tensor(4, 6)]),
        (onto, [tensor(4, 6), tensor(6)]),
        (deep, [tensor(4, 6), tensor(6, 6)]),
    ):
        graph, session = rolled(function, *inputs)
        assert scans(graph) == []
        assert session.refused == {}
