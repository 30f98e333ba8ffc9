"""The result of optimization: an nn.Module with the source's signature."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

from graphopt.ir.graph import REQUIRED, Graph, Signature
from graphopt.ir.ops.base import hint
from graphopt.ir.process import alone
from graphopt.report import Report


class InputError(ValueError):
    """The inputs of a call do not fit what the model was captured with."""


class OptimizedModule(nn.Module):
    """An optimized model. Call it like the source model.

    Parameters that survive keep their names. In Tune mode it trains: every gradient equals that of
    the source in eval mode. `train()` and `eval()` change nothing: the captured mode is part of the
    graph.

    Attributes:
        report: what was done, refused and rolled back, errors and cost.
        graph_module: the plain `torch.fx.GraphModule`; None if the model was captured by region.
    """

    _inner: Any
    _signature: Any
    _report: Any
    _lower: Any
    _run: Any
    _fallback: Any
    _pending: Any

    def __init__(
        self, inner: nn.Module, signature: Signature | None, report: Report,
        lower: Callable[[fx.GraphModule], Callable[..., Any]] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        adopt(self, inner)
        hidden = (inner, signature, report, lower, None, None, None)
        self.__dict__.update(zip(HIDDEN, hidden, strict=True))
        self.training = inner.training

    # -- what the user sees -------------------------------------------------------------------

    @property
    def report(self) -> Report:
        if self._pending is not None:
            raise RuntimeError("not captured yet: call the module once, or pass inputs to optimize")
        report: Report = self._report
        return report

    @property
    def graph_module(self) -> fx.GraphModule | None:
        if self._pending is not None:
            raise RuntimeError("not captured yet: call the module once, or pass inputs to optimize")
        return None if self._signature is None else self._inner  # type: ignore[no-any-return]

    @property
    def kernels(self) -> tuple[Any, ...]:
        """The generated kernels: name, kind, source, origin modules, bytes and FLOPs of each; none
        with a backend that generates no source of its own."""
        if self.graph_module is None:
            regions = (one for one in self.modules() if isinstance(one, OptimizedModule))
            return tuple(kernel for one in regions if one is not self for kernel in one.kernels)
        if self._run is None and self._lower is not None:
            args, kwargs = self.example_inputs()
            self._lowered()(*args, **kwargs)
        return tuple(getattr(self._run, "kernels", ()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model as one artifact, a directory, or one file if the name ends in .zip; see
        `graphopt.artifact`."""
        from graphopt.artifact import save

        save(self, path)

    def export(
        self, path: str | os.PathLike[str], args: Any = None,
        kwargs: Mapping[str, Any] | None = None, *, format: str | None = None,
    ) -> Any:  # fmt: skip
        """Write the model for other runtimes: ONNX, OpenVINO IR, `.pt2`, AOTInductor; see
        `graphopt.export`."""
        from graphopt.export import export

        return export(self, path, args, kwargs, format=format)

    def example_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random inputs of the captured shapes and dtypes, as (args, kwargs). Whole numbers are 0 and 1."""
        if self._signature is None or self.graph_module is None:
            raise RuntimeError("a model captured by region does not know its inputs")
        generator = torch.Generator().manual_seed(0)
        leaves = list(self._signature.inputs)
        for index, node in enumerate(_placeholders(self.graph_module)):
            if leaves[index] is None and (kind := node.meta.get("type")):
                leaves[index] = random_input(kind, generator)
        args, kwargs = pytree.tree_unflatten(leaves, self._signature.in_spec)
        return args, kwargs

    # -- calling ------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._pending is not None:
            self._capture_now(args, kwargs)
        if self._signature is None:
            return self._inner(*args, **kwargs)
        try:
            args, kwargs = self._bind(args, kwargs)
        except InputError:
            if self._fallback is None:
                raise
            return self._fallback(*args, **kwargs)
        if torch.compiler.is_compiling():  # traced by export or compile: the plain graph
            return self._inner(*args, **kwargs)
        return self._lowered()(*args, **kwargs)

    def _lowered(self) -> Callable[..., Any]:
        if self._run is None:
            with alone():
                if self._run is None:
                    run = self._inner if self._lower is None else self._lower(self._inner)
                    self.__dict__["_run"] = run
        return self._run  # type: ignore[no-any-return]

    def _capture_now(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with alone():
            if self._pending is None:  # another thread did
                return
            result = self._pending(self._inner, args, kwargs)
            # Not what users have set since: hooks, attributes, the mode.
            for name in (*REGISTRIES, *HIDDEN):
                self.__dict__[name] = result.__dict__[name]

    def _bind(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call in the form in which the model was captured.

        Raises:
            InputError: naming the input, what was expected and what was found.
        """
        signature: Signature = self._signature
        count, keys = signature.arity
        if len(args) != count or kwargs.keys() != set(keys):
            args, kwargs = _rearrange(signature, args, kwargs, count, keys)
        kwargs = {key: kwargs[key] for key in keys}
        if torch.compiler.is_compiling():
            return args, kwargs
        leaves: Sequence[Any] = args
        if flat := signature.flat and all(isinstance(one, torch.Tensor) for one in args):
            found = [one.shape for one in args]
            if found == self._inner.__dict__.get("_graphopt_fitting"):  # as in the last call
                return args, kwargs
        else:
            leaves, spec = pytree.tree_flatten((tuple(args), kwargs))
            if spec != signature.in_spec:
                raise InputError(
                    f"inputs are structured as {_structure(args, kwargs)}; the model was captured "
                    f"with {len(signature.inputs)} leaves: {', '.join(signature.names)}"
                )
        sizes: dict[str, int] = {}
        placeholders = _placeholders(self._inner)
        for node, name, leaf, constant in zip(
            placeholders, signature.names, leaves, signature.inputs, strict=True
        ):
            kind = node.meta.get("type")
            if kind is None:
                if not _same(leaf, constant):
                    raise InputError(
                        f"input {name} is {leaf!r}; the model was captured with {constant!r}"
                    )
            elif not isinstance(leaf, torch.Tensor):
                raise InputError(
                    f"input {name}: expected a tensor {_kind_text(kind)}, found "
                    f"{type(leaf).__name__}"
                )
            else:
                _check_shape(name, kind, leaf, sizes)
        if flat:
            self._inner.__dict__["_graphopt_fitting"] = found
        return tuple(args), kwargs

    # -- moving, copying, pickling ------------------------------------------------------------

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> OptimizedModule:
        before = _place(self)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._fallback is not None:
            self._fallback._apply(fn)
        after = _place(self)
        captured = self._pending is None and self.graph_module is not None
        if before is not None and before != after and captured:
            retarget(self._inner.graph, dict(zip(before, after, strict=True)))  # type: ignore[arg-type]
            self._inner.recompile()
        if before != after:
            self.__dict__["_run"] = None
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copying and pickling take the graph apart as `save` does; tensors stay tensors."""
        if self._pending is not None:
            raise RuntimeError("not captured yet: call the module once before copying it")
        if self.graph_module is None:
            return super().__reduce_ex__(protocol)
        from graphopt.artifact import dismantle, rebuild

        own = {name: one for name, one in vars(self).items() if name not in (*REGISTRIES, *HIDDEN)}
        return rebuild, dismantle(self), {**own, "_fallback": self._fallback}


HIDDEN = ("_inner", "_signature", "_report", "_lower", "_run", "_fallback", "_pending")
REGISTRIES = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")


def adopt(module: nn.Module, source: nn.Module) -> None:
    """Make `module` own the very parameters, buffers and children of `source`."""
    for registry in REGISTRIES:
        module.__dict__[registry] = source.__dict__[registry]


def build(graph: Graph) -> fx.GraphModule:
    """The plain FX module of a graph: its states under their names, pytrees in and out."""
    code = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.fx.nodes:
        twin = code.node_copy(node, lambda one: mapping[one])
        twin.meta = {key: node.meta[key] for key in ("where", "made_by") if key in node.meta}
        if (kind := describe_type(node.meta.get("val"))) is not None:
            twin.meta["type"] = kind
        mapping[node] = twin
    states = {
        name: (state.tensor, state.kind, state.saved)
        for name, state in graph.in_source_order().items()
    }
    return assemble(code, graph.signature, states, graph.aliases)


def assemble(
    code: fx.Graph, signature: Signature, states: Mapping[str, tuple[torch.Tensor, str, bool]],
    aliases: Mapping[str, str],
) -> fx.GraphModule:  # fmt: skip
    """A GraphModule over `code` that owns all of `states`, the unread ones and tied names too."""
    root = nn.Module()
    for name, state in states.items():
        attach(root, name, *state)
    for name, twin in aliases.items():
        attach(root, name, *states[twin])
    code._codegen = _PyTreeCodeGen(
        _PyTreeInfo(_argument_names(signature), signature.in_spec, signature.out_spec)
    )
    module = fx.GraphModule(root, code, "OptimizedGraph")
    adopt(module, root)
    return module


def attach(root: nn.Module, name: str, tensor: torch.Tensor, kind: str, saved: bool) -> None:
    """Register a state under a dotted name, making modules on the way."""
    *path, field = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        child = root._modules[part]
        assert child is not None
        root = child
    if kind == "parameter":
        root._parameters[field] = tensor  # type: ignore[assignment]
    else:
        root._buffers[field] = tensor
        (
            root._non_persistent_buffers_set.discard
            if saved
            else root._non_persistent_buffers_set.add
        )(field)


def describe_type(value: Any) -> dict[str, Any] | None:
    """dtype and shape of a tensor as plain data, symbolic sizes by name; with these, the captured ones."""
    if not isinstance(value, torch.Tensor):
        return None
    shape = [size if isinstance(size, int) else str(size) for size in value.shape]
    kind = {"dtype": str(value.dtype).removeprefix("torch."), "shape": shape}
    fixed = all(isinstance(size, int) for size in shape)
    return kind if fixed else {**kind, "captured": [hint(size) for size in value.shape]}


def random_input(kind: Mapping[str, Any], generator: torch.Generator) -> torch.Tensor:
    """A tensor of a type as `describe_type` has it."""
    sizes = zip(kind["shape"], kind.get("captured", repeat(2)), strict=False)
    shape = [size if isinstance(size, int) else captured for size, captured in sizes]
    dtype = getattr(torch, kind["dtype"])
    if dtype.is_floating_point or dtype.is_complex:
        drawn = torch.complex64 if dtype.is_complex else torch.float32
        return torch.randn(shape, generator=generator, dtype=drawn).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def retarget(graph: fx.Graph, change: Mapping[Any, Any]) -> None:
    """Replace devices and dtypes written into a graph's arguments."""

    def swap(value: Any) -> Any:
        if isinstance(value, (torch.device, torch.dtype)):
            return change.get(value, value)
        if isinstance(value, (list, tuple)):
            return type(value)(map(swap, value))
        return value

    for node in graph.nodes:
        if node.op == "call_function":
            node.args = tuple(map(swap, node.args))
            node.kwargs = {key: swap(value) for key, value in node.kwargs.items()}
        if (kind := node.meta.get("type")) is not None:
            dtype = swap(getattr(torch, kind["dtype"]))
            node.meta["type"] = {**kind, "dtype": str(dtype).removeprefix("torch.")}


