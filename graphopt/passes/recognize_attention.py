"""Attention that is written out becomes one op, which never stores its weights.

    softmax(s q k^T + b) v   =   scaled_dot_product_attention(q, k, v, attn_mask=b, scale=s)

s is the product of all numbers on q, on k and on the scores; b is the sum of all that is added to them, terms
of parameters first (a relative position bias and the mask of shifted windows are one parameter after
`materialize`). Products may be matmul, bmm, baddbmm or einsum; leading axes may be folded anywhere.

Declines where the weights or the scores are read elsewhere, are masked by a choice (`where`, `masked_fill`:
not something that is added), or where the softmax is computed in another dtype than the products. A row of b
that is -inf everywhere gives nan as it is written out, and 0 by the op.

It pays, but not for every shape: torch's fused kernel on the CPU takes 4 axes and equal widths of q, k and
v, anything else runs a slower one. So leading axes are folded to 4, and other widths decline. Medians in us
on one core in float32, written out -> fused:

    windows 64 x 3 x 49 x 32, bias       2118 ->  1882     3 axes, 24 x 128 x 64     2672 -> 3408
    ViT-S, 6 x 197 x 64                   913 ->   893         the same as 4 axes    2672 -> 1482
        a batch of 8                    17644 ->  7686     5 axes, 2 x 32 x 3 x 49   2483 -> 3684
    BERT, 12 x 128 x 64                   708 ->   723         the same as 4 axes    2483 -> 1799
        with a mask                       766 ->   750     values of twice the width  349 ->  655
    one token of 12 x 128 x 64             38 ->    33
"""

from __future__ import annotations

import dataclasses
from typing import Any

from graphopt.ir import ops
from graphopt.ir.attention import Attention, Product, Step, read
from graphopt.ir.ops.base import overload
from graphopt.ir.rewrite import Rewriter, rewrite
from graphopt.ir.sizes import same, same_shape
from graphopt.ir.value import Value
from graphopt.passes.base import RewritePass

Shape = tuple[Any, ...]


@rewrite(
    unproved="the prover has no rule for a softmax of scores under other shapes; "
    "tests/passes/test_recognize_attention.py draws spellings, and every site is checked in float64"
)
def recognize_attention(op: ops.Matmul | ops.Einsum, rw: Rewriter) -> Value:
    """softmax(s q k^T + b) v is one attention op."""
    found = read(op)
    rw.match(found is not None and not op.out.is_constant)
    assert found is not None
    _check(rw, found)
    query, key, scale = _scores(rw, found)
    value, order = _values(rw, found)
    _fits(rw, query, key, value)
    frames = _Frames(rw, query, found)
    mask, more = frames.added()
    rw.require(scale * more > 0, "its scores change their sign")
    rw.require(
        same_shape(frames.shape, found.product.out.shape),
        "its weights meet the values under another shape than that of the product of queries and keys",
    )
    out = _attention(rw, query, key, value, mask, scale * more, frames)
    return out if order == tuple(range(out.ndim)) else out.permute(*order)


def _check(rw: Rewriter, found: Attention) -> None:
    """Decline what is not a softmax over keys of scores with something added."""
    rw.require(found.along_keys, "its softmax is not over the last axis")
    rw.require(not found.weights_shared, "its weights are read elsewhere too")
    rw.require(not found.scores_shared, "its scores are read elsewhere too")
    for step in found.steps:
        rw.require(
            step.kind != "mask", "its scores are masked by a choice, not by something that is added"
        )
        rw.require(step.kind != "tensor", "its scores are multiplied by a tensor")
    values = [
        found.product.out,
        *(step.out for step in (*found.steps, *found.after)),
        found.softmax.out,
    ]
    wanted = found.root.out.dtype
    for one in values:
        rw.require(
            one.dtype == wanted, f"its softmax is computed in {one.dtype}, its products in {wanted}"
        )


