"""A module run by programs that are made of its present weights, and made anew once those change.

What the backends share that pack, convert or compile weights: when the module runs itself instead, and how a
changed weight is noticed. Seen are tensors that were replaced (`load_state_dict(assign=True)`, a new module)
and tensors that were written to (their version); what is written through `.data` has no version and is not.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

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

    Calls with gradients, and those with an input that is not `usual`, run the module itself.
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
        self._seen = Watch()
        in_spec: Any = module._in_spec
        args, kwargs = in_spec.children()
        self._flat = not kwargs.context and all(one.is_leaf() for one in args.children())
        self._out_spec: Any = module._out_spec

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = list(args) if self._flat and not kwargs else pytree.tree_leaves((args, kwargs))
        if torch.is_grad_enabled() or not all(map(self.usual, leaves)):
            return self.module(*args, **kwargs)
        found = self._program(leaves)(leaves)
        return (
            found[0] if self._out_spec.is_leaf() else pytree.tree_unflatten(found, self._out_spec)
        )

    def _program(self, leaves: list[Any]) -> Program:
        if not self._seen.unchanged():
            self.programs.clear()
        for program in self.programs:
            if program.fits(leaves):
                return program
        program = self._build(self.module, leaves)
        del self.programs[: len(self.programs) - PROGRAMS + 1]
        self.programs.append(program)
        self._seen = Watch(self.module, {name for one in self.programs for name in one.weights})
        self.remarks[:] = program.remarks
        return program


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
