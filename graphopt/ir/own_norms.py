"""Norms of several values, each with parameters of its own, as one product and one sum.

    stack(norm_1(x_1), ..., norm_n(x_n))  =  s x + b        x [n, rows, C, ...], s and b [n, 1, C, 1, ...]

with s_t = weight_t / sqrt(var_t + eps) and b_t = bias_t - mean_t s_t: eval-mode batch norms, as a network
has them whose time steps are normalized apart (BNTT, arXiv 2010.01729). The parameters are stacked, and
stay those that they were.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from graphopt.ir import ops
from graphopt.ir.many import Many, Slot, slots
from graphopt.ir.ops.base import Op
from graphopt.ir.rows import Data, Form, Found, form
from graphopt.ir.value import Value


@dataclasses.dataclass(frozen=True)
class OwnNorms(Form):
    """A batch norm applied to values one after the other, its parameters too."""

    def emit(self, op: Op, data: Mapping[Slot, Many]) -> Many:
        assert isinstance(op, ops.BatchNorm)
        x = data["input", 0]
        params = {name: one.stacked() for (name, _), one in data.items() if name != "input"}
        scale, shift = op.replace(**params).scale_and_shift()
        shape = (x.count, 1, op.input.shape[1], *(1,) * (op.input.ndim - 2))
        value = x.stacked() * scale.reshape(*shape) + shift.reshape(*shape)
        return Many(value.to(op.out.dtype), x.count, False)

    def is_free(self, values: Sequence[Value]) -> bool:
        return all(one.is_constant for one in values) or super().is_free(values)


def own(op: Op) -> Data:
    """The parameters of an op that may be others in each of its siblings."""
    if not isinstance(op, ops.BatchNorm) or op.uses_batch_statistics:
        return frozenset()
    given = {slot: one for slot, one in slots(op).items() if slot != ("input", 0)}
    return frozenset(given) if all(one.is_constant for one in given.values()) else frozenset()


def form_of(op: Op, data: Data) -> Found:
    """As `form`, with parameters among the data if they are `own`."""
    own_data = own(op)
    if own_data and own_data < data:
        assert isinstance(op, ops.BatchNorm)
        return OwnNorms(False) if isinstance(op.input.shape[1], int) else ""
    return form(op, data)
