"""The specification of `sink-expands` and of what `deploy` does with masks and tables of fixed size.

What is repeated for a batch of any size is computed once; masks that are literals are stored, and those that
hide nothing, or what comes later, need no tensor.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

import graphopt
from tests.helpers import Net, assert_equal, calls, prepare, reasons, tensor

N, D = 6, 4


def rows(x):
    """Positions `[batch, N]`, as a model computes them for every sample."""
    return torch.arange(N).unsqueeze(0).expand(x.shape[0], -1)


def optimized(body, *, validate=True, passes="deploy", **modules):
    net = prepare(Net(body, **modules))
    return graphopt.optimize(net, (tensor(3, N, D),), passes=passes, validate=validate), net


def check(fast, net):
    for batch in (1, 2, 5):
        x = tensor(batch, N, D, seed=batch)
        with torch.no_grad():
            assert_equal(fast(x), net(x))


REPEATED = {
    "elementwise": lambda net, x: x + (rows(x) * 2 + 1).sin().unsqueeze(-1),
    "two": lambda net, x: x + (rows(x) + rows(x).flip(1)).cos()[..., None],
    "counted": lambda net, x: x * (torch.diff(rows(x), prepend=rows(x)[:, :1] - 1) != 1)
    .cumsum(-1).unsqueeze(-1),
    "looked up": lambda net, x: x + net.table(rows(x)),
    "indexed": lambda net, x: x + rows(x)[
        torch.arange(x.shape[0])[:, None], torch.arange(N)
    ].double().unsqueeze(2),
    "one of the rows": lambda net, x: x * rows(x)[:, 2].double()[:, None, None],
    "and": lambda net, x: x * ((rows(x) > 1) & (rows(x) < 4))[..., None],
}  # fmt: skip


@pytest.mark.parametrize("name", REPEATED)
def test_what_is_repeated_for_a_batch_is_stored(name):
    fast, net = optimized(REPEATED[name], table=nn.Embedding(N, D))
    assert calls(fast) in (["add"], ["mul"])
    assert not fast.report.rolled_back
    check(fast, net)


def test_what_depends_on_the_sample_stays():
    """A row of its own for each sample; an axis that is repeated and summed over."""
    for body in (
        lambda net, x: x + torch.arange(x.shape[0]).unsqueeze(1).expand(-1, N).unsqueeze(2),
        lambda net, x: x + rows(x).double().cumsum(0).unsqueeze(2),
        lambda net, x: (
            x + rows(x)[torch.arange(x.shape[0])[:, None], (x[..., 0] > 0).long()][..., None]
        ),
    ):
        fast, net = optimized(body)
        check(fast, net)


def test_an_operand_that_gives_the_shape_stays_repeated():
    fast, net = optimized(lambda net, x: torch.cat([x, net.w.expand(x.shape[0], 1, -1) + net.v], 1),
                          w=nn.Parameter(torch.randn(1, 1, D)), v=nn.Parameter(torch.randn(D)))  # fmt: skip
    assert calls(fast) == ["sym_size", "expand", "cat"]
    check(fast, net)


# -- constants of the shape and type of something --------------------------------------------------

TYPED = {
    "zeros": lambda net, x: torch.cat([x.new_zeros(2, D), x[0]]),
    "ones": lambda net, x: x * x.new_ones(D, D).tril()[1],
    "full": lambda net, x: x + x.new_full((D,), 3.0).cumsum(0),
    "like": lambda net, x: x + torch.zeros_like(x[0]).cos(),
    "of a type": lambda net, x: x + torch.arange(D).type_as(x).sin(),
    "scattered": lambda net, x: x + x.new_zeros(D).scatter(0, torch.tensor([1, 2]), 1.0),
}


@pytest.mark.parametrize("name", TYPED)
def test_tables_that_read_only_the_type_of_an_input_are_stored(name):
    fast, net = optimized(TYPED[name])
    kept = {"zeros": ["select", "cat"], "ones": ["mul"]}
    assert calls(fast) == kept.get(name, ["add"])
    check(fast, net)


def test_tables_of_a_dynamic_size_stay():
    fast, net = optimized(lambda net, x: x + torch.ones_like(x).cumsum(0))
    assert calls(fast) == ["ones_like", "cumsum", "add"]
    check(fast, net)


def test_large_tables_stay():
    fast, net = optimized(lambda net, x: x + x.new_ones(200, D).cumsum(0)[100],
                          passes="canonicalize,materialize{limit=100}")  # fmt: skip
    assert "materialize" in [one.rewrite for one in fast.report.applied]
    fast, net = optimized(lambda net, x: x.sum() + x.new_ones(200, D).cumsum(0),
                          passes="canonicalize,materialize{limit=100}")  # fmt: skip
    assert "cumsum" in calls(fast)
    check(fast, net)


# -- masks ----------------------------------------------------------------------------------------


def attention(mask, **options):
    return lambda net, x: F.scaled_dot_product_attention(
        x[:, None], net.a(x)[:, None], x[:, None], mask(net, x), **options
    )


def attentions(fast):
    found = [one for one in fast.graph_module.graph.nodes if "dot_product" in str(one.target)]
    return [(one.args[3] if len(one.args) > 3 else None, len(one.args) > 5 and one.args[5])
            for one in found]  # fmt: skip


FIXED = {
    "no mask": (lambda net, x: torch.ones(N, N, dtype=torch.bool), False),
    "no mask, for each sample": (
        lambda net, x: (torch.arange(N) >= 0).view(1, 1, N, 1).expand(x.shape[0], -1, N, N), False),
    "zeros": (lambda net, x: x.new_zeros(N, N), False),
    "causal": (lambda net, x: torch.ones(N, N, dtype=torch.bool).tril(), True),
    "causal, from positions": (
        lambda net, x: rows(x)[:, None, None, :] <= rows(x)[:, None, :, None], True),
}  # fmt: skip


@pytest.mark.parametrize("name", FIXED)
def test_masks_that_say_nothing_else_are_options(name):
    mask, causal = FIXED[name]
    fast, net = optimized(attention(mask), a=nn.Linear(D, D))
    assert attentions(fast) == [(None, causal)], reasons(fast)
    check(fast, net)


def test_a_mask_that_a_user_may_load_stays():
    net = Net(attention(lambda net, x: net.mask), a=nn.Linear(D, D))
    net.register_buffer("mask", torch.ones(N, N, dtype=torch.bool))
    fast = graphopt.optimize(prepare(net), (tensor(3, N, D),))
    assert attentions(fast)[0][0] is not None
    assert "mask" in fast.state_dict()


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["ones", "tril", "triu", "band"]), st.booleans(), st.integers(0, N * N),
       st.booleans())  # fmt: skip
def test_any_mask(kind, flipped, at, wide):
    """Without the check of sites: one entry makes it another mask."""
    size = (N, N)
    mask = torch.ones(size, dtype=torch.bool)
    mask = {"ones": mask, "tril": mask.tril(), "triu": mask.triu(), "band": mask.tril(1)}[kind]
    if flipped and at < N * N:
        mask = (
            mask.flatten().index_fill(0, torch.tensor(at), not bool(mask.flatten()[at])).view(size)
        )
    mask[:, 0] |= ~mask.any(-1)  # no row without a key
    given = mask.expand(1, 1, N, N) if wide else mask
    fast, net = optimized(
        attention(lambda net, x: given.clone()), a=nn.Linear(D, D), validate=False
    )
    same = {"all": bool(mask.all()), "causal": torch.equal(mask, torch.ones(size).tril().bool())}
    found, causal = attentions(fast)[0]
    assert (found is None) == any(same.values()) and causal == same["causal"]
    check(fast, net)
