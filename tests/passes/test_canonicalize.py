"""The specification of `canonicalize`: identities, duplicates and dead code, in every spelling.

It computes the same numbers bit for bit (sums of numbers and signs of zero aside), and never changes
a dtype, a shape, or whether an output is memory of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from tests.helpers import Net, assert_equal, calls, leaves, output_of, snapshot, tensor

SHAPE = (2, 3, 4, 5)


class Model(nn.Module):
    """A function with a buffer of ones, a parameter of ones and a random weight at hand."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("ones", torch.ones(5))
        self.weight = nn.Parameter(torch.ones(5))
        self.matrix = nn.Parameter(tensor(5, 5, dtype=torch.float32))
        self.dropout = nn.Dropout(0.5)

    def forward(self, *args: Tensor) -> object:
        return self.function(self, *args)


def canonical(
    function: Callable[..., object], *inputs: Tensor, training: bool = False, same: bool = True
) -> graphopt.OptimizedModule:
    """`function(model, *inputs)` canonicalized, and checked to compute the same bits."""
    inputs = inputs or (tensor(*SHAPE, dtype=torch.float32),)
    model = Model(function).train(training)
    unchanged = snapshot(model)
    fast = graphopt.optimize(model, inputs, passes="canonicalize")
    unchanged()
    assert fast.report.rolled_back == []
    if not training:
        found, truth = (leaves(output_of(one, inputs)) for one in (fast, model))
        for a, b in zip(found, truth, strict=True):
            assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)
            assert_equal(a, b, 0 if same else 1e-6)
            assert not same or torch.equal(a, b)
    return fast


def bend(y: Tensor) -> Tensor:
    """What reads the value under test, so that it is not an output."""
    return torch.sin(y)


# -- identities ---------------------------------------------------------------------------------

