"""A module run by programs that are made of its present weights, and made anew once those change.

What the backends share that pack, convert or compile weights: when the module runs itself instead, and how a
changed weight is noticed. Seen are tensors that were replaced (`load_state_dict(assign=True)`, a new module)
and tensors that were written to (their version); what is written through `.data` has no version and is not.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

from graphopt.ir.process import alone

log = logging.getLogger(__name__)

ATTEMPTS = 3  # at a program, if weights are written to meanwhile
PROGRAMS = 8  # kept at most, for inputs that no one program fits


class Program(Protocol):
    """From the leaves of a call to the leaves of its result; `weights` are the states it is made of."""

    weights: list[str]
    remarks: list[str]

    def fits(self, leaves: list[Any]) -> bool:
        """Whether it takes inputs of these sizes and dtypes."""

    def __call__(self, leaves: list[Any]) -> Any: ...


class Frozen:
    """`module` as a callable, run by the programs that `build` makes of it and the leaves of a call.

    Calls with gradients, under autocast or a transformation (vmap, jvp), and those with an input that is not
    `usual`, run the module itself; so do those whose program cannot be built, once another one could.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        build: Callable[[fx.GraphModule, list[Any]], Program],
        usual: Callable[[Any], bool] | None = None,
    ) -> None:
        self.module = module
        self.usual = usual or on_cpu
        self.remarks: list[str] = []
        self.programs: list[Program] = []
        self._build = build
        self._works = False  # a program was built once
        self._seen = Watch()
        in_spec: Any = module._in_spec
        args, kwargs = in_spec.children()
        self._flat = not kwargs.context and all(one.is_leaf() for one in args.children())
        self._out_spec: Any = module._out_spec

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = list(args) if self._flat and not kwargs else pytree.tree_leaves((args, kwargs))
        if not plain_call() or not all(map(self.usual, leaves)):
            return self.module(*args, **kwargs)
        found = self._program(leaves)(leaves)
        return (
            found[0] if self._out_spec.is_leaf() else pytree.tree_unflatten(found, self._out_spec)
        )

    def _program(self, leaves: list[Any]) -> Program:
        found = self._known(leaves)
        if found is None:
            with alone():  # and look again, for another thread may have built it
                found = self._known(leaves) or self._built(leaves)
        return found

    def _known(self, leaves: list[Any]) -> Program | None:
        if not self._seen.unchanged():
            self.programs.clear()
        return next((one for one in self.programs if one.fits(leaves)), None)

    def _built(self, leaves: list[Any]) -> Program:
        states = {str(one.target) for one in self.module.graph.nodes if one.op == "get_attr"}
        for _ in range(ATTEMPTS):
            before = Watch(self.module, states)
            try:
                program = self._build(self.module, leaves)
            except Exception as failure:
                if not self._works:
                    raise
                log.warning("running the graph itself, for its program fails: %s", failure)
                program = Itself(self.module, leaves)
            if before.unchanged():
                break
        else:  # another thread keeps writing over what it is made of: good for this call at most
            return program
        self._works = True
        del self.programs[: len(self.programs) - PROGRAMS + 1]
        self.programs.append(program)
        self._seen = Watch(self.module, {name for one in self.programs for name in one.weights})
        self.remarks[:] = program.remarks
        return program


class Itself:
    """A program that is the module."""

    def __init__(self, module: fx.GraphModule, leaves: list[Any]) -> None:
        self.module = module
        self.weights: list[str] = []
        self.remarks = ["the graph runs itself"]
        self._kinds = list(map(_kind, leaves))

    def fits(self, leaves: list[Any]) -> bool:
        return list(map(_kind, leaves)) == self._kinds

    def __call__(self, leaves: list[Any]) -> Any:
        in_spec: Any = self.module._in_spec
        args, kwargs = pytree.tree_unflatten(leaves, in_spec)
        return pytree.tree_leaves(self.module(*args, **kwargs))


def _kind(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf


def plain_call() -> bool:
    """Whether a call is nothing but that: no gradients of any kind, no autocast, no transformation."""
    return not (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


def on_cpu(leaf: Any) -> bool:
    """Whether an input is no tensor, or one on the CPU with something in it."""
    return not isinstance(leaf, Tensor) or (leaf.is_cpu and leaf.numel() > 0)


def state(module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of a dotted name."""
    return operator.attrgetter(name)(module)  # type: ignore[no-any-return]


class Watch:
    """Tells whether states of a module are still the tensors they were, unwritten.

    Every module on the way to them is looked at, on every call: by loops in C, over flat lists.
    """

    def __init__(self, module: nn.Module | None = None, names: Iterable[str] = ()) -> None:
        held: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        for name in names:
            owner: Any = module
            *path, field = name.split(".")
            for part in path:
                table = owner._modules
                owner = table[part]
                held[id(table), part] = table, part, owner
            table = owner._parameters if field in owner._parameters else owner._buffers
            held[id(table), field] = table, field, table[field]
        self._tables, self._keys, self._values = (
            [one[index] for one in held.values()] for index in range(3)
        )
        self._tensors = [
            one for one in self._values
            if isinstance(one, Tensor) and not one.is_inference()  # those have no version
        ]  # fmt: skip
        self._versions = list(map(_VERSION, self._tensors))

    def unchanged(self) -> bool:
        get: Any = dict.get
        found = map(get, self._tables, self._keys)
        return all(map(operator.is_, found, self._values)) and self._versions == list(
            map(_VERSION, self._tensors)
        )


_VERSION = operator.attrgetter("_version")
