"""The index notation of each op: the output's sizes and its entry at an index.

`sizes(op)` and `entry(op, at, reader)` are tables by op view, as the affine laws are. An op without
an entry is an unknown function: equal operands and options give equal results, nothing more is
known. This table is what a proof trusts; tests/verify/test_notation.py holds it against torch.
"""

from graphopt.verify.proof.notation import (
    affine as affine,
    movement as movement,
    norm as norm,
    pointwise as pointwise,
    reduce as reduce,
)
from graphopt.verify.proof.notation.base import (
    Index as Index,
    Reader as Reader,
    ShapeError as ShapeError,
    Sizes as Sizes,
    entry as entry,
    literally as literally,
    sizes as sizes,
    unknown as unknown,
)
from graphopt.verify.proof.notation.movement import ravel as ravel, unravel as unravel