IDENTITIES: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "x * 1": lambda m, x: x * 1,
    "1 * x": lambda m, x: 1 * x,
    "torch.mul(x, 1)": lambda m, x: torch.mul(x, 1),
    "torch.mul(input=x, other=1)": lambda m, x: torch.mul(input=x, other=1),
    "x.mul(1)": lambda m, x: x.mul(1),
    "torch.multiply(x, 1)": lambda m, x: torch.multiply(x, 1),
    "x * 1.0": lambda m, x: x * 1.0,
    "x.mul_(1)": lambda m, x: x.clone().mul_(1),
    "x *= 1": lambda m, x: x.clone().__imul__(1),
    "x * True": lambda m, x: x * True,
    "x * ones": lambda m, x: x * torch.ones(5),
    "ones * x": lambda m, x: torch.ones(3, 1, 5) * x,
    "x * ones_like(x)": lambda m, x: x * torch.ones_like(x),
    "x * full": lambda m, x: x * torch.full((4, 1), 1.0),
    "x * tensor(1.)": lambda m, x: x * torch.tensor(1.0),
    "x * tensor(1)": lambda m, x: x * torch.tensor(1),
    "x * literal ones": lambda m, x: x * torch.tensor([1.0, 1, 1, 1, 1]),
    "x * ones[None]": lambda m, x: x * torch.ones(5)[None, None],
    "x / 1": lambda m, x: x / 1,
    "torch.div(x, 1)": lambda m, x: torch.div(x, 1),
    "x.true_divide(1)": lambda m, x: x.true_divide(1),
    "x / ones": lambda m, x: x / torch.ones(5),
    "x + 0": lambda m, x: x + 0,
    "0 + x": lambda m, x: 0 + x,
    "x.add(0.0)": lambda m, x: x.add(0.0),
    "torch.add(x, 0)": lambda m, x: torch.add(x, 0),
    "torch.add(x, 5, alpha=0)": lambda m, x: torch.add(x, 5, alpha=0),
    "x + zeros": lambda m, x: x + torch.zeros(5),
    "x + zeros_like(x)": lambda m, x: x + torch.zeros_like(x),
    "sum([x])": lambda m, x: sum([x]),
    "x - 0": lambda m, x: x - 0,
    "x.sub(0)": lambda m, x: x.sub(0),
    "x - zeros": lambda m, x: x - torch.zeros(1),
    "x ** 1": lambda m, x: x**1,
    "x.pow(1.0)": lambda m, x: x.pow(1.0),
    "-(-x)": lambda m, x: -(-x),
    "x.neg().negative()": lambda m, x: x.neg().negative(),
    "+x": lambda m, x: +x,
    "dropout module": lambda m, x: m.dropout(x),
    "F.dropout": lambda m, x: F.dropout(x, 0.3, training=False),
    "F.dropout2d": lambda m, x: F.dropout2d(x, 0.3, training=False),
    "F.alpha_dropout": lambda m, x: F.alpha_dropout(x, 0.3, training=False),
    "nn.Identity": lambda m, x: nn.Identity()(x),
    "x.float()": lambda m, x: x.float(),
    "x.to(x.dtype)": lambda m, x: x.to(x.dtype),
    "x.to(x.device)": lambda m, x: x.to(x.device),
    "x.type_as(x)": lambda m, x: x.type_as(x),
    "x.double().float()": lambda m, x: x.double().float(),
    "x.contiguous()": lambda m, x: x.contiguous(),
    "x.clone()": lambda m, x: x.clone(),
    "x.view(x.shape)": lambda m, x: x.view(x.shape),
    "x.reshape(...)": lambda m, x: x.reshape(-1, 3, 4, 5),
    "x.flatten(1).view": lambda m, x: x.flatten(1).view(-1, 3, 4, 5),
    "x.flatten(2, 2)": lambda m, x: x.flatten(2, 2),
    "x.unsqueeze(1).squeeze(1)": lambda m, x: x.unsqueeze(1).squeeze(1),
    "x[None][0]": lambda m, x: x[None].squeeze(0),
    "x[:]": lambda m, x: x[:],
    "x[..., 0:5]": lambda m, x: x[..., 0:5],
    "x.narrow": lambda m, x: x.narrow(1, 0, 3),
    "x.expand_as(x)": lambda m, x: x.expand_as(x),
    "x.expand(-1, ...)": lambda m, x: x.expand(-1, -1, -1, 5),
    "x.permute(identity)": lambda m, x: x.permute(0, 1, 2, 3),
    "permute pair": lambda m, x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
    "transpose pair": lambda m, x: x.transpose(1, 3).transpose(3, 1),
    "transpose and mT": lambda m, x: x.transpose(-2, -1).mT,
    "movedim pair": lambda m, x: x.movedim(1, -1).movedim(-1, 1),
    "permute triple": lambda m, x: x.permute(1, 2, 3, 0).permute(1, 2, 3, 0).permute(2, 3, 0, 1),
    "cat([x])": lambda m, x: torch.cat([x], 1),
    "F.pad by nothing": lambda m, x: F.pad(x, (0, 0)),
    "x.repeat(1, ...)": lambda m, x: x.repeat(1, 1, 1, 1),
}


@pytest.mark.parametrize("spelling", IDENTITIES)
def test_identities_go(spelling: str) -> None:
    function = IDENTITIES[spelling]
    same = "0" not in spelling and "zeros" not in spelling  # x + 0 may turn -0 into 0
    fast = canonical(lambda m, x: bend(function(m, torch.cos(x))), same=same)
    assert calls(fast) == ["cos", "sin"]


def test_identities_of_inputs_go() -> None:
    assert calls(canonical(lambda m, x: bend(x * 1) + bend(m.dropout(x)))) == ["sin", "add"]


def test_identities_in_a_row_go() -> None:
    def function(m: Model, x: Tensor) -> Tensor:
        return bend(-(-(m.dropout(1 * x.permute(0, 2, 3, 1)) + 0).permute(0, 3, 1, 2) / 1))

    assert calls(canonical(function)) == ["sin"]


def test_repeated_relu_is_one() -> None:
    assert calls(canonical(lambda m, x: F.relu(F.relu(x).relu()))) == ["relu"]


def test_permutes_merge_into_one() -> None:
    assert calls(canonical(lambda m, x: bend(x.transpose(1, 2).transpose(2, 3)))) == [
        "permute",
        "sin",
    ]


def test_views_merge_into_one() -> None:
    fast = canonical(lambda m, x: bend(x.flatten(2).unflatten(2, (5, 4)).flatten(1)))
    assert [one for one in calls(fast) if one != "sin"] in (["reshape"], ["flatten"], ["view"])