def _fits(rw: Rewriter, query: Value, key: Value, value: Value) -> None:
    """Decline operands that the fused kernel does not take."""
    shapes = f"queries are {list(query.shape)}, keys {list(key.shape)}, values {list(value.shape)}"
    rw.require(
        query.ndim == key.ndim == value.ndim and query.ndim >= 3, f"expected equal axes; {shapes}"
    )
    lead = query.shape[:-2]
    rw.require(
        same_shape(lead, key.shape[:-2]) and same_shape(lead, value.shape[:-2]),
        f"expected equal leading sizes; {shapes}",
    )
    rw.require(
        same(query.shape[-1], value.shape[-1]) and isinstance(query.shape[-1], int),
        f"the fused kernel takes values as wide as queries; {shapes}",
    )


# -- operands -------------------------------------------------------------------------------------


def _scores(rw: Rewriter, found: Attention) -> tuple[Value, Value, float]:
    """Queries `[..., m, d]`, keys `[..., n, d]`, and the number their product is multiplied by."""
    product = found.product
    if isinstance(product, ops.Einsum):
        left, right, out = _letters(rw, product)
        lead, m, n = out[:-2], out[-2], out[-1]
        query, key = product.tensors
        if m in right:
            left, right, query, key = right, left, key, query
        rw.require(m in left and n in right, _PRODUCT)
        inner = "".join(sorted(set(left) - set(lead + m)))
        rw.require(len(inner) == 1 and sorted(right) == sorted(lead + n + inner), _PRODUCT)
        query, factor = _peeled(query, _order(left, lead + m + inner))
        key, other = _peeled(key, _order(right, lead + n + inner))
        return query, key, factor * other
    last = tuple(range(product.left.ndim)), tuple(range(product.right.ndim))
    query, factor = _peeled(product.left, last[0])
    key, other = _peeled(product.right, (*last[1][:-2], *reversed(last[1][-2:])))
    number = product.alpha if isinstance(product, ops.Addmm) else 1.0
    return query, key, factor * other * number


def _values(rw: Rewriter, found: Attention) -> tuple[Value, tuple[int, ...]]:
    """Values `[..., n, d]`, and the order of axes that the root has them in."""
    root = found.root
    if isinstance(root, ops.Matmul):
        return root.right, tuple(range(root.out.ndim))
    letters = _letters(rw, root)
    weights, given, out = letters[found.side], letters[1 - found.side], letters[2]
    lead, m, n = weights[:-2], weights[-2], weights[-1]
    width = "".join(set(given) - set(lead + n))
    rw.require(len(width) == 1 and sorted(given) == sorted(lead + n + width), _PRODUCT)
    rw.require(sorted(out) == sorted(lead + m + width), _PRODUCT)
    value = root.tensors[1 - found.side]
    order = _order(given, lead + n + width)
    return _permuted(value, order), _order(lead + m + width, out)


_PRODUCT = "its einsum is not a product of two matrices for each leading index"


def _letters(rw: Rewriter, op: ops.Einsum) -> tuple[str, str, str]:
    """The indices of two operands and of the result."""
    given, arrow, out = op.equation.replace(" ", "").partition("->")
    left, _, right = given.partition(",")
    simple = bool(arrow) and "." not in given + out and len(op.tensors) == 2
    rw.require(simple and all(len(set(one)) == len(one) for one in (left, right, out)), _PRODUCT)
    return left, right, out


def _order(old: str, new: str) -> tuple[int, ...]:
    return tuple(old.index(letter) for letter in new)


def _peeled(value: Value, order: tuple[int, ...]) -> tuple[Value, float]:
    """`value` with its axes in this order, without the numbers it is multiplied by, and their product."""
    factor = 1.0
    while True:
        op: Any = value.op
        if isinstance(op, ops.Permute):
            value, order = op.input, tuple(op.dims[one] for one in order)
            continue
        for inner, number in _numbers(op):
            if isinstance(inner, Value) and inner.dtype == value.dtype and number > 0:
                value, factor = inner, factor * number
                break
        else:
            return _permuted(value, order), factor


def _numbers(op: Any) -> list[tuple[Any, float]]:
    if isinstance(op, ops.Div) and isinstance(op.right, (int, float)) and op.right:
        return [(op.left, 1.0 / op.right)]
    if isinstance(op, ops.Mul):
        pairs = ((op.left, op.right), (op.right, op.left))
        return [(one, number) for one, number in pairs if isinstance(number, (int, float))]
    return []


