"""Fourier transforms, and the parts of complex numbers."""

from __future__ import annotations

from math import prod
from typing import Any

from graphopt.ir.ops.base import Call, Op, hint, op, overload
from graphopt.ir.value import Value

_KINDS = ("fft", "ifft", "rfft", "irfft")


@op(*(f"fft_{kind}{axes}.default" for kind in _KINDS for axes in ("", "2", "n")))
class Fourier(Op):
    """The transform `kind` (fft, ifft, rfft, irfft) over axes `dims`, their sizes first made `sizes`
    where given. `norm` says who divides: backward (None), forward, ortho."""

    input: Value
    kind: str
    dims: tuple[int, ...]
    sizes: tuple[int, ...] | None = None
    norm: str | None = None

    @classmethod
    def parse(cls, call: Call) -> Op | None:
        name = call.target._schema.name.removeprefix("aten::fft_")
        value, dims = call["self"], call["dim"]
        sizes = call["s"] if "s" in call.arguments else call["n"]
        if not name.endswith(("2", "n")):
            dims, sizes = (dims,), None if sizes is None else (sizes,)
        if dims is None:
            ndim = value.ndim
            dims = range(ndim - (ndim if sizes is None else len(sizes)), ndim)
        dims = tuple(dim % value.ndim for dim in dims)
        return cls(
            value, name.removesuffix("2").removesuffix("n"), dims, sizes, call["norm"], out=call.out
        )

    def build(self) -> tuple[Any, dict[str, Any]]:
        sizes = None if self.sizes is None else list(self.sizes)
        return overload(f"fft_{self.kind}n.default"), {
            "self": self.input, "s": sizes, "dim": list(self.dims), "norm": self.norm,
        }  # fmt: skip

    @property
    def reduction(self) -> int:
        return 2 * prod(hint(self.input.shape[dim]) for dim in self.dims)

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        out = run(value)
        size = prod(out.shape[dim] for dim in self.dims)
        divides = (self.norm or "backward") == ("backward" if self.kind[0] == "i" else "forward")
        scale = size**-0.5 if self.norm == "ortho" else 1 / size if divides else 1.0
        # The real transforms read or leave out one half of a spectrum.
        total = 2 * scale * magnitude(self.input).sum(self.dims, keepdim=True)
        return total.expand(out.shape)


class _Part(Op):
    input: Value

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        return magnitude(self.input)


@op("real.default")
class Real(_Part):
    """The real part."""

    input: Value


@op("imag.default")
class Imag(_Part):
    """The imaginary part."""

    input: Value


@op("_conj.default", "conj_physical.default", "_conj_physical.default", "conj.default")
class Conj(_Part):
    """The complex conjugate."""

    input: Value