def test_numbers_are_computed_once() -> None:
    """x * 2 * 3 = x * 6 and x + 2 + 3 = x + 5."""
    assert calls(canonical(lambda m, x: bend(x * 2.0 * 3.0), same=False)) == ["mul", "sin"]
    assert calls(canonical(lambda m, x: bend(x + 2.0 + 3.0), same=False)) == ["add", "sin"]


# -- what only looks like an identity -----------------------------------------------------------

INTEGERS = torch.arange(2 * 3 * 4 * 5).reshape(SHAPE)
NOT_IDENTITIES: dict[str, tuple[Callable[[Model, Tensor], Tensor], Tensor]] = {
    "int * 1.0 is float": (lambda m, x: x * 1.0, INTEGERS),
    "1.0 * int is float": (lambda m, x: 1.0 * x, INTEGERS),
    "int / 1 is float": (lambda m, x: x / 1, INTEGERS),
    "int + 0.0 is float": (lambda m, x: x + 0.0, INTEGERS),
    "int - 0.0 is float": (lambda m, x: x - 0.0, INTEGERS),
    "int ** 1.0 is float": (lambda m, x: x**1.0, INTEGERS),
    "int * ones is float": (lambda m, x: x * torch.ones(5), INTEGERS),
    "bool * 1 is int": (lambda m, x: x * 1, INTEGERS > 5),
    "bool + 0 is int": (lambda m, x: x + 0, INTEGERS > 5),
    "half * ones is float": (lambda m, x: x * torch.ones(5), tensor(*SHAPE).half()),
    "half * float64 ones": (lambda m, x: x * torch.ones(5).double(), tensor(*SHAPE).half()),
    "1 * x grows": (lambda m, x: x * torch.ones(7, 1, 1, 1, 1), tensor(*SHAPE)),
    "x + zeros grows": (lambda m, x: x + torch.zeros(7, 1, 1, 1, 1), tensor(*SHAPE)),
    "x.half().float() rounds": (lambda m, x: x.half().float(), tensor(*SHAPE).float()),
    "x.int().float() truncates": (lambda m, x: x.int().float(), tensor(*SHAPE).float()),
    "half of bfloat16": (lambda m, x: x.half().bfloat16(), tensor(*SHAPE).bfloat16()),
    "1 - x": (lambda m, x: 1 - x, tensor(*SHAPE)),
    "0 - x": (lambda m, x: 0 - x, tensor(*SHAPE)),
    "1 / x": (lambda m, x: 1 / x, tensor(*SHAPE)),
    "1 ** x": (lambda m, x: 1**x, tensor(*SHAPE)),
    "x // 1 floors": (lambda m, x: x // 1, tensor(*SHAPE)),
    "rounding division": (lambda m, x: torch.div(x, 1, rounding_mode="floor"), tensor(*SHAPE)),
    "x % 1": (lambda m, x: x % 1, tensor(*SHAPE)),
    "torch.sub(x, 1, alpha=0) of int": (lambda m, x: torch.sub(x, 1, alpha=0) + 1, INTEGERS),
    "torch.add(x, x, alpha=0)": (lambda m, x: torch.add(x, x, alpha=2), tensor(*SHAPE)),
    "another permute": (lambda m, x: x.permute(0, 2, 3, 1).permute(0, 2, 3, 1), tensor(*SHAPE)),
    "square transpose": (lambda m, x: x.transpose(2, 3), tensor(2, 3, 4, 4)),
    "square permute pair": (lambda m, x: x.permute(0, 2, 3, 1).mT, tensor(2, 3, 3, 3)),
    "x[::-1] by flip": (lambda m, x: x.flip(1), tensor(*SHAPE)),
    "x[1:]": (lambda m, x: x[:, 1:], tensor(*SHAPE)),
    "every second": (lambda m, x: x[:, ::2], tensor(*SHAPE)),
    "last row": (lambda m, x: x[:, -1:], tensor(*SHAPE)),
    "padding": (lambda m, x: F.pad(x, (1, -1)), tensor(*SHAPE)),
    "reshape": (lambda m, x: x.reshape(-1, 4, 3, 5), tensor(*SHAPE)),
    "roll": (lambda m, x: x.roll(1, 1), tensor(*SHAPE)),
    "cat([x, x])": (lambda m, x: torch.cat([x, x], 1), tensor(*SHAPE)),
    "relu(-relu(x))": (lambda m, x: F.relu(-F.relu(x)), tensor(*SHAPE)),
    "-x": (lambda m, x: -x, tensor(*SHAPE)),
    "ones from a buffer": (lambda m, x: x * m.ones, tensor(*SHAPE)),
    "ones from a parameter": (lambda m, x: x * m.weight, tensor(*SHAPE)),
    "x ** 1 of a parameter": (lambda m, x: x * m.matrix[0] ** 1, tensor(*SHAPE)),
}


@pytest.mark.parametrize("name", NOT_IDENTITIES)
def test_what_is_no_identity_keeps_its_meaning(name: str) -> None:
    """dtype, shape and bits stay; `canonical` compares them."""
    function, x = NOT_IDENTITIES[name]
    fast = canonical(lambda m, x: (function(m, x), bend(function(m, x).double())), x)
    assert len(calls(fast)) >= 2


@pytest.mark.parametrize("where", ["ones", "weight"])
def test_stored_ones_are_not_the_number_one(where: str) -> None:
    """A buffer or parameter may change after optimization: it is multiplied with still."""
    model = Model(lambda m, x: x * getattr(m, where))
    x = tensor(*SHAPE, dtype=torch.float32)
    fast = graphopt.optimize(model.eval(), (x,), passes="canonicalize")
    state = fast.state_dict()
    state[where] = torch.full((5,), 3.0)
    fast.load_state_dict(state)
    assert_equal(output_of(fast, (x,)), 3 * x, 0)


def test_training_dropout_stays() -> None:
    assert "dropout" in calls(canonical(lambda m, x: m.dropout(x), training=True))


def test_special_values_survive() -> None:
    """x * 1 is x for inf and nan as well; x * 0 is not 0."""
    x = torch.tensor([float("inf"), float("nan"), -0.0, 0.0, 1e-45])
    for function in (
        lambda m, x: x * 1,
        lambda m, x: x * 0,
        lambda m, x: x - x,
        lambda m, x: x / x,
    ):
        model = Model(lambda m, x, f=function: f(m, x) * torch.ones(5))
        fast = graphopt.optimize(model.eval(), (x,), passes="canonicalize")
        found, truth = output_of(fast, (x,)), output_of(model, (x,))
        torch.testing.assert_close(found, truth, rtol=0, atol=0, equal_nan=True)


# -- duplicates and dead code -------------------------------------------------------------------


def test_equal_calls_are_made_once() -> None:
    fast = canonical(lambda m, x: torch.sin(x) * torch.cos(x) + torch.cos(torch.sin(x)))
    assert sorted(calls(fast)) == ["add", "cos", "cos", "mul", "sin"]


def test_equal_calls_in_other_spellings_are_made_once() -> None:
    fast = canonical(lambda m, x: F.softmax(x, 1) + F.softmax(input=x, dim=1) - x.softmax(1))
    assert calls(fast).count("softmax") == 1
    fast = canonical(lambda m, x: F.linear(x, m.matrix).sin() + F.linear(x, weight=m.matrix).cos())
    assert calls(fast).count("linear") == 1


def test_chains_of_equal_calls_are_made_once() -> None:
    def tower(x: Tensor) -> Tensor:
        return torch.tanh(torch.exp(torch.sin(x)))

    fast = canonical(lambda m, x: tower(x) + tower(x) * tower(x))
    assert sorted(calls(fast)) == ["add", "exp", "mul", "sin", "tanh"]


def test_calls_with_other_arguments_are_other_calls() -> None:
    """1, 1.0 and True are equal in Python but not as arguments."""
    x = INTEGERS
    fast = canonical(lambda m, x: (x + 2, x + 2.0, x.sum(1), x.sum(2), (x * 3).sum((1, 2))), x)
    assert calls(fast).count("add") == 2
    assert calls(fast).count("sum") == 3


def test_random_calls_are_not_duplicates() -> None:
    """Two dropouts draw twice."""
    fast = canonical(lambda m, x: F.dropout(x, 0.5) - F.dropout(x, 0.5), training=True)
    assert calls(fast).count("dropout") == 2
    assert output_of(fast, (torch.ones(SHAPE),)).abs().max() > 0
    fast = canonical(lambda m, x: torch.rand_like(x) - torch.rand_like(x), training=True)
    assert output_of(fast, (torch.ones(SHAPE),)).abs().max() > 0


def test_calls_around_a_write_are_not_duplicates() -> None:
    """The buffer changes between two equal reads."""

    def function(m: Model, x: Tensor) -> Tensor:
        before = (m.ones * 2).sum()
        m.ones.add_(1)
        return before * x + (m.ones * 2).sum()

    model = Model(function).eval()
    x = tensor(*SHAPE, dtype=torch.float32)
    fast = graphopt.optimize(model, (x,), passes="canonicalize")
    for _ in range(3):
        with torch.no_grad():
            assert_equal(fast(x), model(x), 0)
    assert torch.equal(fast.state_dict()["ones"], model.ones)


def test_dead_code_goes() -> None:
    def function(m: Model, x: Tensor) -> Tensor:
        torch.linalg.inv(m.matrix) @ torch.exp(x.sum((0, 1, 2)))
        return bend(x)

    assert calls(canonical(function)) == ["sin"]


# -- outputs ------------------------------------------------------------------------------------


def memory(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def test_a_copy_that_is_returned_stays_a_copy() -> None:
    """The caller may write to the output; the input must not change."""
    x = tensor(*SHAPE, dtype=torch.float32)
    fast = canonical(lambda m, x: x.clone(), x)
    assert calls(fast) == ["clone"]
    assert memory(fast(x)) != memory(x)
    first, second = canonical(lambda m, x: ((y := bend(x)), y.clone()), x)(x)
    assert memory(first) != memory(second)


@pytest.mark.parametrize(
    "function",
    [lambda m, x: x * 1, lambda m, x: x + 0, lambda m, x: -(-x), lambda m, x: x.double().float()],
    ids=["x * 1", "x + 0", "-(-x)", "casts"],
)
def test_a_computed_output_is_not_the_input(function: Callable[[Model, Tensor], Tensor]) -> None:
    """`x * 1` is fresh memory: writing to the result must not change the caller's x."""
    x = tensor(*SHAPE, dtype=torch.float32)
    fast = canonical(function, x)
    assert memory(output_of(fast, (x,))) != memory(x)


def test_two_equal_outputs_are_two_tensors() -> None:
    x = tensor(*SHAPE, dtype=torch.float32)
    first, second = output_of(canonical(lambda m, x: (torch.sin(x), torch.sin(x)), x), (x,))
    assert memory(first) != memory(second)


def test_canonical_is_canonical() -> None:
    """A second run changes nothing."""
    model = Model(lambda m, x: bend(-(-x)) + bend(x * 1) * m.dropout(x).permute(0, 2, 3, 1).sum())
    x = tensor(*SHAPE, dtype=torch.float32)
    once = graphopt.optimize(model.eval(), (x,), passes="canonicalize")
    twice = graphopt.optimize(model, (x,), passes="canonicalize,canonicalize")
    again = graphopt.optimize(once, (x,), passes="canonicalize")
    assert calls(once) == calls(twice) == calls(again)
    assert again.report.applied == []


@pytest.mark.parametrize(
    "body",
    [
        lambda net, x: x[:3] * 2,
        lambda net, x: x.reshape(-1).reshape(x.shape[0], 4) + torch.ones(3, 1)[: x.shape[0]].sum(),
        lambda net, x: x.flatten().unflatten(0, (-1, 2)).reshape(-1, 4),
        lambda net, x: (x * 1)[:3] + 0,
    ],
    ids=["slice", "reshape", "twice", "neutral"],
)
def test_a_dynamic_size_is_no_size_of_the_example(body):
    """Three rows in the example are not always three."""
    model = Net(body)
    fast = graphopt.optimize(model, (tensor(3, 4),))
    for rows in (3, 5, 4):
        x = tensor(rows, 4)
        assert_equal(fast(x), model(x))
