"""One step at a time gives, step by step, what the whole gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.streaming import StreamingError, streaming
from tests.helpers import EXACT, Net, assert_equal, prepare, tensor
from tests.ir.test_recurrence import lif, over_time
from tests.passes.test_roll_steps import PASSES

BATCHED = PASSES.replace("roll-steps", "batch-siblings,roll-steps")
STEPS = 4


class Frames(nn.Module):
    """Convolutions and neurons, a residual sum between them. `read` says what is made of the outputs."""

    def __init__(self, read: str = "stack", direct: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.read, self.direct = read, direct

    def forward(self, x: Tensor) -> Any:
        u: Any = None
        v: Any = None
        made = []
        for t in range(STEPS):
            c = self.norm(self.a(x if self.direct else x[:, t]))
            u = torch.zeros_like(c) if u is None else u
            s, u = lif(c, u)
            d = self.b(s)
            v = torch.zeros_like(d) if v is None else v
            r, v = lif(d, v)
            made.append(self.head((s + r).mean((2, 3))))
        if self.read == "sum":
            return sum(made[1:], made[0]) / STEPS
        out = torch.stack(made, 1)
        return {"mean": lambda: out.mean(1), "stack": lambda: out, "state": lambda: (out, v),
                "difference": lambda: out[:, 1:] - out[:, :-1],
                "scored": lambda: torch.softmax(out.mean(1), -1)}[self.read]()  # fmt: skip


def frames(rows: int = 3, seed: int = 1) -> Tensor:
    return 3 * tensor(rows, STEPS, 2, 5, 5, seed=seed)


def optimized(model: nn.Module, x: Tensor, passes: str = BATCHED) -> Any:
    fast = graphopt.optimize(prepare(model), (x,), passes=passes)
    assert fast.report.rolled_back == []
    return fast


@pytest.mark.parametrize("passes", [PASSES, BATCHED], ids=["step by step", "batched"])
def test_every_step_equals_that_of_the_whole(passes: str):
    model = Frames("state")
    fast = optimized(model, frames(), passes)
    live = streaming(fast)
    for rows in (3, 1, 7):
        x = frames(rows, seed=rows)
        spikes, last = model(x)
        live.reset()
        assert live.states is None
        for t in range(STEPS):
            y, v = live(x[:, t])
            assert_equal(y, spikes[:, t], limit=EXACT)
        assert_equal(v, last, limit=EXACT)
        assert len(live.states) == 2


def test_the_same_input_at_every_step():
    model, x = Frames(direct=True), frames()[:, 0]
    live = streaming(optimized(model, x))
    truth = model(x)
    for t in range(STEPS):
        assert_equal(live(x), truth[:, t], limit=EXACT)


@pytest.mark.parametrize("read", ["mean", "sum"])
def test_a_mean_over_time_is_left_off(read: str):
    model, x = Frames(read), frames()
    live = streaming(optimized(model, x))
    steps = [live(x[:, t]) for t in range(STEPS)]
    assert_equal(torch.stack(steps).mean(0), model(x), limit=EXACT)


class Encoded(nn.Module):
    """Frames shown at every step, or `[N, T, ..]`, and steps that are put into the batch in ways of
    their own."""

    def __init__(self, shown: str, read: str) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 9, 3)
        self.shown, self.read = shown, read

    def forward(self, x: Tensor) -> Tensor:
        x = {"repeat": lambda: x.repeat(STEPS, 1, 1, 1, 1),
             "expand": lambda: x.unsqueeze(0).expand(STEPS, -1, -1, -1, -1),
             "inside": lambda: x.unsqueeze(1).repeat(1, STEPS, 1, 1, 1).transpose(0, 1),
             "stack": lambda: torch.stack([x] * STEPS),
             "frames": lambda: x.transpose(0, 1)}[self.shown]()  # fmt: skip
        c = self.norm(self.conv(x.flatten(0, 1)))
        c = c.view(STEPS, x.shape[1], *c.shape[1:])
        v, made = torch.zeros_like(c[0]), []
        for one in c:
            s, v = lif(one, v)
            made.append(s)
        s = torch.stack(made)
        if self.read == "rows":  # time and rows, and what is left, in one go
            return self.head(s.reshape(-1, 4 * 9)).unflatten(0, (STEPS, -1))
        if self.read == "apart":
            return s.flatten(0, 1).view(STEPS, -1, 2, 2 * 9).transpose(0, 1)
        return self.head(s.flatten(2))


@pytest.mark.parametrize(("shown", "read"), [
    ("repeat", "steps"), ("expand", "rows"), ("inside", "apart"), ("stack", "rows"),
    ("frames", "steps"), ("frames", "rows"), ("frames", "apart"),
])  # fmt: skip
def test_images_that_are_repeated_and_steps_that_are_rows(shown: str, read: str):
    model = prepare(Encoded(shown, read))
    x = 3 * tensor(5, STEPS, 2, 3, 3)
    given = x if shown == "frames" else x[:, 0]
    live = streaming(optimized(model, given))
    truth = model(given)
    for t in range(STEPS):
        now = x[:, t] if shown == "frames" else x[:, 0]
        expected = truth[:, t] if read == "apart" else truth[t]
        assert_equal(live(now), expected, limit=EXACT)
    assert 0 < truth.abs().max()


def test_another_input_for_every_step_of_what_is_repeated():
    """What the module repeats is one step: the steps may read different ones when they come alone."""
    model, x = prepare(Encoded("repeat", "steps")), 3 * tensor(5, STEPS, 2, 3, 3)
    live = streaming(optimized(model, x[:, 0]))
    frames = Encoded("frames", "steps").double().eval()
    frames.load_state_dict(model.state_dict())
    truth = frames(x)
    for t in range(STEPS):
        assert_equal(live(x[:, t]), truth[t], limit=EXACT)


def shared(net: Any, x: Tensor) -> Tensor:
    """A factor of every step, which a layer after it reads too: it stays outside of the loop."""
    c = net.conv(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (STEPS, -1))
    c = c * net.factor.view(-1, 1, 1, 1, 1)
    s = torch.stack(over_time(lif, c.unbind(), [torch.zeros_like(c[0])])[0])  # type: ignore[arg-type]
    return (c + s).transpose(0, 1)


def test_a_factor_of_every_step_outside_of_the_loop():
    model = prepare(Net(shared, conv=nn.Conv2d(2, 4, 3)))
    model.factor = nn.Parameter(torch.linspace(0.5, 2.0, STEPS, dtype=torch.float64))
    x = frames()
    live = streaming(optimized(model, x))
    truth = model(x)
    for t in range(STEPS):
        assert_equal(live(x[:, t]), truth[:, t], limit=EXACT)
    with pytest.raises(StreamingError, match="at most 4 steps"):
        live(x[:, 0])


@torch.no_grad()
def test_states_belong_to_the_module():
    model, x = Frames(), frames()
    live = streaming(optimized(model, x))
    assert list(live.state_dict()) == [name for name in live.state_dict() if "state_" not in name]
    live(x[:, 0])
    other = copy.deepcopy(live)
    assert_equal(other(x[:, 1]), live(x[:, 1]), limit=0)
    live.reset()
    assert_equal(live(x[:, 0]), model(x)[:, 0], limit=EXACT)


def test_moved_to_another_dtype():
    live = streaming(optimized(Frames(), frames())).float()
    assert live(frames()[:, 0].float()).dtype == torch.float32
    assert live.states[0].dtype == torch.float32


def test_it_trains_the_parameters_of_the_model():
    fast = optimized(Frames(), frames())
    own = {id(one) for one in fast.parameters()}
    assert {id(one) for one in streaming(fast).parameters()} <= own


@pytest.mark.parametrize(
    ("read", "reason"),
    [("difference", "may mix the steps"), ("scored", "reads a sum over the steps")],
)
def test_what_mixes_steps_is_refused_with_the_operation(read: str, reason: str):
    fast = optimized(Frames(read), frames())
    with pytest.raises(StreamingError, match=reason):
        streaming(fast)


def test_without_a_loop_there_is_nothing_to_stream():
    fast = graphopt.optimize(nn.Linear(3, 2).eval(), (torch.ones(2, 3),))
    with pytest.raises(StreamingError, match="no rolled loop"):
        streaming(fast)
