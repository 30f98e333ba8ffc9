"""oneDNN's fused operators on weights that are reordered once; no code is generated.

    conv + bias + sum + activation     one call, channels last
    linear + bias + activation         one call, matrices [in, out] (addmm, mm, matmul) too

Built in about a second on the first call, when the sizes of the inputs are known; other sizes run on the
same weights. What oneDNN does not do stays with the framework's own operators. Calls with gradients run the
module itself, whose parameters stay beside the reordered ones; once they are changed, those are made anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.backends.base import Backend
from graphopt.backends.calls import arguments, spread
from graphopt.backends.frozen import Frozen, state
from graphopt.backends.inductor import plain
from graphopt.backends.integers import Integers
from graphopt.backends.prepacked_norms import Norms
from graphopt.ir.source import clone_inputs, untouched

DTYPES = (torch.float32, torch.bfloat16)
aten = torch.ops.aten
CONVOLUTIONS = (aten.conv2d.default, aten.conv3d.default)
VIEWS = (aten.view.default, aten._unsafe_view.default)
RESHAPES = (*VIEWS, aten.reshape.default)
PRODUCTS = (aten.addmm.default, aten.mm.default, aten.matmul.default)


@dataclasses.dataclass(frozen=True)
class Unary:
    """An activation in oneDNN's words."""

    name: str
    scalars: tuple[float, ...] = ()
    algorithm: str = ""


_PLAIN = {
    aten.relu.default: "relu", aten.sigmoid.default: "sigmoid", aten.tanh.default: "tanh",
    aten.hardswish.default: "hardswish", aten.hardsigmoid.default: "hardsigmoid",
    aten.silu.default: "swish",
}  # fmt: skip


def missing() -> str:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this torch is built without oneDNN"
    return "" if torch.backends.mkldnn.enabled else "oneDNN is switched off"


class Packed:
    """The program of a module on packed weights, for inputs of any size."""

    def __init__(self, module: fx.GraphModule, leaves: list[Any]) -> None:
        self.program, self.weights = pack(module, leaves)
        packed = sum(str(one.target).startswith("_packed_") for one in self.program.graph.nodes)
        self.remarks = [f"{packed} convolutions and linear maps on packed weights"]

    def fits(self, leaves: list[Any]) -> bool:
        return True

    def __call__(self, leaves: list[Any]) -> Any:
        return self.program(*leaves)


class Prepacked(Frozen):
    """`module` as a callable; `packed` is the program, once it is called."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, Packed)

    @property
    def packed(self) -> fx.GraphModule | None:
        return next((one.program for one in self.programs if isinstance(one, Packed)), None)


def lower(module: fx.GraphModule, trainable: bool) -> Callable[..., Any]:
    """Packed for inference; a module that is to be trained is run as it is."""
    return module if trainable else Prepacked(module)


def pack(module: fx.GraphModule, leaves: list[Any]) -> tuple[fx.GraphModule, list[str]]:
    """The program of `module` for inputs like `leaves`, from leaves to a tuple of leaves, and the names of
    the weights that it has packed. States that the module writes are as before."""
    program = plain(module)
    seen = _Record(program)
    with untouched(module):
        seen.run(*clone_inputs(tuple(leaves), {})[0])
    packer = _Packer(program, seen.kinds)
    packer.run()
    program.recompile()
    return program, packer.names


class _Record(fx.Interpreter):
    """Shape, dtype and whether it is contiguous, of every tensor of one run."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.kinds: dict[fx.Node, tuple[torch.Size, torch.dtype, bool]] = {}

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if isinstance(found, Tensor) and found.device.type == "cpu":
            self.kinds[n] = found.shape, found.dtype, found.is_contiguous()
        return found


