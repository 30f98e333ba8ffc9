"""Normalizations and attentions that are replaced while the model trains.

swapped = graphopt.swap_norm(model, (x,), to="prepbn", steps=10_000)
...  # the training loop
fast = graphopt.optimize(swapped.eval(), (x,))
"""

from graphopt.training.swaps.schedule import SwapReport as SwapReport, Swaps as Swaps
from graphopt.training.swaps.swapping import (
    SwapError as SwapError,
    swap as swap,
    swap_attention as swap_attention,
    swap_norm as swap_norm,
)
