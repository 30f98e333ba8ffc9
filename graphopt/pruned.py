"""prune_module(): the user's own nn.Module with fewer channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from graphopt.ir.distance import relative_error
from graphopt.ir.inputs import as_call
from graphopt.ir.source import clone_inputs, copy_module
from graphopt.module import OptimizedModule
from graphopt.optimize import optimize
from graphopt.passes.prune import Prune


class NotExpressible(ValueError):
    """The pruned model cannot be written as the module that it came from."""


def prune_module(
    model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None = None, **options: Any
) -> nn.Module:
    """A pruned copy of `model`, made of modules of the same classes.

    Parameters and buffers are cut, and the sizes that the layers of `torch.nn` keep (`out_channels`,
    `num_features`, `normalized_shape`, `groups`, ...) are set anew. The copy is accepted only if it
    computes what the pruned graph does.

    Args:
        model: any nn.Module that is captured as one graph; it is not changed.
        args, kwargs: example inputs, as for `graphopt.optimize`.
        options: those of the pass `prune`.

    Raises:
        NotExpressible: if nothing may be pruned, or the code of the model has a size of its own that
            does not fit any more; `graphopt.optimize` prunes these as a graph, and `protect` leaves
            some of their parameters alone.
        PassError: for impossible options.
    """
    args, kwargs = as_call(args, kwargs)
    call = args or (), dict(kwargs or {})
    result = optimize(model, *call, passes=[Prune(**options)])
    if not result.report.applied:
        records = [*result.report.rolled_back, *result.report.refused]
        raise NotExpressible("; ".join(one.reason for one in records) or "no channels may go")
    small = copy_module(model)
    states: dict[str, Tensor] = {**dict(result.named_parameters()), **dict(result.named_buffers())}
    shared: dict[int, Tensor] = {}
    for path, module in small.named_modules():
        _resize(path, module, states, shared)
    _check(small, result, call)
    return small


def _resize(
    path: str, module: nn.Module, states: Mapping[str, Tensor], shared: dict[int, Tensor]
) -> None:
    """Take over the tensors of one module that are others, and set what it says of their sizes."""
    before = {}
    homes: tuple[dict[str, Any], ...] = module._parameters, module._buffers
    for home in homes:
        for name, old in home.items():
            new = states.get(f"{path}.{name}" if path else name)
            if old is not None and id(old) in shared:  # tied
                home[name] = shared[id(old)]
            elif old is not None and new is not None and not torch.equal(old, new):
                taken: Tensor = new.detach().clone()
                if isinstance(old, nn.Parameter):
                    taken = nn.Parameter(taken, requires_grad=old.requires_grad)
                before[name], home[name], shared[id(old)] = old, taken, taken
    for kind, sizes in _SIZES.items():
        if before and isinstance(module, kind):
            for name, value in sizes(module, before).items():
                setattr(module, name, value)


def _conv(module: Any, before: Mapping[str, Tensor]) -> dict[str, int]:
    old, new, groups = before.get("weight", module.weight).shape, module.weight.shape, module.groups
    if groups > 1 and old[1] == new[1]:  # whole groups went away
        groups = groups * new[0] // old[0]
    each = new[1] * groups
    ends = (new[0], each) if module.transposed else (each, new[0])
    return {"in_channels": ends[0], "out_channels": ends[1], "groups": groups}


def _group_norm(module: Any, before: Mapping[str, Tensor]) -> dict[str, int]:
    each = module.num_groups == module.num_channels
    count = module.weight.shape[0]
    return {"num_channels": count, "num_groups": count if each else module.num_groups}


def _recurrent(module: Any, before: Mapping[str, Tensor]) -> dict[str, int]:
    return {"input_size": module.weight_ih_l0.shape[1], "hidden_size": module.weight_hh_l0.shape[1]}


_SIZES: dict[Any, Callable[[Any, Mapping[str, Tensor]], dict[str, Any]]] = {
    nn.modules.conv._ConvNd: _conv,
    nn.GroupNorm: _group_norm,
    nn.RNNBase: _recurrent,
    nn.Linear: lambda m, _: {"out_features": m.weight.shape[0], "in_features": m.weight.shape[1]},
    nn.Bilinear: lambda m, _: dict(
        zip(("out_features", "in1_features", "in2_features"), m.weight.shape, strict=True)
    ),
    nn.Embedding: lambda m, _: {"embedding_dim": m.weight.shape[1]},
    nn.PReLU: lambda m, _: {"num_parameters": m.weight.shape[0]},
    nn.modules.batchnorm._NormBase: lambda m, before: {
        "num_features": len(getattr(m, next(iter(before))))
    },
    nn.LayerNorm: lambda m, _: {"normalized_shape": tuple(m.weight.shape)},
    nn.RMSNorm: lambda m, _: {"normalized_shape": tuple(m.weight.shape)},
}  # fmt: skip


def _check(small: nn.Module, result: OptimizedModule, call: tuple[Any, Any]) -> None:
    """The module computes what the graph does, or a reason why not."""

    def outputs(of: nn.Module) -> list[Any]:
        args, kwargs = clone_inputs(*call)
        with torch.no_grad():
            return pytree.tree_leaves(copy_module(of)(*args, **kwargs))

    try:
        found = outputs(small)
    except Exception as failure:
        raise NotExpressible(
            f"the code of {type(small).__name__} has a size of its own: {failure}"
        ) from failure
    truth = outputs(result)
    eps = [torch.finfo(one.dtype).eps for one in truth if one.is_floating_point()]
    error = relative_error(found, truth)
    if error > 1e3 * max(eps, default=0.0):
        raise NotExpressible(
            f"{type(small).__name__} with the cut parameters differs from the pruned graph "
            f"by {error:.1e} (relative)"
        )