def _permuted(value: Value, order: tuple[int, ...]) -> Value:
    return value if order == tuple(range(len(order))) else value.permute(*order)


# -- what is added --------------------------------------------------------------------------------


class _Frames:
    """The shapes that scores go through, and what is added to them, brought under the last one."""

    def __init__(self, rw: Rewriter, query: Value, found: Attention) -> None:
        self.rw, self.query, self.found = rw, query, found
        self.shape: Shape = found.product.out.shape
        self.written: Shape = self.shape

    def added(self) -> tuple[Value | None, float]:
        """All terms as one, and the number that the product is multiplied by."""
        fixed: Value | None = None  # of parameters alone
        given: Value | None = None
        scale = 1.0
        product = self.found.product
        first = [Step("term", product.out, one) for one in _added_to(product)]
        for step in (*first, *self.found.steps, *self.found.after):
            if step.kind == "scale":
                assert isinstance(step.operand, (int, float))
                number = float(step.operand)
                scale *= number
                fixed = None if fixed is None else fixed * number
                given = None if given is None else given * number
            elif step.kind == "shape":
                fixed, given = self.moved(step.out, fixed, given)
            elif (term := self.term(step)) is not None:
                if term.is_constant:
                    fixed = term if fixed is None else fixed + term
                else:
                    given = term if given is None else given + term
        both = fixed is not None and given is not None
        return (given + fixed if both else fixed or given), scale  # type: ignore[operator]

    def term(self, step: Step) -> Value | None:
        """What a step adds, None if that is the same for all keys and so changes no weight."""
        term = step.operand
        if not isinstance(term, Value) or not term.ndim or same(term.shape[-1], 1):
            return None
        dtype = self.query.dtype
        self.rw.require(
            term.dtype == dtype, f"what is added to its scores is {term.dtype}, they are {dtype}"
        )
        factor = -1.0 if step.negative else 1.0
        if step.out is self.found.product.out:
            assert isinstance(self.found.product, ops.Addmm)
            factor = float(self.found.product.beta)
        return term if factor == 1.0 else term * factor

    def moved(self, out: Value, *terms: Value | None) -> list[Value | None]:
        """Terms for scores that go on under the shape of `out`."""
        shape = out.shape
        if same_shape(shape, self.shape):
            return list(terms)
        self.rw.require(
            same(shape[-1], self.shape[-1]), "the axis of its softmax is reshaped on the way"
        )
        op = out.op
        written = op.shape if isinstance(op, ops.Reshape) else shape
        known = [one for one in terms if one is not None]
        if len(shape) < len(self.shape) and len(known) == 2:  # before they are repeated
            terms = (None, known[1] + known[0])
        moved = [None if one is None else self._under(one, shape, written) for one in terms]
        self.shape, self.written = shape, written
        return moved

    def _under(self, term: Value, shape: Shape, written: Shape) -> Value:
        """A term, which broadcasts to the present shape, for another shape of the same elements."""
        sizes = (1,) * (len(self.shape) - term.ndim) + tuple(term.shape)
        full, new = list(sizes), []
        pieces = _pieces(self.shape, shape)
        self.rw.require(pieces is not None, "its scores are reshaped in a way that mixes axes")
        assert pieces is not None
        for old, to in pieces:
            if all(same(size, 1) for size in sizes[old]):
                new += [1] * (to.stop - to.start)
                continue
            if old.stop - old.start > 1:
                full[old] = self._sizes(old, to.start, shape)
            new += written[to]
        try:
            term = term.reshape(*sizes)
            grown = any(same(a, 1) and not same(b, 1) for a, b in zip(sizes, full, strict=True))
            if grown:
                term = term.expand(*full)
            return term.reshape(*new)
        except ValueError as error:
            self.rw.decline(f"what is added to its scores cannot follow their shape: {error}")

    def _sizes(self, old: slice, axis: int, shape: Shape) -> list[Any]:
        """The sizes of axes that become one, `axis` of `shape`, as arguments of a call."""
        sizes = [
            one if isinstance(one, int) else self._written(one, written)
            for one, written in zip(self.shape[old], self.written[old], strict=True)
        ]
        unknown = [i for i, one in enumerate(sizes) if one is None]
        if unknown:
            query = self.query.shape
            self.rw.require(
                len(unknown) == 1 and axis < len(query) - 1 and same(query[axis], shape[axis]),
                "a dynamic size of its scores is not written out",
            )
            sizes[unknown[0]] = -1
            arguments = {"self": self.query, "dim": axis, "sizes": sizes}
            split = self.rw.call(overload("unflatten.int"), arguments)
            sizes[unknown[0]] = self._size_of(split, axis + unknown[0])
        return sizes

    def _written(self, size: Any, written: Any) -> Value | None:
        """A dynamic size as an argument of a call, None if it is neither written nor one of the queries."""
        if isinstance(written, Value):
            return written
        axes = (axis for axis, one in enumerate(self.query.shape) if same(one, size))
        axis = next(axes, None)
        return None if axis is None else self._size_of(self.query, axis)

    def _size_of(self, value: Value, axis: int) -> Value:
        return self.rw.call(overload("sym_size.int"), {"self": value, "dim": axis})


