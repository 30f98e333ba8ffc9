"""Gradients of `torch.autograd.Function`s through capture.

`torch.export` traces what the forward of a Function does, and loses that its backward does something else:
the gradient of a spike would be that of a comparison, which is none. While `kept` is active, the result of
every Function goes through a `with_gradient` whose text says which call it was; `backwards.settle` then
writes the backward there. One that cannot be traced leaves the forward alone, and a note.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.autograd.function import Function, FunctionCtx, _SingleLevelFunction
from torch.utils.checkpoint import CheckpointFunction

from graphopt.ir import text_graph
from graphopt.ir.ops.gradient import TARGET

# -- what a Function keeps for its backward -------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Stands for a tensor in what a context keeps."""

    index: int


class Context(FunctionCtx):
    """The context of a call: what its forward keeps, and its backward finds again."""

    def __init__(self, needs: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs
        self.to_save: tuple[Any, ...] = ()
        self.non_differentiable: tuple[Tensor, ...] = ()
        self.dirty_tensors: tuple[Tensor, ...] = ()
        self.materialize_grads = True

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        return self.to_save

    def emptied(self) -> list[Tensor]:
        """The tensors it keeps, in whose places slots stand from here on."""
        self.__dict__.pop("saved_for_forward", None)
        self.non_differentiable = self.dirty_tensors = ()
        tensors: list[Tensor] = []

        def empty(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            tensors.append(leaf)
            return _Slot(len(tensors) - 1)

        self.__dict__.update(pytree.tree_map(empty, dict(self.__dict__)))
        return tensors

    def filled(self, tensors: Any, size: Callable[[Any], Any] = lambda one: one) -> Context:
        """A context with tensors in the slots, and sizes read by `size`."""

        def fill(leaf: Any) -> Any:
            if isinstance(leaf, _Slot):
                return tensors[leaf.index]
            return size(leaf) if isinstance(leaf, torch.SymInt) else leaf

        twin = Context(self.needs_input_grad)
        twin.__dict__.update(pytree.tree_map(fill, dict(self.__dict__)))
        return twin

    def key(self) -> Any:
        """Equal for contexts that are equal but for the tensors in their slots."""
        leaves, spec = pytree.tree_flatten(dict(self.__dict__))
        plain = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.SymInt, _Slot)
        return str(spec), tuple(
            (type(one), repr(one) if isinstance(one, plain) else id(one)) for one in leaves
        )


@dataclasses.dataclass
class Call:
    """A call of a Function: its context, which of its arguments are inputs, which of its outputs are
    tensors, its results, how many outputs there are, and which results have no gradient."""

    function: type[Function]
    context: Context
    inputs: list[int]
    places: list[int]
    outputs: int
    fixed: list[int]

    def backward(self, context: Context, gradients: list[Tensor]) -> list[Tensor | None]:
        """What the Function's own backward gives for the inputs."""
        cls: Any = self.function
        own = cls.backward if cls.vjp is Function.vjp else cls.vjp
        given: list[Any] = [None] * self.outputs
        for index, one in zip(self.places, gradients, strict=True):
            given[index] = one
        boxed = getattr(cls, "boxed_grads_call", False)
        found = own(context, given) if boxed else own(context, *given)
        found = found if isinstance(found, (tuple, list)) else (found,)
        return [found[index] for index in self.inputs]

    def text(self, graph: fx.Graph, results: list[Tensor], **more: Any) -> str:
        """The text of `graph` as the backward of this call."""
        first = next(one for index, one in enumerate(results) if index not in self.fixed)
        return text_graph.write(
            graph, name=name_of(self.function), fixed=self.fixed,
            place=text_graph.encode((first.dtype, first.device)), **more,
        )  # fmt: skip


def name_of(function: type) -> str:
    return f"{function.__module__}.{function.__qualname__}"


@dataclasses.dataclass
class Calls:
    """The calls of Functions in one run of a model: how often each, and those marked in a trace."""

    count: dict[str, int] = dataclasses.field(default_factory=dict)
    marked: list[Call] = dataclasses.field(default_factory=list)
    refused: dict[str, str] = dataclasses.field(default_factory=dict)


# -- during a run or a trace ----------------------------------------------------------------------


@contextmanager
def counted() -> Iterator[Calls]:
    """Notes which Functions are called; nested calls are their caller's."""
    calls = Calls()
    with _intercepted(calls, lambda apply, cls, args: apply(*args)):
        yield calls


@contextmanager
def kept(keep: bool = True) -> Iterator[Calls]:
    """Marks the results of Functions that a trace comes by; does nothing if not asked to `keep` them."""
    calls = Calls()
    if not keep:
        yield calls
        return
    with _intercepted(calls, lambda apply, cls, args: _marked(calls, cls, args)):
        yield calls


@contextmanager
def _intercepted(calls: Calls, call: Callable[..., Any]) -> Iterator[None]:
    """Lets `call` do what Functions are called for. `Function.apply` itself is often bound long before, so
    what it calls is replaced."""
    original: Any = vars(torch._C._FunctionBase)["apply"]
    level: Any = _SingleLevelFunction
    busy = False

    def apply(cls: Any, *args: Any) -> Any:
        nonlocal busy
        own = original.__get__(None, cls)
        plain = cls is CheckpointFunction
        if busy or (cls.__module__.startswith(("torch.", "graphopt.")) and not plain):
            return own(*args)
        calls.count[name_of(cls)] = calls.count.get(name_of(cls), 0) + 1
        busy = not plain
        try:
            return call(own, cls, args)
        finally:
            busy = False

    level.apply = classmethod(apply)
    try:
        yield
    finally:
        del level.apply


def _marked(calls: Calls, cls: Any, args: tuple[Any, ...]) -> Any:
    """The results of a call, marked: the forward runs as torch runs it, without gradients."""
    if cls is CheckpointFunction:  # it has the gradient of the function that it runs
        return args[0](*args[2:])
    context = Context(tuple(map(is_differentiable, args)))
    with _no_grad_unseen():
        if cls.setup_context is Function.setup_context:
            found = cls.forward(context, *args)
        else:
            found = cls.forward(*args)
            cls.setup_context(context, args, found)
    several = isinstance(found, tuple)
    outputs = list(found) if several else [found]
    places = [index for index, one in enumerate(outputs) if isinstance(one, Tensor)]
    if context.dirty_tensors:
        calls.refused[name_of(cls)] = "it writes to its inputs"
        return found
    lost = {id(one) for one in context.non_differentiable}
    fixed = [
        number for number, index in enumerate(places)
        if id(outputs[index]) in lost or not is_differentiable(outputs[index])
    ]  # fmt: skip
    inputs = [index for index, one in enumerate(args) if is_differentiable(one)]
    if len(fixed) == len(places) or not inputs:
        return found
    results, saved = [outputs[index] for index in places], context.emptied()
    calls.marked.append(Call(cls, context, inputs, places, len(outputs), fixed))
    number = len(calls.marked) - 1
    text = calls.marked[-1].text(fx.Graph(), results, call=number)
    marked = TARGET(text, results, [args[index] for index in inputs], saved)
    for index, one in zip(places, marked, strict=True):
        outputs[index] = one
    return tuple(outputs) if several else outputs[0]


def is_differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


@contextmanager
def _no_grad_unseen() -> Iterator[None]:
    """No gradients, by a switch that a trace does not write down."""
    before = torch.is_grad_enabled()

    def switch(on: bool) -> None:
        with torch._C.DisableTorchFunction():
            torch._C._set_grad_enabled(on)

    switch(False)
    try:
        yield
    finally:
        switch(before)


def notes(run: Calls, trace: Calls) -> list[str]:
    """Which Functions that a run called have another gradient after a trace, and why."""
    found = []
    for name, count in run.count.items():
        reason = trace.refused.get(name)
        if reason is None and trace.count.get(name, 0) < count // 2:
            reason = "the trace did not come by"
        if reason is not None:
            found.append(
                f"{name}: its gradient is now that of what its forward does, not that of its backward: "
                f"{reason}"
            )
    return found
