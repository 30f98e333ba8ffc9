"""Variants of one model in one batch: every row is computed with the parameters of its own variant.

    y_t  =  r_i * (W (c_i * x_t)  +  B_i A_i (c_i * x_t))  +  b_i,      i the variant of row t

`align` walks two graphs from their outputs and pairs their nodes; they may differ in constants only.
`combine` then makes one graph of the first: what the variants share is computed once for all rows,
what they do not is looked up row by row. A weight is taken apart into scales of its rows and columns,
which its expression shows, and a difference from the first's of low rank, which is found numerically.
No kind of adapter is known by name. Formulas: Punica (arXiv 2310.18547) and S-LoRA (arXiv 2311.03285)
for low rank, DoRA (arXiv 2402.09353) and IA3 (arXiv 2205.05638) for the scales.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir import ops
from graphopt.ir.builder import Builder
from graphopt.ir.cost import Target
from graphopt.ir.graph import Graph, State
from graphopt.ir.interpret import Evaluator
from graphopt.ir.ops.base import Op
from graphopt.ir.value import Value

NOISE = 1e-14  # what a difference of low rank may leave, relative to the weights
KEPT = 1 << 26  # bytes of values that are kept per variant


class NotAVariant(ValueError):
    """Two graphs differ in more than their parameters, or in a parameter that rows cannot choose."""


# -- where graphs differ ------------------------------------------------------------------------


def align(base: Graph, other: Graph) -> dict[fx.Node, fx.Node]:
    """The node of `other` for every node of `base` that the outputs need and that is no constant.

    Raises:
        NotAVariant: naming the first place where the two differ in more than constants.
    """
    if len(base.inputs) != len(other.inputs):
        raise NotAVariant(f"{len(other.inputs)} inputs, expected {len(base.inputs)}")
    pairs = dict(zip(base.inputs, other.inputs, strict=True))
    stack = [(base.output, other.output)]
    while stack:
        one, two = stack.pop()
        if base.is_constant(one) and other.is_constant(two):
            continue
        if one in pairs:
            if pairs[one] is not two:
                raise NotAVariant(f"{_place(base, one)}: computed once, expected twice")
            continue
        pairs[one] = two
        stack += _operands(base, one, other, two)
    return pairs


def _operands(base: Graph, one: fx.Node, other: Graph, two: fx.Node) -> Iterator[Any]:
    """The pairs of nodes that two nodes read."""
    left, right = Builder(base, one).view(one), Builder(other, two).view(two)
    if left is None or right is None:
        if one.op != two.op or (one.op == "call_function" and one.target is not two.target):
            raise NotAVariant(f"{_place(base, one)}: found {two.name}, expected {one.name}")
        yield from _matched(base, one, (one.args, one.kwargs), (two.args, two.kwargs))
        return
    if type(left) is not type(right):
        found, expected = type(right).__name__, type(left).__name__
        raise NotAVariant(f"{_place(base, one)}: found {found}, expected {expected}")
    shaped = isinstance(left, (ops.Reshape, ops.Expand)) and _same_sizes(left.out, right.out)
    for field in left.field_names() - ({"shape"} if shaped else set()):
        yield from _matched(base, one, getattr(left, field), getattr(right, field))


def _matched(base: Graph, where: fx.Node, one: Any, two: Any) -> Iterator[Any]:
    one = one.node if isinstance(one, Value) else one
    two = two.node if isinstance(two, Value) else two
    if isinstance(one, fx.Node) and isinstance(two, fx.Node):
        yield one, two
    elif isinstance(one, (tuple, list)) and isinstance(two, (tuple, list)) and len(one) == len(two):
        for a, b in zip(one, two, strict=True):
            yield from _matched(base, where, a, b)
    elif isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        for key in one:
            yield from _matched(base, where, one[key], two[key])
    elif not (_absent(one, two) or _absent(two, one) or str(one) == str(two)):
        raise NotAVariant(f"{_place(base, where)}: found {two}, expected {one}")


def _same_sizes(one: Value, two: Value) -> bool:
    """Whether two values have equal sizes, dynamic ones in the same places."""
    fixed = [[size if isinstance(size, int) else None for size in v.shape] for v in (one, two)]
    return fixed[0] == fixed[1]


def _absent(one: Any, two: Any) -> bool:
    """Whether a constant stands where the other has none: a bias, for example."""
    return one is None and isinstance(two, fx.Node) and two.meta.get("constant", False)


def _place(graph: Graph, node: fx.Node) -> str:
    return graph.where(node) or node.name


# -- one graph of many --------------------------------------------------------------------------


def combine(base: Graph, others: Sequence[Graph], target: Target, name: str) -> int:
    """Give `base` another input, the integers `name` `[batch]`: row t is computed as `others[i]`
    would for i = `name[t]`, and as `base` would for -1. Returns how many ops depend on it.

    `base` is changed, `others` are not.

    Raises:
        NotAVariant: if the graphs differ in more than what rows can choose.
    """
    pairs = [align(base, other) for other in others]
    ids = base.add_input(name, torch.int64, _batch(base))
    router, routed = _Router(base, others, target, ids), 0
    for node in base.calls:
        if node not in pairs[0] or base.is_constant(node):
            continue
        builder = Builder(base, node)
        graphs = zip(others, pairs, strict=True)
        twins = [Builder(graph, found[node]).view(found[node]) for graph, found in graphs]
        op = builder.view(node)
        if op is None:
            router.require_shared(node, [found[node] for found in pairs])
        elif fields := router.differing(op, twins):
            users = list(node.users)
            new = router.routed(builder, op, twins, fields)
            for user in users:
                user.replace_input_with(node, new.node)
            routed += 1
    base.eliminate_dead_code()
    base.drop_unread_states()
    return routed


def _batch(graph: Graph) -> Any:
    """The size of the first axis of the first tensor input."""
    for node in graph.inputs:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.ndim:
            return value.shape[0]
    raise NotAVariant("no input has rows")


class _Router:
    """Emits the ops that look up what the row's variant has. Tables have a row per variant, the
    first of them that of the base."""

    def __init__(self, base: Graph, others: Sequence[Graph], target: Target, ids: fx.Node) -> None:
        self.graph, self.target, self.ids = base, target, ids
        self.evaluators = [Evaluator(one, limit=KEPT) for one in (base, *others)]
        self._head = base.calls[0]
        self._indices: dict[int, fx.Node] = {}

    # -- what differs -----------------------------------------------------------------------------

    def differing(self, op: Op, twins: Sequence[Any]) -> dict[str, list[Tensor | None]]:
        """The fields in which variants differ, with their values in float64."""
        found = {}
        for field in op.field_names():
            operands = [getattr(one, field) for one in (op, *twins)]
            if not all(map(_is_parameter, operands)) or operands.count(None) == len(operands):
                continue
            if all(isinstance(one, Value) for one in operands) and self._same_states(operands):
                continue
            values = [self.value(i, one) for i, one in enumerate(operands)]
            if any(not _equal(values[0], one) for one in values[1:]):
                found[field] = values
        return found

    def value(self, variant: int, operand: Any) -> Tensor | None:
        if operand is None or not isinstance(operand, Value):
            return None if operand is None else torch.tensor(operand, dtype=torch.float64)
        found = self.evaluators[variant].evaluate(operand.node)
        return found if isinstance(found, Tensor) else torch.tensor(found)

    def _same_states(self, operands: Sequence[Value]) -> bool:
        """Whether all are the very same memory."""
        nodes = [one.node for one in operands]
        if any(node.op != "get_attr" for node in nodes):
            return False
        graphs = [one.builder.graph for one in operands]
        states = [
            graph.states[str(n.target)].tensor for graph, n in zip(graphs, nodes, strict=True)
        ]
        return len({(one.data_ptr(), one.shape, one.stride()) for one in states}) == 1

    def require_shared(self, node: fx.Node, twins: Sequence[fx.Node]) -> None:
        """An op that graphopt does not know must read the same constants in all variants."""
        for position, read in enumerate(node.all_input_nodes):
            if not self.graph.is_constant(read):
                continue
            values = [self.evaluators[0].evaluate(read)]
            values += [
                evaluator.evaluate(twin.all_input_nodes[position])
                for evaluator, twin in zip(self.evaluators[1:], twins, strict=True)
            ]
            if any(not torch.equal(values[0], one) for one in values[1:]):
                raise NotAVariant(f"{_place(self.graph, node)}: rows cannot choose for {node.name}")

    # -- routing ----------------------------------------------------------------------------------

    def routed(
        self, builder: Builder, op: Any, twins: Sequence[Any], fields: dict[str, Any]
    ) -> Value:
        """`op`, with what its variants differ in looked up row by row."""
        if isinstance(op, ops.Binary) and len(fields) == 1:
            return self._binary(builder, op, fields)
        if isinstance(op, (ops.LayerNorm, ops.RMSNorm)) and fields.keys() <= {"weight", "bias"}:
            return self._norm(builder, op, fields)
        plain = not isinstance(op, ops.Conv) or (op.groups == 1 and not op.transposed)
        if isinstance(op, (ops.Linear, ops.Conv, ops.Embedding)):
            if fields.keys() == {"bias"}:
                return self._shifted(
                    builder, builder.emit(op.replace(bias=None), like=op), op, fields
                )
            if plain and fields.keys() <= {"weight", "bias"}:
                return self._map(builder, op, twins, fields)
        raise self._refusal(op, f"{type(op).__name__} with another {' and '.join(sorted(fields))}")

    def _refusal(self, op: Op, what: str) -> NotAVariant:
        return NotAVariant(f"{_place(self.graph, op.out.node)}: rows cannot choose {what}")

    def _binary(self, builder: Builder, op: ops.Binary, fields: dict[str, Any]) -> Value:
        ((field, values),) = fields.items()
        shape = torch.broadcast_shapes(*(one.shape for one in values))  # type: ignore[no-untyped-call]
        table = torch.stack([one.expand(shape) for one in values])
        if table.ndim > op.out.ndim:
            if table.shape[1] != 1:
                raise self._refusal(op, "what differs from row to row already")
            table = table.squeeze(1)
        return builder.emit(
            op.replace(**{field: self._found(builder, table, op.out, op, field)}), like=op
        )

    def _norm(self, builder: Builder, op: Any, fields: dict[str, Any]) -> Value:
        """The norm without its scale and shift, which then follow it."""
        names = [name for name in ("weight", "bias") if name in op.field_names()]
        out = builder.emit(op.replace(**dict.fromkeys(names)), like=op)
        for name, kind, fill in zip(names, (ops.Mul, ops.Add), (1.0, 0.0), strict=False):
            operand = getattr(op, name)
            if name in fields:
                none = torch.full(tuple(op.normalized_shape), fill, dtype=torch.float64)
                table = torch.stack([none if one is None else one for one in fields[name]])
                operand = self._found(builder, table, out, op, name)
            if operand is not None:
                out = builder.emit(kind(out, operand))
        return out

    def _map(
        self, builder: Builder, op: Any, twins: Sequence[Any], fields: dict[str, Any]
    ) -> Value:
        """A linear map, a convolution or a table with a weight of its own for every row."""
        weights, table = fields["weight"], isinstance(op, ops.Embedding)
        found = [
            Parts.of(evaluator, one.weight, weights[0])
            for evaluator, one in zip(self.evaluators, (op, *twins), strict=True)
        ]
        parts = [one.transposed() if table else one for one in found if one is not None]
        rows, columns = _stack(parts, "rows"), _stack(parts, "columns")
        if len(parts) < len(found) or (table and columns is not None):
            return self._shifted(builder, self._whole(builder, op, weights), op, fields)
        base = op
        if columns is not None:
            factor = self._found(builder, _channels(op, columns), op.input, op, "columns")
            base = dataclasses.replace(op, input=builder.emit(ops.Mul(op.input, factor)))
        late = "bias" in fields or rows is not None
        out = builder.emit(
            base.replace(bias=None) if late and not table else base.replace(), like=op
        )
        if any(one.rank for one in parts):
            out = builder.emit(ops.Add(out, self._low_rank(builder, base, parts)))
        if rows is not None:
            factor = self._found(builder, _channels(op, rows), out, op, "rows")
            out = builder.emit(ops.Mul(out, factor))
        return self._shifted(builder, out, op, fields) if late and not table else out

    def _shifted(self, builder: Builder, out: Value, op: Any, fields: dict[str, Any]) -> Value:
        """`out` and the bias, of every row or of all."""
        biases = fields.get("bias")
        if biases is None:
            bias = getattr(op, "bias", None)
            if bias is None:
                return out
            shape = (-1, *(1,) * op.rank) if isinstance(op, ops.Conv) else (-1,)
            return builder.emit(ops.Add(out, bias.reshape(*shape)))
        size = next(one for one in biases if one is not None)
        values = torch.stack([torch.zeros_like(size) if one is None else one for one in biases])
        found = self._found(builder, _channels(op, values), out, op, "bias")
        return builder.emit(ops.Add(out, found))

    def _low_rank(self, builder: Builder, op: Any, parts: Sequence[Parts]) -> Value:
        """B_i A_i x: either all A at once, of which a mask leaves the row's own, and all B at once;
        or a product by matrices that are looked up, where that is faster."""
        since = len(builder.made)
        masked = self._masked(builder, op, parts)
        if not isinstance(op, ops.Linear):
            return masked
        first, between = self._seconds(builder, since), len(builder.made)
        found = self._by_row(builder, op, parts)
        if self._seconds(builder, between) < first:
            return found
        builder.rollback(between)
        return masked

    def _seconds(self, builder: Builder, since: int) -> float:
        views = map(builder.view, builder.made[since:])
        return sum(self.target.seconds(one) for one in views if one is not None)

    def _masked(self, builder: Builder, op: Any, parts: Sequence[Parts]) -> Value:
        ranks = torch.tensor([one.rank for one in parts])
        variants = torch.arange(len(parts))
        own = (variants[:, None] == variants.repeat_interleave(ranks)).double()
        right = torch.cat([one.right for one in parts])
        left = torch.cat([one.left for one in parts], 1)
        if isinstance(op, ops.Embedding):
            weight = self._state(builder, right.T, op.out.dtype, op, "right")
            inner = builder.emit(op.replace(weight=weight))
        else:
            shaped = right.reshape(len(right), *op.weight.shape[1:])
            weight = self._state(builder, shaped, op.out.dtype, op, "right")
            inner = builder.emit(op.replace(weight=weight, bias=None))
        mask = self._found(builder, _channels(op, own), inner, op, "own")
        inner = builder.emit(ops.Mul(inner, mask))
        if isinstance(op, ops.Conv):
            ones = (1,) * op.rank
            weight = self._state(
                builder, left.reshape(*left.shape, *ones), op.out.dtype, op, "left"
            )
            return builder.emit(ops.Conv(inner, weight, None, ones, (0,) * op.rank, ones))
        return builder.emit(ops.Linear(inner, self._state(builder, left, op.out.dtype, op, "left")))

    def _by_row(self, builder: Builder, op: Any, parts: Sequence[Parts]) -> Value:
        rank = max(one.rank for one in parts)
        right = torch.stack([_padded(one.right.T, rank) for one in parts])
        left = torch.stack([_padded(one.left, rank) for one in parts]).mT
        inner = self._product(builder, op, op.input, right, "right")
        return self._product(builder, op, inner, left, "left")

    def _product(self, builder: Builder, op: Any, x: Value, table: Tensor, name: str) -> Value:
        """`x` times the matrix `table[i]` `[in, out]` of its row's variant."""
        flat = x.ndim == 2
        if flat:
            x = x.reshape(-1, 1, x.shape[1])
        out = builder.emit(ops.Matmul(x, self._found(builder, table, x, op, name)))
        return out.reshape(-1, table.shape[-1]) if flat else out

    def _whole(self, builder: Builder, op: Any, weights: Sequence[Any]) -> Value:
        """A weight for every variant, where they have nothing in common."""
        if isinstance(op, ops.Linear):
            return self._product(builder, op, op.input, torch.stack(list(weights)).mT, "weights")
        raise self._refusal(op, f"{type(op).__name__} weights that differ by more than a low rank")

    # -- tables -----------------------------------------------------------------------------------

    def _found(self, builder: Builder, table: Tensor, beside: Value, op: Op, name: str) -> Value:
        """`table[i]` for every row, in a shape that goes with `beside`."""
        state = self._state(builder, table, beside.dtype, op, name)
        found = builder.emit(ops.IndexSelect(state, 0, self._rows(builder, beside, op)))
        ones = (1,) * (beside.ndim - table.ndim)
        return found.reshape(-1, *ones, *table.shape[1:]) if ones else found

    def _rows(self, builder: Builder, beside: Value, op: Op) -> Value:
        """The row of the tables for every entry of the first axis of `beside`."""
        times = _quotient(beside.shape[0], self.ids.meta["val"].shape[0])
        if times is None:
            raise self._refusal(op, "where the first axis does not run over rows")
        if times not in self._indices:
            first = Builder(self.graph, self._head)
            rows = first.emit(ops.Add(first.value(self.ids), 1))
            if times > 1:
                rows = first.emit(ops.RepeatInterleave(rows, times, 0))
            self._indices[times] = rows.node
        return builder.value(self._indices[times])

    def _state(
        self, builder: Builder, value: Tensor, dtype: torch.dtype, op: Op, name: str
    ) -> Value:
        device = op.out.meta.device
        rounded = torch.nn.Parameter(value.to(device, dtype).contiguous(), requires_grad=False)
        place = f"{self.graph.where(op.out.node)}.variants_{name}".lstrip(".")
        exact = partial(torch.Tensor.detach, value.to(device).contiguous())
        return builder.value(self.graph.add_state(place, State(rounded, "parameter", exact=exact)))