def _place(module: nn.Module) -> tuple[torch.device, torch.dtype] | None:
    """The device and floating dtype of a module's first floating state."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return None


def _placeholders(module: fx.GraphModule) -> list[fx.Node]:
    found: list[fx.Node] = module.__dict__.get("_graphopt_inputs", [])
    if not found:
        found = [node for node in module.graph.nodes if node.op == "placeholder"]
        module.__dict__["_graphopt_inputs"] = found
    return found


def _argument_names(signature: Signature) -> list[str]:
    count, keys = signature.arity
    positional = [name for name, kind, _ in signature.parameters if kind <= 1]
    names = positional[:count] if len(positional) >= count else [f"arg_{i}" for i in range(count)]
    return [*names, *keys]


def _rearrange(
    signature: Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any],
    wanted_args: int, wanted_kwargs: list[str],
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """Move inputs between positional and keyword, and supply or drop defaults."""
    positional = [name for name, kind, _ in signature.parameters if kind <= 1]
    defaults = {name: default for name, _, default in signature.parameters}
    given = dict(kwargs)
    if len(args) > len(positional):
        raise InputError(f"{len(args)} positional inputs, expected at most {len(positional)}")
    for name, value in zip(positional, args, strict=False):
        if name in given:
            raise InputError(f"input {name} is given twice")
        given[name] = value

    def take(name: str) -> Any:
        if name in given:
            return given.pop(name)
        if defaults.get(name, REQUIRED) == REQUIRED:
            raise InputError(f"input {name} is missing")
        return defaults[name]

    new_args = tuple(take(name) for name in positional[:wanted_args])
    new_kwargs = {key: take(key) for key in wanted_kwargs}
    for name, value in given.items():
        if name not in defaults and not any(kind == 4 for _, kind, _ in signature.parameters):
            raise InputError(f"unexpected input {name}")
        if value is not defaults.get(name) and not _same(value, defaults.get(name, REQUIRED)):
            raise InputError(
                f"input {name} was not given when the model was captured; optimize again with it"
            )
    return new_args, new_kwargs


def _same(found: Any, constant: Any) -> bool:
    """Whether a constant is the one of the capture: 1, 1.0 and True are three."""
    if found is constant:
        return True
    return type(found) is type(constant) and bool(np.all(found == constant))


def _check_shape(
    name: str, kind: Mapping[str, Any], leaf: torch.Tensor, sizes: dict[str, int]
) -> None:
    expected = kind["shape"]
    ok = len(expected) == leaf.ndim
    if ok:
        for want, size in zip(expected, leaf.shape, strict=True):
            if isinstance(want, int):
                ok = ok and want == size
            elif want.isidentifier():
                ok = ok and sizes.setdefault(want, size) == size
    if not ok:
        raise InputError(
            f"input {name}: expected {_kind_text(kind)}, found shape {list(leaf.shape)}"
        )


def _kind_text(kind: Mapping[str, Any]) -> str:
    shape = ", ".join(str(size) if isinstance(size, int) else "any" for size in kind["shape"])
    return f"{kind['dtype']} of shape [{shape}]"


def _structure(args: Any, kwargs: Any) -> str:
    inside = [type(one).__name__ for one in args]
    inside += [f"{key}={type(value).__name__}" for key, value in kwargs.items()]
    return f"({', '.join(inside)})"
