"""New values of what stays, which bring the output nearer to that of the model with all its channels.

A linear map reads channels x_i, `y = sum_i W_i x_i + b`, where W_i is a column of a matrix or the kernels
of one input channel. Every channel is written as a combination of those that stay, the kept ones:

    x_i ~ sum_k M_ik x_k     =>     y ~ sum_k W'_k x_k + b,     W'_k = sum_i W_i M_ik

whatever the kernel, stride and padding are. Plain removal has M_ik = 1 where i = k, 0 elsewhere.

    least-squares      M from activations, map after map, on what is left of the data there; what a tap of a
                       kernel sees of a channel counts as a channel
    bias-correction    M of plain removal; the mean of y restored by b
    constants          M of plain removal; channels that do not depend on the input go into b, exactly
    data-free          M from the parameters that write the channels
    optimal-transport  M from a transport plan between these parameters, which are fused by the same plan

A function of `RECONSTRUCTION` returns new values of whole states by name: `remove` cuts them like the old
ones, and what is cut away does not matter. Weights that are derived from others stay as they are, and
products of activations have no weight to put a combination in. `untouched` names the maps that data
cannot correct, or not in the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import Tensor

from graphopt.passes.pruning.constants import constants
from graphopt.passes.pruning.evidence import Evidence
from graphopt.passes.pruning.from_data import bias_correction, least_squares
from graphopt.passes.pruning.from_parameters import data_free, optimal_transport

Reconstruction = Callable[[Evidence, Collection[int]], dict[str, Tensor]]

RECONSTRUCTION: dict[str, Reconstruction] = {
    "least-squares": least_squares,
    "bias-correction": bias_correction,
    "constants": constants,
    "data-free": data_free,
    "optimal-transport": optimal_transport,
}