def _is_parameter(operand: Any) -> bool:
    if isinstance(operand, Value):
        return operand.is_constant
    return operand is None or (isinstance(operand, (int, float)) and not isinstance(operand, bool))


def _equal(one: Tensor | None, two: Tensor | None) -> bool:
    if one is None or two is None:
        return one is two
    return torch.equal(one, two)


def _quotient(size: Any, batch: Any) -> int | None:
    """How many times `batch` a size is; None if that is not known."""
    if isinstance(size, int) and isinstance(batch, int):
        return size // batch if batch and size % batch == 0 else None
    if isinstance(size, int) or isinstance(batch, int):
        return None
    found = size.node.expr / batch.node.expr
    return int(found) if found.is_Integer and found > 0 else None


def _channels(op: Any, table: Tensor) -> Tensor:
    """`[variants, channels]`, laid out to go with the input or the output of a map."""
    return table.reshape(*table.shape, *(1,) * op.rank) if isinstance(op, ops.Conv) else table


def _stack(parts: Sequence[Parts], name: str) -> Tensor | None:
    """The scales of all variants, or None where all are ones."""
    found = torch.stack([getattr(one, name) for one in parts])
    return None if bool((found == 1).all()) else found


def _padded(matrix: Tensor, rank: int) -> Tensor:
    return torch.nn.functional.pad(matrix, (0, rank - matrix.shape[1]))


