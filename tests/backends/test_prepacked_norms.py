"""The specification of norms in the backend `prepacked`: one multiply-add, and one tensor for
concatenations that grow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

import graphopt
from graphopt.backends.prepacked import missing
from tests.helpers import randomize_norms, relative_error

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
IMAGE = (2, 3, 6, 5)
LIMIT = 1e-5


class Dense(nn.Module):
    """Layers that read, normalized, all that was computed before; `body` may change the list."""

    def __init__(self, layers: int = 3, order: str = "after", **options: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 * (i + 1), **options) for i in range(layers))
        self.convs = nn.ModuleList(nn.Conv2d(4 * (i + 1), 4, 3, padding=1) for i in range(layers))
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = [self.first(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            new = conv(F.relu(norm(torch.cat(found, 1))))
            found = [*found, new] if self.order == "after" else [new, *found]
        return new


def packed(model: nn.Module, *inputs: torch.Tensor) -> tuple[graphopt.OptimizedModule, list[str]]:
    fast = graphopt.optimize(model.eval(), inputs, backend="prepacked", passes="canonicalize")
    with torch.no_grad():
        assert relative_error(fast(*inputs), model(*inputs)) < LIMIT
    nodes = [one for one in fast._run.packed.graph.nodes if one.op == "call_function"]
    return fast, [getattr(one.target, "__name__", "").removesuffix(".default") for one in nodes]


def test_a_norm_is_a_multiply_add_and_concatenations_share_one_tensor():
    """The first layer's concatenation of one piece is none; of the others, nothing is copied twice."""
    model = randomize_norms(Dense(4))
    fast, names = packed(model, torch.randn(IMAGE))
    assert names.count("addcmul") == names.count("relu_") == 4
    assert names.count("begin") == 1 and names.count("extend") == 2
    assert not {"cat", "batch_norm", "relu"} & set(names)
    with torch.no_grad():
        for shape in ((1, 3, 6, 5), (5, 3, 6, 5)):
            x = torch.randn(shape)
            assert relative_error(fast(x), model(x)) < LIMIT


def test_pieces_in_front_shift_the_others():
    _, names = packed(randomize_norms(Dense(3, order="before")), torch.randn(IMAGE))
    assert names.count("cat") == 2 and "begin" not in names
    assert names.count("addcmul") == 3


def test_a_concatenation_that_is_read_otherwise_is_its_own_tensor():
    class Net(Dense):
        def forward(self, x):
            found = [self.first(x)]
            for norm, conv in zip(self.norms, self.convs, strict=True):
                joined = torch.cat(found, 1)
                found = [*found, conv(F.relu(norm(joined)))]
            return joined, found[-1]

    _, names = packed(randomize_norms(Net(4)), torch.randn(IMAGE))
    assert names.count("cat") == 1  # the last one, which is returned
    assert names.count("begin") == 1 and names.count("extend") == 1


def test_a_norm_that_is_read_before_its_activation_keeps_both():
    class Net(Dense):
        def forward(self, x):
            y = self.norms[0](self.first(x).sin())
            return self.convs[0](F.relu(y)) + y

    _, names = packed(randomize_norms(Net(1)), torch.randn(IMAGE))
    assert "relu" in names and "relu_" not in names and "addcmul" in names


@pytest.mark.parametrize("options", [{"affine": False}, {"eps": 0.5}])
def test_options(options):
    _, names = packed(randomize_norms(Dense(2, **options)), torch.randn(IMAGE))
    assert names.count("addcmul") == 2


def test_norms_by_batch_statistics_and_other_dtypes_stay():
    _, names = packed(Dense(2, track_running_stats=False), torch.randn(IMAGE))
    assert names.count("batch_norm") == 2 and "addcmul" not in names
    model = randomize_norms(Dense(2)).to(torch.bfloat16)
    fast = graphopt.optimize(model.eval(), (torch.randn(IMAGE).bfloat16(),), backend="prepacked",
                             passes="canonicalize")  # fmt: skip
    with torch.no_grad():
        fast(torch.randn(IMAGE).bfloat16())
    assert "batch_norm" in str(fast._run.packed.graph)


def test_changed_statistics_are_noticed():
    model = randomize_norms(Dense(2))
    fast, _ = packed(model, torch.randn(IMAGE))
    changed = randomize_norms(Dense(2), seed=3).eval()
    changed.load_state_dict({**model.state_dict(), "norms.1.running_mean": torch.full((8,), 0.7)})
    fast.load_state_dict({**fast.state_dict(), "norms.1.running_mean": torch.full((8,), 0.7)})
    x = torch.randn(IMAGE)
    with torch.no_grad():
        assert relative_error(fast(x), changed(x)) < LIMIT


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=2, max_size=4),
    st.booleans(),
)
def test_any_concatenations(lists, growing):
    """Of any earlier values in any order, with repetitions, one after the other or each the last and more."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, 1)
            widths = [4 * sum(map(len, lists[: i + 1])) if growing else 4 * len(one)
                      for i, one in enumerate(lists)]  # fmt: skip
            self.norms = nn.ModuleList(map(nn.BatchNorm2d, widths))
            self.convs = nn.ModuleList(nn.Conv2d(width, 4, 1) for width in widths)

        def forward(self, x):
            values, chosen = [self.first(x)], []
            for norm, conv, one in zip(self.norms, self.convs, lists, strict=True):
                picked = [values[i % len(values)] for i in one]
                chosen = chosen + picked if growing else picked
                values.append(conv(F.relu(norm(torch.cat(chosen, 1)))))
            return torch.cat(values, 1)

    packed(randomize_norms(Net()), torch.randn(IMAGE))