def _added_to(product: Product) -> list[Value]:
    return [product.input] if isinstance(product, ops.Addmm) and product.beta != 0 else []


def _pieces(old: Shape, new: Shape) -> list[tuple[slice, slice]] | None:
    """Axes of two shapes of the same elements that correspond: one to one, one to several, several to one."""
    found: list[tuple[slice, slice]] = []
    i = j = 0
    while i < len(old) and j < len(new):
        options = sorted(
            ((a, b) for a in range(1, len(old) - i + 1) for b in range(1, len(new) - j + 1)
             if min(a, b) == 1), key=sum,
        )  # fmt: skip
        fits = (
            one
            for one in options
            if same(_product(old[i : i + one[0]]), _product(new[j : j + one[1]]))
        )
        piece = next(fits, None)
        if piece is None:
            return None
        found.append((slice(i, i + piece[0]), slice(j, j + piece[1])))
        i, j = i + piece[0], j + piece[1]
    if not all(same(size, 1) for size in (*old[i:], *new[j:])):
        return None
    return found if (i, j) == (len(old), len(new)) else None


def _product(sizes: Shape) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


# -- the op ---------------------------------------------------------------------------------------


def _attention(
    rw: Rewriter, query: Value, key: Value, value: Value, mask: Value | None, scale: float, frames: _Frames
) -> Value:  # fmt: skip
    """The op on operands of 4 axes, its result under the shape they had."""
    shape = (*query.shape[:-1], value.shape[-1])
    folded = mask
    if query.ndim == 3:
        q, k, v = (_unsqueezed(rw, one) for one in (query, key, value))
    elif query.ndim == 4:
        q, k, v = query, key, value
    else:
        fixed = all(isinstance(one, int) for one in (*shape[-3:], key.shape[-2]))
        rw.require(fixed, f"more than 4 axes of which the last 3 are dynamic: {list(shape)}")
        q, k, v = (rw.emit(ops.Reshape(one, (-1, *one.shape[-3:]))) for one in (query, key, value))
        if mask is not None:
            lead = q.shape[0]
            scores = (lead, *frames.shape[-3:])
            folded = frames._under(
                mask, scores, (-1 if not isinstance(lead, int) else lead, *scores[1:])
            )
    if folded is not None and folded.ndim < 4:
        folded = folded.reshape(*(1,) * (4 - folded.ndim), *folded.shape)
    given = None if scale == query.shape[-1] ** -0.5 else scale
    out = rw.emit(ops.Attention(q, k, v, folded, scale=given), like=frames.found.root)
    if query.ndim == 3:
        return rw.call(overload("squeeze.dim"), {"self": out, "dim": 0})
    try:
        return out.reshape(*shape)
    except ValueError as error:
        rw.decline(f"its leading axes cannot be folded: {error}")


def _unsqueezed(rw: Rewriter, value: Value) -> Value:
    return rw.call(overload("unsqueeze.default"), {"self": value, "dim": 0})


@dataclasses.dataclass(frozen=True)
class RecognizeAttention(RewritePass):
    """Attentions that are written out become attention ops."""

    name = "recognize-attention"
    rewrites = (recognize_attention,)
