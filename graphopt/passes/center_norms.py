"""Layer norms become RMS norms where what they read can do without its mean.

    norm(x) = rms(C x),    C = I - 1 1^T / d,    with the same eps

The mean leaves the weights that write into the stream (see `graphopt.ir.streams`) rather than every token
at every norm: a reduction and a pass over the data less for each norm, and no map costs more.
"""

from __future__ import annotations

import dataclasses

from graphopt.ir import ops
from graphopt.ir.driver import Session
from graphopt.ir.rewrite import Rewriter, describe, rewrite
from graphopt.ir.streams import centred, stream
from graphopt.ir.value import Value
from graphopt.passes.base import RewritePass


@rewrite
def center_stream(norm: ops.LayerNorm, rw: Rewriter) -> Value:
    """Layer norms that read one stream are RMS norms of the stream without its mean."""
    rw.match(len(norm.normalized_shape) == 1)
    found = stream(rw, norm)
    rw.match(found.norms[-1].out == norm.out)  # the others come before it
    rw.require(
        any(one.bias is None for one in found.norms),
        f"{describe(norm.out)} keeps its shift, and an RMS norm that shifts is two ops",
    )
    new = centred(rw, found)
    norms = [_centred_norm(rw, one, new[one.input]) for one in found.norms]
    rw.pays([*found.ops, *found.norms], *norms)
    for one, by in zip(found.norms[:-1], norms[:-1], strict=True):
        rw.replace(one.out, by)
    return norms[-1]


def _centred_norm(rw: Rewriter, norm: ops.LayerNorm, value: Value) -> Value:
    """A layer norm of a value without mean: it may also stay what it is."""
    if norm.bias is not None:
        return rw.emit_like(norm, input=value)
    return rw.emit(ops.RMSNorm(value, norm.normalized_shape, norm.weight, norm.eps), like=norm)


@dataclasses.dataclass(frozen=True)
class CenterNorms(RewritePass):
    """Layer norms over centred streams become RMS norms."""

    name = "center-norms"
    rewrites = (center_stream,)

    def run(self, session: Session) -> None:
        session.run(self.rewrites, last_first=True)