class _Packer:
    """Rewrites one program in place."""

    def __init__(self, program: fx.GraphModule, kinds: dict[fx.Node, Any]) -> None:
        self.program, self.graph, self.kinds = program, program.graph, kinds
        self.fresh: set[fx.Node] = set()  # calls that share memory with nothing
        self.names: list[str] = []

    def run(self) -> None:
        integers = Integers(self.program, self.kinds, partial(state, self.program), _unary)
        integers.run()
        self.names += integers.names
        for node in list(self.graph.nodes):
            if node.op != "call_function" or node._erased:
                continue
            if node.target in CONVOLUTIONS:
                self._convolution(node)
            elif node.target is aten.linear.default:
                self._linear(node)
            elif node.target in PRODUCTS:
                self._product(node)
        for node in self.graph.nodes:
            if node.target in VIEWS:  # of what may lie in another order now
                node.target = aten.reshape.default
        if any("_convolution" in str(node.target) for node in self.fresh):
            norms = Norms(self.program, self.kinds, partial(state, self.program))
            norms.run()
            self.names += norms.names
        if integers.names or any("_convolution" in str(node.target) for node in self.fresh):
            self._in_order()
        self.graph.eliminate_dead_code()

    # -- maps -----------------------------------------------------------------------------------

    def _weight(self, node: Any) -> Tensor | None:
        """The tensor of a parameter that can be packed."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        tensor = state(self.program, str(node.target))
        fits = tensor.dtype in DTYPES and tensor.device.type == "cpu"
        return tensor.detach() if fits and tensor.layout == torch.strided else None

    def _kept(self, tensor: Tensor, weight: fx.Node) -> fx.Node:
        name = f"_packed_{len(self.names)}"
        self.names.append(str(weight.target))
        setattr(self.program, name, tensor)
        return self.graph.create_node("get_attr", name)

    def _convolution(self, node: fx.Node) -> None:
        given = arguments(node)
        weight, kind = self._weight(given["weight"]), self.kinds.get(given["input"])
        if (
            weight is None
            or kind is None
            or kind[1] != weight.dtype
            or isinstance(given["padding"], str)
        ):
            return
        rank = weight.ndim - 2
        if len(kind[0]) != weight.ndim:  # without a batch
            return
        where = [spread(given[name], rank) for name in ("padding", "stride", "dilation")]
        groups = given["groups"]
        last, activation, other = self._followed(node, sums=True)
        with self.graph.inserting_before(last):
            reordered = torch.ops.mkldnn._reorder_convolution_weight(
                weight, *where, groups, list(kind[0])
            )
            held = self._kept(reordered, given["weight"])
            source = given["input"]
            if source.op == "placeholder" and weight.ndim == 4:
                source = self.graph.call_function(
                    aten.contiguous.default, (source,), {"memory_format": torch.channels_last}
                )
            tail = (activation.name, list(activation.scalars), activation.algorithm)
            if other is None:
                new = self.graph.call_function(
                    torch.ops.mkldnn._convolution_pointwise.default,
                    (source, held, given["bias"], *where, groups, *tail),
                )
            else:
                after = tail if activation.name != "none" else (None, [], None)
                rest = (held, given["bias"], *where, groups, "add", 1.0, *after)
                if self._ours_alone(other, last):
                    new = self.graph.call_function(
                        torch.ops.mkldnn._convolution_pointwise_.binary, (other, source, *rest)
                    )
                else:
                    new = self.graph.call_function(
                        torch.ops.mkldnn._convolution_pointwise.binary, (source, other, *rest)
                    )
        self._replace(last, new)

    def _linear(self, node: fx.Node) -> None:
        given = arguments(node)
        weight = self._weight(given["weight"])
        if weight is not None:
            self._map(node, given["input"], given["weight"], weight, given["bias"])

    def _product(self, node: fx.Node) -> None:
        """x W (+ b) for a matrix W [in, out]. A sum behind it stays: measured, oneDNN adds no faster."""
        given = arguments(node)
        found = given.get("mat2", given.get("other"))
        source = given.get("mat1", given["self"])
        weight = self._weight(found)
        bias = given["self"] if node.target is aten.addmm.default else None
        if weight is None or weight.ndim != 2 or found is None:
            return
        if bias is not None:
            shape = self.kinds[bias][0] if bias in self.kinds else None
            if shape != weight.shape[1:] or (given["beta"], given["alpha"]) != (1, 1):
                return
        self._map(node, source, found, weight.t().contiguous(), bias)

    def _map(
        self, node: fx.Node, source: fx.Node, name: fx.Node, weight: Tensor, bias: fx.Node | None
    ) -> None:
        """`source` times the transpose of `weight` `[out, in]`, which `name` is."""
        kind = self.kinds.get(source)
        if kind is None or kind[1] != weight.dtype or 0 in kind[0]:
            return
        view = _only_user(node)
        behind = _only_user(view) if view is not None and view.target in RESHAPES else None
        if view is not None and behind is not None and _unary(behind) is not None:
            self._swap(view, behind)
        last, activation, _ = self._followed(node, sums=False)
        rows = kind[0][:-1].numel()
        with self.graph.inserting_before(last):
            reordered = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
            new = self.graph.call_function(
                torch.ops.mkldnn._linear_pointwise.default,
                (source, self._kept(reordered, name), bias, activation.name,
                 list(activation.scalars), activation.algorithm),
            )  # fmt: skip
        self._replace(last, new)

    def _swap(self, view: fx.Node, behind: fx.Node) -> None:
        """The activation of a reshaped value becomes the reshaped activation."""
        (inner,) = view.all_input_nodes[:1]
        behind.replace_all_uses_with(view)
        behind.replace_input_with(view, inner)
        view.replace_input_with(inner, behind)
        view.prepend(behind)
        self.kinds.pop(behind, None)
        if inner in self.kinds:
            self.kinds[behind] = self.kinds[inner]

    def _replace(self, last: fx.Node, new: fx.Node) -> None:
        if last in self.kinds:
            self.kinds[new] = self.kinds[last]
        last.replace_all_uses_with(new)
        self.graph.eliminate_dead_code()
        self.fresh.add(new)

    # -- what follows -----------------------------------------------------------------------------

    def _followed(self, node: fx.Node, sums: bool) -> tuple[fx.Node, Unary, fx.Node | None]:
        """The last call that goes into one with `node`, the activation, and what is added before it."""
        last, other = node, None
        user = _only_user(node)
        if sums and user is not None and user.target is aten.add.Tensor and len(user.args) == 2:
            found = user.args[1] if user.args[0] is node else user.args[0]
            if isinstance(found, fx.Node) and self._alike(found, node):
                last, other = user, found
        user = _only_user(last)
        activation = None if user is None else _unary(user)
        if user is None or activation is None or (other is not None and activation.name != "relu"):
            return last, Unary("none"), other
        return user, activation, other

    def _alike(self, left: fx.Node, right: fx.Node) -> bool:
        """Whether two tensors are different ones of the same shape and dtype."""
        known = left in self.kinds and right in self.kinds and left is not right
        return known and self.kinds[left][:2] == self.kinds[right][:2]

    def _ours_alone(self, other: fx.Node, at: fx.Node) -> bool:
        """Whether what is added may be overwritten: nothing shares its memory or reads it later."""
        return other in self.fresh and all(
            one is at
            or (one in self.fresh and one < at)
            or (one.target is aten.add.Tensor and _only_user(one) is at)
            for one in other.users
        )

    def _in_order(self) -> None:
        """Outputs lie in memory as those of the module."""
        output = self.graph.output_node()
        for one in set(output.all_input_nodes):
            shape, _, contiguous = self.kinds.get(one, ((), None, False))
            if len(shape) > 2 and contiguous:
                with self.graph.inserting_before(output):
                    output.replace_input_with(
                        one, self.graph.call_function(aten.contiguous.default, (one,))
                    )


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _unary(node: fx.Node) -> Unary | None:
    """A call as an activation of its input, None if oneDNN has none such."""
    if node.op != "call_function":
        return None
    if node.target in _PLAIN:
        return Unary(_PLAIN[node.target])
    if node.target is aten.gelu.default:
        return Unary("gelu", (), str(arguments(node)["approximate"]))
    if node.target is aten.leaky_relu.default:
        return Unary("leaky_relu", (arguments(node)["negative_slope"],))
    if node.target is aten.hardtanh.default:
        given = arguments(node)
        return Unary("hardtanh", (given["min_val"], given["max_val"]))
    if node.target is aten.relu6.default:
        return Unary("hardtanh", (0.0, 6.0))
    if node.target is aten.clamp.default:
        given = arguments(node)
        limits = given["min"], given["max"]
        if all(isinstance(one, (int, float)) for one in limits):
            return Unary("hardtanh", limits)
    return None


BACKEND = Backend("prepacked", lower, missing)
