"""What every affine op does to tokens; the rules are in `arithmetic` and `movement`."""

from graphopt.ir.tokens import arithmetic as arithmetic, movement as movement
from graphopt.ir.tokens.arithmetic import pixelwise as pixelwise
from graphopt.ir.tokens.core import (
    INSIDE as INSIDE,
    Axis as Axis,
    Labels as Labels,
    Step as Step,
    Tokens as Tokens,
    is_full as is_full,
    scaled as scaled,
    shaped as shaped,
    step as step,
    times as times,
)

AFFINE = tuple(cls for cls in step.registry if cls is not object)
