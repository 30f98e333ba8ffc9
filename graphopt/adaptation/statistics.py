"""Statistics of a batch norm on target data: pooled over batches, mixed with those of the source.

Inputs are [N, C, *]; statistics of a channel are [C], of an instance and channel [N, C]. Source of
the mixture: Schneider et al. (arXiv 2006.16971).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Statistics = tuple[Tensor, Tensor]  # mean and variance


def wide(x: Tensor) -> Tensor:
    """The values in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def per_channel(x: Tensor) -> int:
    """The number of values per channel."""
    return x.numel() // x.shape[1]


def of_batch(x: Tensor, unbiased: bool) -> Statistics:
    """Mean and variance per channel."""
    axes = (0, *range(2, x.ndim))
    return x.mean(axes), x.var(axes, correction=int(unbiased))


def of_instances(x: Tensor, unbiased: bool) -> Statistics:
    """Mean and variance per instance and channel, over its positions."""
    axes = tuple(range(2, x.ndim))
    return x.mean(axes), x.var(axes, correction=int(unbiased))


def pooled(batches: Sequence[Tensor], unbiased: bool) -> Statistics:
    """Mean and variance per channel of all batches together, of whatever sizes.

    `mean_b(var_b) + var_b(mu_b)`, batches weighted by their numbers of values (AdaBN, arXiv
    1603.04779). An average of variances alone lacks the second term.
    """
    counts = [per_channel(one) for one in batches]
    total = sum(counts)
    parts = [of_batch(wide(one), unbiased=False) for one in batches]
    mean = torch.stack([m * (n / total) for n, (m, _) in zip(counts, parts, strict=True)]).sum(0)
    var = torch.stack([
        (v + (m - mean).square()) * (n / total) for n, (m, v) in zip(counts, parts, strict=True)
    ]).sum(0)  # fmt: skip
    return mean, var * (total / (total - 1)) if unbiased else var


def mixed(source: Statistics, target: Statistics, share: float | Tensor) -> Statistics:
    """`(1 - share) * source + share * target`, mean and variance alike."""
    mean, var = (
        (1 - share) * wide(a) + share * wide(b) for a, b in zip(source, target, strict=True)
    )
    return mean, var


def source_shares(instances: Statistics, source: Statistics, target: Statistics) -> Tensor:
    """AdaMixBN's lambda of every instance, [N]: how much it belongs to the source.

    `clip(1 - d(t, s) / (d(t, s) + d(i, s) + d(i, t)), 0, 1)` with d the mean over channels of the
    squared differences of means and of standard deviations (DomainAdaptor, arXiv 2308.10297; all
    variances unbiased). 1 where source and target are the same.
    """

    def apart(a: Statistics, b: Statistics) -> Tensor:
        means, deviations = a[0] - b[0], a[1].sqrt() - b[1].sqrt()
        return means.square().mean(-1) + deviations.square().mean(-1)

    between = apart(target, source)
    total = between + apart(instances, source) + apart(instances, target)
    return (1 - between / total.clamp(min=torch.finfo(total.dtype).tiny)).clamp(0, 1)
