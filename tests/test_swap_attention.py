"""The specification of `swap_attention`: attention with softmax becomes simplified linear attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.training.swaps import SwapError, swap, swap_attention
from graphopt.training.swaps.attention import LinearAttention, attend, linear
from tests.helpers import Net, assert_equal, calls, output_of, tensor

HEADS = 2
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def model(attention: Attend, tokens: int = 9) -> tuple[nn.Module, Tensor]:
    """Attention of two heads between linear maps."""

    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return m.out(attention(q, k, v).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    net = Net(body, qkv=nn.Linear(8, 24), out=nn.Linear(8, 8)).double()
    return net, tensor(2, tokens, 8)


def spelled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.transpose(-2, -1) * 0.5).softmax(-1), 0.1, False) @ v


def divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(torch.softmax(torch.matmul(q, k.mT) / 2.0, dim=-1).type_as(v), v)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def over(swapped: Any) -> Any:
    """After training: the position is not zero any more."""
    swaps = swapped.swaps
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for one in swaps.parameters():
            one.copy_(torch.randn(one.shape, generator=generator, dtype=one.dtype))
        swaps.calls.fill_(swaps.warm + swaps.steps + 1)
    return swapped.eval()


def reference(q: Tensor, k: Tensor, v: Tensor, new: Any, side: int, skipped: int = 0) -> Tensor:
    """The formula of SLA, token by token."""
    q, k = q.relu(), (k + new.position).relu()
    out = torch.zeros(*q.shape[:-1], v.shape[-1]).double()
    for i in range(q.shape[-2]):
        weights = (q[..., i : i + 1, :] * k).sum(-1)
        total = (weights[..., None] * v).sum(-2)
        out[..., i, :] = total / (weights.sum(-1, keepdim=True) + 1e-6)
    image = v[..., skipped:, :].transpose(-2, -1).unflatten(-1, (side, side))
    for head in range(HEADS):
        local = new.convolution(image[:, head]).flatten(2).transpose(1, 2)
        out[:, head, skipped:] += local
    return out


@pytest.mark.parametrize("attention", [fused, spelled, divided])
def test_every_spelling_becomes_the_formula(attention: Attend):
    net, x = model(attention)
    swapped: Any = swap_attention(net, (x,), steps=2)
    assert_equal(output_of(swapped.eval(), [x]), output_of(net.eval(), [x]))
    over(swapped)
    (site,) = swapped.swaps.children()
    expected = Net(lambda m, x: net.body(net, x), inner=net)
    net.body = model(lambda q, k, v: reference(q, k, v, site.new, 3))[0].body  # type: ignore[assignment]
    assert_equal(output_of(swapped, [x]), output_of(expected, [x]))


def test_nothing_of_softmax_is_left_after_optimize():
    for attention in (fused, spelled):
        net, x = model(attention)
        swapped = over(swap_attention(net, (x,), steps=2))
        fast = graphopt.optimize(swapped, (x,))
        for rows in (x, tensor(5, 9, 8, seed=4)):
            assert_equal(output_of(fast, [rows]), output_of(swapped, [rows]), 1e-10)
        assert not {"softmax", "scaled_dot_product_attention"} & set(calls(fast))
        assert "swaps.calls" not in dict(fast.named_buffers())


def test_it_is_progressive():
    net, x = model(fused)
    swapped: Any = swap_attention(net, (x,), steps=2, warm=1)
    with torch.no_grad():
        for share in (1.0, 1.0, 0.5, 0.0):
            found = swapped(x)
            assert swapped.swaps.share == share
            (site,) = swapped.swaps.children()
            mixed = model(lambda q, k, v: (
                share * fused(q, k, v) + (1 - share) * site.new(share, q, k, v)  # noqa: B023
            ))[0]  # fmt: skip
            assert_equal(found, mixed(x))


@pytest.mark.parametrize(
    ("m", "n", "d", "c"), [(4, 4, 8, 8), (9, 30, 3, 5), (40, 40, 4, 4), (1, 7, 2, 3)]
)
def test_both_orders_are_equal_and_the_cheaper_one_is_taken(m: int, n: int, d: int, c: int):
    q, k, v = tensor(2, m, d).relu(), tensor(2, n, d, seed=2).relu(), tensor(2, n, c, seed=3)
    q[0, 0] = 0  # a row of zeros gives zeros
    first, second = attend(q, k, v, "linear"), attend(q, k, v, "quadratic")
    assert_equal(first, second)
    assert bool((first[0, 0] == 0).all())
    # SLAB: q (k^T v) iff i j (c + d) > c d (i + j).
    assert linear(q, k, v) == (m * n * (c + d) > c * d * (m + n))
    assert torch.equal(attend(q, k, v), first if linear(q, k, v) else second)


def test_the_order_taken_is_that_of_the_optimized_graph():
    """Nothing of the size tokens x tokens for many tokens, nothing of features x features for few."""
    for tokens, features, inner in ((4, 16, (4, 4)), (36, 4, (4, 4))):
        q = torch.randn(2, tokens, features)
        new = LinearAttention(features, None, convolution=False).eval()
        fast = graphopt.optimize(Net(lambda m, q: m.new(0.0, q, q, q), new=new), (q,))
        found = {tuple(node.meta["type"]["shape"][-2:]) for node in fast.graph_module.graph.nodes
                 if "matmul" in str(node.target)}  # fmt: skip
        assert inner in found
        assert (36, 36) not in found
        assert (16, 16) not in found


def test_class_tokens_have_no_place_on_the_square():
    net, x = model(fused, tokens=10)
    with pytest.raises(
        SwapError, match=r"10 tokens \(0 apart\) do not fill a square; class_tokens=1"
    ):
        swap_attention(net, (x,), steps=1)
    swapped = over(swap_attention(net, (x,), steps=1, class_tokens=1))
    (site,) = swapped.swaps.children()
    expected = model(lambda q, k, v: reference(q, k, v, site.new, 3, skipped=1), tokens=10)[0]
    assert_equal(output_of(swapped, [x]), output_of(expected, [x]))


def test_without_position_and_convolution_any_number_of_tokens_will_do():
    net, x = model(fused, tokens=7)
    for one in (x, x[:, :5]):
        swapped: Any = swap_attention(net, (one,), steps=0, convolution=False, position=False)
        assert not list(swapped.swaps.parameters())
        swapped(one)
        expected = model(lambda q, k, v: attend(q.relu(), k.relu(), v))[0]
        assert_equal(output_of(swapped, [one]), output_of(expected, [one]))


MASK = torch.randn(9, 9).double()
REFUSED: dict[str, tuple[Attend, str]] = {
    "causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), "causal"),
    "mask": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, MASK), "a mask or a bias"),
    "bias": (lambda q, k, v: (q @ k.mT * 0.5 + MASK).softmax(-1) @ v, "a bias is added"),
    "filled": (
        lambda q, k, v: (q @ k.mT).masked_fill(MASK > 0, float("-inf")).softmax(-1) @ v,
        "masked",
    ),
    "negative": (lambda q, k, v: (q @ k.mT * -1.0).softmax(-1) @ v, "change their sign"),
    "temperature": (
        lambda q, k, v: (q @ k.mT * MASK[0, 0].exp()).softmax(-1) @ v,
        "multiplied by a tensor",
    ),
    "einsum": (
        lambda q, k, v: torch.einsum("bhij,bhjd->bhid", (q @ k.mT).softmax(-1), v),
        "it is written as an einsum",
    ),
    "einsum of scores": (
        lambda q, k, v: torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1) @ v,
        "its scores are written as an einsum",
    ),
    "queries": (lambda q, k, v: (q @ k.mT).softmax(-2) @ v, "not along the keys"),
    "read": (
        lambda q, k, v: (p := (q @ k.mT).softmax(-1)) @ v + p.sum(-1, keepdim=True),
        "read elsewhere",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_linear_attention_has_no_place_for_is_refused(name: str):
    attention, reason = REFUSED[name]
    net, x = model(attention)
    with pytest.raises(SwapError, match=reason):
        swap_attention(net, (x,), steps=1)


def test_attention_modules_are_found_by_what_they_compute():
    torch.manual_seed(0)
    inner = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
    net = Net(lambda m, x: m.inner(m.norm(x), m.norm(x), m.norm(x))[0], inner=inner,
              norm=nn.LayerNorm(8)).double()  # fmt: skip
    x = tensor(2, 9, 8)
    swapped: Any = swap(net, (x,), norm="prepbn", attention="sla", steps=2)
    assert [one.rewrite for one in swapped.swaps.report.swapped] == [
        "swap-norm{to=prepbn}", "swap-attention{to=sla}",
    ]  # fmt: skip
    assert_equal(output_of(swapped.eval(), [x]), output_of(net.eval(), [x]))
    over(swapped)
    fast = graphopt.optimize(swapped, (x,))
    assert_equal(output_of(fast, [x]), output_of(swapped, [x]), 1e-10)


def test_sums_over_tokens_are_in_float32():
    new = LinearAttention(4, torch.zeros(9, 4), convolution=True)
    x = torch.randn(2, 9, 4)
    half = new(0.0, *(one.bfloat16() for one in (x, x, x)))
    assert half.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(new(0.0, x, x, x), new.forward(0.0, x, x, x))
        assert new(0.0, x, x, x).dtype == torch.float32


def test_what_cannot_be_asked_for():
    net, x = model(fused)
    for options, message in (
        ({"to": "performer"}, "attention is 'performer', expected one of sla"),
        ({"order": "fast"}, "order is 'fast', expected one of auto, linear, quadratic"),
        ({"kernel": 3}, "sla has no option 'kernel' .options: convolution, position"),
    ):
        with pytest.raises(SwapError, match=message):
            swap_attention(net, (x,), steps=1, **options)
