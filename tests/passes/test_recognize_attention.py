"""The specification of `recognize-attention`: attention that is written out is one op.

softmax(s q k^T + b) v, whatever the spelling of the products, wherever the number s stands, whatever shapes
the scores go through on the way to the softmax; b is the sum of all that is added.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

import graphopt
from tests.helpers import Net, assert_equal, calls, prepare, reasons, tensor

B, H, M, D = 2, 3, 5, 4
PASSES = "recognize-attention,canonicalize"
FUSED = "scaled_dot_product_attention"
BIAS = tensor(H, M, M, seed=5)
FAR = torch.finfo(torch.float32).min


def heads(x):
    """Queries, keys and values `[b, H, m, d]` of `[b, m, 3 H d]`."""
    return x.unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)


def optimized(attention, x=None, passes=PASSES, width=D, validate=True, **parts):
    """The optimized model and the model, whose attention reads three projections of one input."""
    torch.manual_seed(0)
    net = prepare(
        Net(lambda net, x: attention(*heads(net.qkv(x)), *(getattr(net, one) for one in parts)),
            qkv=nn.Linear(6, 3 * H * width), **parts)
    )  # fmt: skip
    x = tensor(B, M, 6) if x is None else x
    return graphopt.optimize(net, (x,), passes=passes, validate=validate), net


def check(attention, **options):
    """One attention op is left of it, with the same result, for other batches too."""
    fast, net = optimized(attention, **options)
    names = calls(fast)
    assert names.count(FUSED) == 1 and "softmax" not in names, reasons(fast)
    for batch in (B, 1, 4):
        x = tensor(batch, M, 6, seed=batch)
        with torch.no_grad():
            assert_equal(fast(x), net(x))
    return fast


def op_of(fast):
    return next(node for node in fast.graph_module.graph.nodes if FUSED in str(node.target))


SPELLINGS = {
    "on q": lambda q, k, v: ((q * 0.3) @ k.mT).softmax(-1) @ v,
    "on k": lambda q, k, v: (q @ (0.3 * k).mT).softmax(-1) @ v,
    "on k transposed": lambda q, k, v: (q @ (k.transpose(-2, -1) * 0.3)).softmax(-1) @ v,
    "on both": lambda q, k, v: ((q / 2.0) @ (k * 0.6).mT).softmax(-1) @ v,
    "on scores": lambda q, k, v: torch.softmax(torch.matmul(q, k.mT) * 0.3, dim=3) @ v,
    "divided": lambda q, k, v: torch.matmul((q @ k.mT / (1 / 0.3)).softmax(-1), v),
    "bmm": lambda q, k, v: torch.bmm(
        (torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT) * 0.3).softmax(-1), v.flatten(0, 1)
    ).view(-1, H, M, D),
    "reshaped between": lambda q, k, v: (
        torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(-1, H, M, M).mul(0.3).softmax(-1)
        .view(-1, M, M) @ v.flatten(0, 1)
    ),
    "einsum": lambda q, k, v: torch.einsum(
        "bhij,bhjd->bihd",
        torch.einsum("bhid,bhjd->bhij", q * 0.3, k).softmax(-1), v,
    ),
    "einsum the other way around": lambda q, k, v: torch.einsum(
        "bjhd,bhij->bhid", v.transpose(1, 2),
        (0.3 * torch.einsum("bjdh,hbid->bhij", k.permute(0, 2, 3, 1), q.transpose(0, 1))).softmax(-1),
    ),
    "five axes": lambda q, k, v: (
        lambda q, k, v: ((q @ k.mT) * 0.3).softmax(-1) @ v
    )(*(one[:, None].expand(-1, 2, -1, -1, -1) + 0.0 for one in (q, k, v))),
    "dropped": lambda q, k, v: F.dropout((q * 0.3 @ k.mT).softmax(-1), 0.5, False) @ v,
    "copies": lambda q, k, v: (q * 0.3 @ k.mT.contiguous()).softmax(-1).type_as(v).contiguous() @ v,
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_one_op(name):
    node = op_of(check(SPELLINGS[name]))
    assert node.kwargs["scale"] == pytest.approx(0.3)
    assert node.args[0].meta["type"]["shape"][-2:] == [M, D]
    assert len(node.args[0].meta["type"]["shape"]) == 4


def test_a_number_in_the_weights_is_a_scale_of_one():
    node = op_of(check(lambda q, k, v: (q @ k.mT).softmax(-1) @ v))
    assert node.kwargs["scale"] == 1.0
    node = op_of(check(lambda q, k, v: (q @ k.mT / 2).softmax(-1) @ v))
    assert "scale" not in node.kwargs  # 1 / sqrt(4) is what the op does


def windows(scores, bias, mask):
    """Swin: a bias per head, then a mask per window, which is an axis only then."""
    scores = (scores + bias).view(-1, 2, H, M, M) + mask.unsqueeze(1)
    return scores.view(-1, H, M, M)


ADDED = {
    "a bias": lambda s, q: s + BIAS,
    "a bias for all heads": lambda s, q: BIAS[0] + s,
    "a bias of one axis": lambda s, q: s + BIAS[0, 0],
    "two": lambda s, q: (s + BIAS) + BIAS[:1],
    "less": lambda s, q: s - BIAS,
    "before the number": lambda s, q: (s + BIAS) * 0.5,
    "of the run": lambda s, q: s + q.new_ones(M, M).triu(1) * -1e4,
    "both": lambda s, q: BIAS + (s + q.new_ones(M, M).triu(1) * FAR),
    "a number": lambda s, q: (s + 3.0) + BIAS,
    "one per query": lambda s, q: (s + BIAS[..., :1]) + BIAS,
    "under more axes": lambda s, q: ((s + BIAS).unflatten(0, (-1, 1)) + BIAS[:1]).flatten(0, 1),
}


@pytest.mark.parametrize("name", ADDED)
def test_what_is_added_is_one_mask(name):
    check(lambda q, k, v: ADDED[name](q @ k.mT * 0.3, q).softmax(-1) @ v)


def test_a_mask_of_five_axes():
    far = tensor(1, 2, 1, M, M)

    def attention(q, k, v):
        q, k, v = (torch.stack([one, 2 * one], 1) for one in (q, k, v))
        return (q @ k.mT * 0.3 + far + BIAS).softmax(-1) @ v

    check(attention)


def test_infinitely_far_keys_have_no_weight():
    never = torch.full((M, M), -torch.inf, dtype=torch.float64).triu(1)
    check(lambda q, k, v: (q * 0.3 @ k.mT + never).softmax(-1) @ v)


def test_baddbmm_adds_and_scales():
    def attention(q, k, v):
        q, k, v = (one.flatten(0, 1) for one in (q, k, v))
        return torch.baddbmm(BIAS[0], q, k.mT, beta=0.5, alpha=0.3).softmax(-1) @ v

    assert op_of(check(attention)).kwargs["scale"] == 0.3


@pytest.mark.parametrize("fixed", [True, False])
def test_shifted_windows(fixed):
    """Bias and mask meet before they are repeated over the batch; as one parameter if they are that."""
    mask = tensor(2, M, M, seed=6)

    def attention(q, k, v, bias):
        q, k, v = (torch.stack([one, 2 * one], 1).flatten(0, 1) for one in (q, k, v))
        given = mask if fixed else mask + 0.0 * q.sum()
        return windows(q * 0.3 @ k.mT, bias, given).softmax(-1) @ v

    passes = PASSES + ",materialize,canonicalize"
    parameter = nn.Parameter(tensor(1, H, M, M, seed=7))
    fast, net = optimized(attention, passes=passes, bias=parameter)
    assert calls(fast).count(FUSED) == 1, reasons(fast)
    # One sum of windows, and what makes the mask: nothing of the size of all scores.
    assert calls(fast).count("add") == (0 if fixed else 2)
    for batch in (2, 6):
        x = tensor(batch, M, 6, seed=3)
        with torch.no_grad():
            assert_equal(fast(x), net(x))


def test_keys_shared_by_groups_of_queries():
    def attention(q, k, v):
        k, v = (one[:, :1, None].expand(-1, -1, H, -1, -1).flatten(1, 2) for one in (k, v))
        return (q @ k.mT * 0.3).softmax(-1) @ v

    check(attention)


def test_sums_of_two_products_are_a_product_and_a_term():
    """Relative positions as q r^T: scores may be a sum of products."""
    far = tensor(M, D, seed=4)
    check(lambda q, k, v: (q @ k.mT + q @ far.mT).softmax(-1) @ v)


REFUSED = {
    "where": (lambda q, k, v: torch.where(BIAS > 0, q @ k.mT, FAR).softmax(-1) @ v, "masked by a choice"),
    "masked_fill": (lambda q, k, v: (q @ k.mT).masked_fill(BIAS > 1, -torch.inf).softmax(-1) @ v,
                    "masked by a choice"),
    "tensor": (lambda q, k, v: (q @ k.mT * BIAS).softmax(-1) @ v, "multiplied by a tensor"),
    "over": (lambda q, k, v: (q @ k.mT / BIAS.exp()).softmax(-1) @ v, "multiplied by a tensor"),
    "sign": (lambda q, k, v: (-(q @ k.mT)).softmax(-1) @ v, "change their sign"),
    "zero": (lambda q, k, v: (q @ k.mT * 0.0).softmax(-1) @ v, "change their sign"),
    "queries": (lambda q, k, v: (q @ k.mT).softmax(-2) @ v, "not over the last axis"),
    "weights read": (lambda q, k, v: ((p := (q @ k.mT).softmax(-1)) @ v, p), "weights are read elsewhere"),
    "scores read": (lambda q, k, v: ((p := q @ k.mT).softmax(-1) @ v, p), "scores are read elsewhere"),
    "softmax of all": (
        lambda q, k, v: (q @ k.mT).flatten(2).softmax(-1).view(-1, H, M, M) @ v, "softmax is reshaped"
    ),
    "narrow": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v[..., :2], "as wide as queries"),
    "repeated": (lambda q, k, v: (q @ k[:, :1].mT).softmax(-1) @ v, "equal leading sizes"),
    "einsum over two": (
        lambda q, k, v: torch.einsum("bhid,bhjd->bij", q, k).softmax(-1) @ v[:, 0], "not a product"
    ),
    "other dtype": (
        lambda q, k, v: (q @ k.mT).softmax(-1, dtype=torch.float32).double() @ v, "computed in torch.float32"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_that_is_left_with_a_reason(name):
    attention, reason = REFUSED[name]
    fast, net = optimized(attention)
    assert FUSED not in calls(fast)
    assert reason in reasons(fast)
    x = tensor(B, M, 6)
    assert_equal(fast(x), net(x))


def test_half_precision_is_fused_only_where_nothing_was_computed_in_more():
    def narrow(q, k, v):
        return (q @ k.mT * 0.5).softmax(-1) @ v

    def wide(q, k, v):
        return (q @ k.mT * 0.5).softmax(-1, dtype=torch.float32).to(q.dtype) @ v

    for attention, fused in ((narrow, True), (wide, False)):
        net = Net(lambda net, x: attention(*heads(x))).to(torch.bfloat16).eval()  # noqa: B023
        x = tensor(B, M, 3 * H * D).to(torch.bfloat16)
        fast = graphopt.optimize(net, (x,), passes=PASSES)
        assert (FUSED in calls(fast)) == fused
        assert_equal(fast(x).double(), net(x).double(), 2e-2)


def test_gradients_go_through():
    bias = nn.Parameter(BIAS.clone())
    fast, net = optimized(lambda q, k, v, bias: (q * 0.3 @ k.mT + bias).softmax(-1) @ v, bias=bias)
    x = tensor(B, M, 6)
    for name, parameter in net.named_parameters():
        (expected,) = torch.autograd.grad(net(x).square().sum(), parameter)
        (found,) = torch.autograd.grad(fast(x).square().sum(), fast.get_parameter(name))
        assert_equal(found, expected, 1e-10)


def test_dynamic_tokens():
    net = prepare(Net(lambda net, x: (lambda q, k, v: (q @ k.mT / 3).softmax(-1) @ v)(*heads(net.qkv(x))),
                      qkv=nn.Linear(6, 3 * H * D)))  # fmt: skip
    tokens = torch.export.Dim("tokens", min=2, max=64)
    fast = graphopt.optimize(
        net, (tensor(B, M, 6),), passes=PASSES, dynamic_shapes=(({1: tokens},),)
    )
    assert FUSED in calls(fast)
    x = tensor(B, 9, 6)
    assert_equal(fast(x), net(x))


@pytest.mark.parametrize("bias", [BIAS, BIAS[:1, :1]])
def test_masks_of_what_is_run_only_need_no_gradient(bias):
    """The fused kernel takes none that do, even where no gradient is computed."""
    attention = lambda q, k, v, bias: (q * 0.3 @ k.mT + bias.sin()).softmax(-1) @ v  # noqa: E731
    for passes, detached in (("tune", False), ("deploy", True)):
        fast, net = optimized(attention, passes=passes, bias=nn.Parameter(bias.clone()))
        mask = op_of(fast).args[3]
        assert ("detach" in str(mask.target)) == detached
        x = tensor(B, M, 6)
        assert_equal(fast(x), net(x))


STEPS = {
    "scale": lambda s, t, q: s * 0.7,
    "divide": lambda s, t, q: s / 1.3,
    "add": lambda s, t, q: s + t,
    "add first": lambda s, t, q: t[:1] + s,
    "subtract": lambda s, t, q: s - t[..., :1, :],
    "add of the run": lambda s, t, q: s + t * q.new_ones(1),
    "constant": lambda s, t, q: s + 0.5,
    "per query": lambda s, t, q: s + t[..., :1],
    "more axes": lambda s, t, q: (s.unflatten(1, (1, H)) + t[:1, None]).flatten(1, 2),
    "fewer axes": lambda s, t, q: (s.flatten(0, 1) + t[0]).view(-1, H, M, M),
}


@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=5), st.sampled_from(sorted(SPELLINGS)))
def test_any_changes_of_scores(steps, spelling):
    """Without the check of sites: the rewrite itself is right."""

    def attention(q, k, v):
        scores = (q * 0.3) @ k.mT
        for i, step in enumerate(steps):
            scores = STEPS[step](scores, BIAS * (i + 1), q)
        return scores.softmax(-1) @ v, SPELLINGS[spelling](v, q, k)

    fast, net = optimized(attention, validate=False)
    assert calls(fast).count(FUSED) == 2, reasons(fast)
    for batch in (2, 4):
        x = tensor(batch, M, 6, seed=batch)
        with torch.no_grad():
            assert_equal(fast(x), net(x))


def test_scores_that_are_one_value_many_times_are_read_once():
    """The search for the product does not double with every sum."""

    def attention(q, k, v):
        s = v
        for _ in range(40):
            s = s + s
        return s.softmax(-1) @ k.mT

    fast, _ = optimized(attention, passes="recognize-attention")
    assert FUSED not in calls(fast)
