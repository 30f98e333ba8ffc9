"""Training that ends with channels at exactly zero, so that removing them needs no fine-tuning; and
norms and attentions that are replaced while the model trains.

groups = graphopt.channel_groups(model.eval(), (x,))
optimizer = DHSPG(groups, model.train(), lr=0.1, target_sparsity=0.5, start_step=1000, ramp_steps=4000)
"""

from graphopt.training.branches import Branch, find_branches
from graphopt.training.groups import (
    ParameterGroups,
    TrainingError,
    branch_groups,
    zero_invariant_groups,
)
from graphopt.training.lasso import GroupLasso
from graphopt.training.optimizers import DHSPG, H2SPG
from graphopt.training.swaps import (
    SwapError,
    SwapReport,
    Swaps,
    swap,
    swap_attention,
    swap_norm,
)

__all__ = [
    "DHSPG",
    "H2SPG",
    "Branch",
    "GroupLasso",
    "ParameterGroups",
    "SwapError",
    "SwapReport",
    "Swaps",
    "TrainingError",
    "branch_groups",
    "find_branches",
    "swap",
    "swap_attention",
    "swap_norm",
    "zero_invariant_groups",
]
