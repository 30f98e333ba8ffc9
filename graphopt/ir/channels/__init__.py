"""Channel groups: which entries of which axes have to be removed together.

Every axis of every value carries labels, one for each entry: an entry goes away when any of its labels
does. Parameters bring new labels; data movement is executed on them; arithmetic couples the labels of
entries that meet; what is not understood fixes the labels of all it reads. Labels that are coupled, in
any number of steps, are one group. A fixed label never goes away.
"""

from graphopt.ir.channels import (  # they register themselves
    gradients as gradients,
    named as named,
    rules as rules,
)
from graphopt.ir.channels.groups import Group, Groups, find_groups
from graphopt.ir.channels.labels import Labels

__all__ = ["Group", "Groups", "Labels", "find_groups"]
