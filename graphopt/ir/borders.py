"""What a zero-padded border sees of a constant: two ways to add it where real pixels are read.

W pad(x + c)  =  W pad(x) + map,  map = W pad(c)         a map over the output positions
W pad(x + c)  =  [W, W c] pad([x, 1])                    a channel of ones
"""

from __future__ import annotations

from graphopt.ir import ops
from graphopt.ir.ops import widen
from graphopt.ir.rewrite import Rewriter, describe
from graphopt.ir.value import Value


def bias_map(conv: ops.Conv, constant: Value, rw: Rewriter) -> Value:
    """What `conv` (without bias) makes of an input that is `constant[i]` at every real pixel of
    channel i, borders included: `[1, O, *out_spatial]`, or without samples as `conv` is."""
    spatial = conv.input.shape[conv.channel_axis + 1 :]
    rw.require(
        all(isinstance(size, int) for size in spatial),
        f"{describe(conv.out)} pads with zeros and its spatial size is dynamic",
    )
    samples, ones = (1,) * conv.channel_axis, (1,) * len(spatial)
    if conv.transposed:
        image = constant.reshape(*samples, conv.in_channels, *ones)
        image = image.expand(*samples, conv.in_channels, *spatial)
        response = ops.Conv(
            image, widen(conv.weight, image), None, conv.stride, conv.padding, conv.dilation,
            conv.groups, True, conv.output_padding,
        )  # fmt: skip
    else:
        kernel = conv.response_kernel(constant)
        device = kernel.meta.device
        image = rw.emit(ops.Full((*samples, 1, *spatial), 1.0, kernel.dtype, device))
        response = ops.Conv(image, kernel, None, conv.stride, conv.padding, conv.dilation)
    return rw.emit(response).to(conv.out.dtype)


def ones_channel(conv: ops.Conv, kernel: Value, rw: Rewriter) -> ops.Conv:
    """`conv` with a channel of ones behind its input, and `kernel` `[O, 1, *kernel]` to read it."""
    rw.require(conv.groups == 1, f"{describe(conv.out)} has a channel of ones for each group")
    image = rw.emit(ops.Pad(conv.input, (0, 0) * conv.rank + (0, 1), "constant", 1.0))
    weight = rw.emit(ops.Cat((conv.weight, kernel.to(conv.weight.dtype)), 1))
    return conv.replace(input=image, weight=weight)
