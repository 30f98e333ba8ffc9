"""Numbers and vectors next to linear layers: linear(c x) + b = c linear(x) + b = ..."""

import torch.nn.functional as F

from graphopt import RewritePass, rewrite, rewrite_from
from graphopt.ir import ops


@rewrite
def pull_out_factor(product: ops.Linear, rw):
    """linear(c x) = c linear(x) without bias, for a number c."""
    scaled = rw.producer(product.input, ops.Mul)
    rw.match(isinstance(scaled.right, float))
    rw.require(product.bias is None, "the bias would be scaled too")
    rw.require(rw.only_user(scaled, product), "the scaled input is used elsewhere")
    return rw.emit_like(product, input=scaled.left) * scaled.right


def take_in_bias(x, w, b):
    """linear(x) + b = linear(x) with bias b."""
    return F.linear(x, w) + b


def with_bias(x, w, b):
    return F.linear(x, w, b)


class TidyLinear(RewritePass):
    """Added vectors become biases, factors of inputs become factors of outputs."""

    name = "tidy-linear"
    rewrites = (
        pull_out_factor,
        rewrite_from(
            take_in_bias, with_bias, require={"no vector is added": lambda b: b.ndim == 1}
        ),
    )
