"""Regions whose kernels are printed from a loop description: pointwise ops and row reductions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from functools import cached_property

import sympy
import torch
from torch import fx

from graphopt.backends.triton import loops
from graphopt.backends.triton.blocks import gpu_blocks
from graphopt.backends.triton.emit import size_names
from graphopt.backends.triton.lower import Domain, Lowering
from graphopt.backends.triton.merge import merged
from graphopt.backends.triton.products import ProductLowering, ProductPrinter
from graphopt.backends.triton.ptx import Unit, pointer
from graphopt.backends.triton.region import Launcher, Region, size_of
from graphopt.backends.triton.source import Printed, printed


@dataclasses.dataclass(eq=False)
class Generated(Region):
    """See the module docstring."""

    domain: Domain

    @staticmethod
    def of(
        name: str, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node], domain: Domain
    ) -> Generated:
        """The region of some nodes; raises Outside if they are not one kernel."""
        lowering = Lowering(nodes, domain)
        kernel = lowering.kernel(name, outputs)
        sizes = size_nodes(kernel.sizes, nodes, lowering.buffers)
        found = Generated(
            name, "reduction" if domain.reduced else "pointwise", tuple(nodes),
            tuple(lowering.buffers), tuple(outputs), sizes, domain,
        )  # fmt: skip
        _ = found.source  # what has no text is known now
        return found

    @cached_property
    def kernel(self) -> loops.Kernel | loops.Product:
        """The loop description, for dense inputs."""
        return self.described(frozenset())

    def described(self, strided: frozenset[int]) -> loops.Kernel | loops.Product:
        """The loop description if the inputs at some positions have strides of their own."""
        inputs = frozenset(self.inputs[position] for position in strided)
        lowering = Lowering(self.nodes, self.domain, inputs)
        return merged(lowering.kernel(self.name, self.outputs))

    @property
    def title(self) -> str:
        """`add, layer_norm` of `blocks.0.norm1`."""
        ops = dict.fromkeys(word(node) for node in self.nodes)
        origins = ", ".join(f"`{one}`" for one in self.origins[:4])
        more = f" and {len(self.origins) - 4} more" if len(self.origins) > 4 else ""
        return ", ".join(ops) + (f" of {origins}{more}." if origins else ".")

    @cached_property
    def dense(self) -> Printed:
        return self.printed(self.kernel)

    @property
    def source(self) -> str:
        return self.dense.text

    def printed(self, kernel: loops.Kernel | loops.Product, wide: bool = False) -> Printed:
        assert isinstance(kernel, loops.Kernel)
        return printed(kernel, self.title, wide)

    def interpreted(self, kernel: loops.Kernel | loops.Product) -> Printed:
        """The source for Triton's interpreter, where that must differ."""
        return self.printed(kernel)

    def work(self) -> tuple[sympy.Expr, sympy.Expr]:
        return self.kernel.work()

    def units(self) -> list[Unit]:
        columns = self.kernel.extent[1]
        blocks = gpu_blocks(self.dense.form, int(columns) if columns.is_Integer else 0)
        return [Unit(self.name, self.source, self.types(self.kernel), one, warps)
                for one, warps in blocks[:1]]  # fmt: skip

    def types(self, kernel: loops.Kernel | loops.Product) -> dict[str, str]:
        """The arguments of the kernel for dense inputs, and their types."""
        found = {f"{one.name}_ptr": pointer(one.dtype) for one in kernel.inputs}
        found |= {store.buffer.name: pointer(store.buffer.dtype) for store in kernel.stores}
        return found | dict.fromkeys(size_names(kernel.sizes).values(), "i32")

    def launcher(self) -> Launcher:
        from graphopt.backends.triton.runtime import Launch

        return Launch(self)


@dataclasses.dataclass(eq=False)
class Multiplied(Generated):
    """A product with what precedes and follows it."""

    product: fx.Node

    @staticmethod
    def around(
        name: str, product: fx.Node, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]
    ) -> Multiplied:
        """The region of a product and other nodes; raises Outside if they are not one kernel."""
        lowering = ProductLowering(nodes, product)
        kernel = lowering.product(name, outputs)
        sizes = size_nodes(kernel.sizes, nodes, lowering.buffers)
        found = Multiplied(
            name, "product", tuple(nodes), tuple(lowering.buffers), tuple(outputs),
            sizes, lowering.domain, product,
        )  # fmt: skip
        _ = found.source
        return found

    def described(self, strided: frozenset[int]) -> loops.Product:
        inputs = frozenset(self.inputs[position] for position in strided)
        lowering = ProductLowering(self.nodes, self.product, inputs)
        return lowering.product(self.name, self.outputs)

    def printed(self, kernel: loops.Kernel | loops.Product, wide: bool = False) -> Printed:
        assert isinstance(kernel, loops.Product)
        return ProductPrinter(kernel, self.product.meta["val"].dtype, wide).print(self.title)

    def interpreted(self, kernel: loops.Kernel | loops.Product) -> Printed:
        """bfloat16 operands as float32: Triton's interpreter multiplies the bits of bfloat16."""
        assert isinstance(kernel, loops.Product)
        return ProductPrinter(kernel, torch.float32, False).print(self.title)


def word(node: fx.Node) -> str:
    """What a node's op is called in the source graph, without its number and overload."""
    name = re.sub(r"_\d+$", "", str(node.meta["source"]))
    return re.sub(r"_(tensor|default|scalar|int)$", "", name) or name


def size_nodes(
    symbols: Sequence[sympy.Symbol], nodes: Sequence[fx.Node], inputs: Iterable[fx.Node]
) -> tuple[fx.Node, ...]:
    """The nodes that read the symbols of a kernel, then those that only its views of `inputs` need."""
    wanted = dict.fromkeys(symbols)
    seen = set(inputs)
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.meta["kind"] == "size":
            wanted |= dict.fromkeys(sorted(size_of(node).free_symbols, key=str))
        else:
            stack += node.all_input_nodes
    reads = {
        size_of(node): node for node in nodes[0].graph.nodes
        if node.meta.get("kind") == "size" and size_of(node).is_Symbol
    }  # fmt: skip
    return tuple(reads[one] for one in wanted)
