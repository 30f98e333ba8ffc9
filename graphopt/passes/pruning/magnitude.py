"""Importance from parameters alone."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from graphopt.ir import ops
from graphopt.ir.interpret import Evaluator
from graphopt.passes.pruning.evidence import Evidence, Scores, add_along

_NORMS = (ops.BatchNorm, ops.InstanceNorm, ops.GroupNorm, ops.LayerNorm, ops.RMSNorm)


def l2(evidence: Evidence) -> Scores:
    """The norm of all parameters of a group (Li et al., arXiv 1608.08710, over the whole group)."""
    return np.sqrt(evidence.measured(torch.square))


def l1(evidence: Evidence) -> Scores:
    """The sum of the magnitudes of all parameters of a group (arXiv 1608.08710)."""
    return evidence.measured(torch.abs)


def random(evidence: Evidence) -> Scores:
    """The same draw for the same seed."""
    return np.random.default_rng(evidence.seed).random(len(evidence.zeros()))


def batch_norm_scale(evidence: Evidence) -> Scores:
    """The mean of |gamma| over the normalizations of a group (Network Slimming, arXiv 1708.06519).

    Layer, group, instance and RMS norms count as batch norms do. Groups without any: `completed`.
    """
    total, count = evidence.zeros(), evidence.zeros()
    builder, known = evidence.groups.trace.builder, Evaluator(evidence.graph)
    for node in evidence.graph.calls:
        op = builder.view(node)
        weight = op.weight if isinstance(op, _NORMS) else None
        if weight is None or not weight.is_constant:
            continue
        gamma = known.evaluate(weight.node).abs()
        for axis, layers in evidence.channels(weight.node).items():
            add_along(total, layers, gamma, axis)
            add_along(count, layers, torch.ones_like(gamma), axis)
    return completed(evidence, total / np.maximum(count, 1), count > 0)


def completed(evidence: Evidence, scores: Scores, known: NDArray[np.bool_]) -> Scores:
    """Scores for all groups: those that are not known are the norms of their parameters (`l2`), in
    the unit that gives norms and scores the same mean over the groups that are known."""
    norms = l2(evidence)
    both = known & (norms > 0)
    unit = scores[both].mean() / norms[both].mean() if both.any() else 1.0
    return np.where(known, scores, (unit or 1.0) * norms)