# -- a weight beside another one ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Parts:
    """`diag(rows) (W + left @ right) diag(columns)` for a given W `[out, in, *kernel]`, in float64.

    `rows` `[out]`, `columns` `[in]`, `left` `[out, rank]`, `right` `[rank, in * kernel]`.
    """

    rows: Tensor
    columns: Tensor
    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def transposed(self) -> Parts:
        return Parts(self.columns, self.rows, self.right.mT, self.left.mT)

    @classmethod
    def of(cls, evaluator: Evaluator, weight: Value, base: Tensor) -> Parts | None:
        """The parts of a weight expression beside the value `base`; None if it has none."""
        for rows, columns, inner in reversed(list(_scales(evaluator, weight))):
            if inner.shape == base.shape:
                allowed = NOISE * float(inner.norm() + base.norm())
                if (factors := low_rank((inner - base).flatten(1), allowed)) is not None:
                    return cls(rows, columns, *factors)
        return None


def _scales(evaluator: Evaluator, weight: Value) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(rows, columns, inner) for ever more scales of rows and columns taken off a weight."""
    shape = weight.shape
    rows = torch.ones(shape[0], dtype=torch.float64)
    columns = torch.ones(shape[1], dtype=torch.float64)
    while True:
        yield rows, columns, evaluator.evaluate(weight.node)
        while isinstance(weight.op, ops.Cast):
            weight = weight.op.input
        op = weight.op
        if not isinstance(op, (ops.Mul, ops.Div)):
            return
        sides = [(op.left, op.right)] + [(op.right, op.left)] * isinstance(op, ops.Mul)
        for inner, factor in sides:
            if not isinstance(inner, Value) or inner.shape != shape:
                continue
            value = torch.as_tensor(
                evaluator.evaluate(factor.node) if isinstance(factor, Value) else factor,
                dtype=torch.float64,
            )
            value = 1 / value if isinstance(op, ops.Div) else value
            value = value.reshape((1,) * (len(shape) - value.ndim) + tuple(value.shape))
            if value.numel() == value.shape[0]:
                rows = rows * value.flatten()
            elif value.numel() == value.shape[1]:
                columns = columns * value.flatten()
            else:
                continue
            weight = inner
            break
        else:
            return


def low_rank(matrix: Tensor, allowed: float) -> tuple[Tensor, Tensor] | None:
    """`left` `[m, rank]` and `right` `[rank, n]` whose product is `matrix` `[m, n]` but for `allowed`
    in the 2-norm, where they are smaller than it; else None.

    By random projection: Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.1.
    """
    m, n = matrix.shape
    if float(matrix.norm()) <= allowed:
        return matrix.new_zeros(m, 0), matrix.new_zeros(0, n)
    limit, size = m * n // (m + n), 8
    generator = torch.Generator().manual_seed(0)
    while size // 4 < limit:
        size = min(4 * size, m, n)
        draws = torch.randn(n, size, generator=generator, dtype=matrix.dtype)
        basis = torch.linalg.qr(matrix @ draws.to(matrix.device)).Q
        core = basis.mT @ matrix
        if float((matrix - basis @ core).norm()) <= allowed:
            left, values, right = torch.linalg.svd(core, full_matrices=False)
            rank = int((values > allowed).sum())
            root = values[:rank].sqrt()
            found = (basis @ left[:, :rank] * root, root[:, None] * right[:rank])
            return found if rank <= limit else None
        if size == min(m, n):
            break
    return None
