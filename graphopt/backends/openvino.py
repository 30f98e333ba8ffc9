"""OpenVINO's CPU plugin on our graph.

Converted by its PyTorch frontend from a program of `torch.export`, compiled for latency with as many
threads as torch has, in the precision of the model: by itself the plugin computes float32 models in bfloat16
where the machine multiplies those faster. It computes float64 in float32 and int64 in int32, so models with
the first are refused, and calls with integers too large for the second run the module itself.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.backends.base import Backend, BackendError
from graphopt.backends.exported import culprits, dtypes_of, exported, label, quiet
from graphopt.backends.frozen import Frozen, on_cpu, state

TYPES = {
    torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "boolean",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in TYPES.items()}
INT32 = torch.iinfo(torch.int32)
_LENGTHS = {"aten::slice"}  # whose largest integer means "to the end"


def missing() -> str:
    if importlib.util.find_spec("openvino") is None:
        return "OpenVINO is not installed: pip install graphopt[openvino]"
    return ""


def lower(module: fx.GraphModule, trainable: bool) -> Callable[..., Any]:
    """Compiled for inference; a module that is to be trained is run as it is."""
    return module if trainable else Frozen(module, Compiled, _usual)


def convert(module: fx.GraphModule, program: Any, shapes: dict[str, list[int | None]]) -> Any:
    """The program of a module as an `openvino.Model` for inputs of these shapes, None being any size.

    This is `openvino.convert_model` without its telemetry, which reports every use over the network.

    Raises:
        BackendError: naming the operators that have no conversion.
    """
    from openvino import PartialShape
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    try:
        with quiet():
            decoder = TorchFXPythonDecoder.from_exported_program(program)
            frontend = FrontEndManager().load_by_framework("pytorch")
            model = frontend.convert(frontend.load(decoder, True))
            model.reshape({
                port: PartialShape([-1 if one is None else one for one in shapes[port.any_name]])
                for port in model.inputs
            })  # fmt: skip
    except Exception as error:
        said = str(error)
        summary = said.rpartition("Summary:")[2]
        named = culprits(module, summary)
        reason = f"no conversion of {named}" if named else " ".join(said.split())[:300]
        raise BackendError(f"OpenVINO: {reason}") from error
    return model


def refuse_types(module: fx.GraphModule, leaves: list[Any]) -> None:
    """
    Raises:
        BackendError: if the plugin would compute some value of the graph in a narrower dtype.
    """
    held = dtypes_of(module, leaves)
    if strange := [f"{dtype} ({where})" for dtype, where in held.items() if dtype not in TYPES]:
        raise BackendError(f"OpenVINO does not compute in {', '.join(strange)}")
    for node in module.graph.nodes:
        if node.op == "get_attr" and not _narrow(state(module, str(node.target))):
            raise BackendError(f"OpenVINO computes int64 in int32, too narrow for {node.target}")
        if node.op == "call_function":
            schema = getattr(node.target, "_schema", None)
            numbers = [one for one in (*node.args, *node.kwargs.values()) if type(one) is int]
            if getattr(schema, "name", "") not in _LENGTHS and any(
                not INT32.min <= one <= INT32.max for one in numbers
            ):
                raise BackendError(
                    f"OpenVINO computes int64 in int32, too narrow for {label(node)}"
                )


def _usual(leaf: Any) -> bool:
    return on_cpu(leaf) and (not isinstance(leaf, Tensor) or _narrow(leaf))


def _narrow(tensor: Tensor) -> bool:
    """Whether there is no integer in it that int32 does not have."""
    if tensor.dtype != torch.int64 or not tensor.numel():
        return True
    low, high = tensor.aminmax()
    return INT32.min <= int(low) and int(high) <= INT32.max


class Plugin:
    """An `openvino.Model`, compiled. May be called from several threads at a time."""

    def __init__(self, model: Any, precision: str) -> None:
        self.inputs = [port.any_name for port in model.inputs]
        self.dtypes = [_DTYPES[port.get_element_type().get_type_name()] for port in model.outputs]
        self.threads = torch.get_num_threads()
        self.compiled = _core().compile_model(model, "CPU", {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self.threads,
            "INFERENCE_PRECISION_HINT": precision,
        })  # fmt: skip
        self._idle = [self.compiled.create_infer_request()]

    def __call__(self, given: list[Tensor]) -> list[Tensor]:
        try:
            request = self._idle.pop()
        except IndexError:  # another thread has it
            request = self.compiled.create_infer_request()
        kept = [one.detach().contiguous() for one in given]
        try:
            for port, one in enumerate(kept):
                request.set_input_tensor(port, _shared(one))
            request.infer()
            # Copied, for the next call writes over them. A tensor of ours as the output costs more: its
            # pages are new.
            return [
                _view(request.get_output_tensor(port).data, dtype).clone()
                for port, dtype in enumerate(self.dtypes)
            ]
        finally:
            self._idle.append(request)

    def operations(self) -> str:
        """What runs, how often, and in which precision."""
        kinds: Counter[str] = Counter()
        precisions = set()
        for node in self.compiled.get_runtime_model().get_ordered_ops():
            info = node.get_rt_info()
            kind, precision = (str(info[key].value) for key in ("layerType", "runtimePrecision"))
            if kind not in ("Input", "Output", "Const"):
                kinds[kind] += 1
                precisions.add(precision)
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(6))
        return f"{kinds.total()} operations in {'/'.join(sorted(precisions))}: {listed}"


class Compiled:
    """One module on the plugin; see `frozen.Program`.

    Kernels for known sizes are 5% faster, so the sizes of the first call have their own, and all others share
    kernels for any size, compiled when they are first asked for: in a tenth of the time of the conversion.
    """

    def __init__(self, module: fx.GraphModule, leaves: list[Any]) -> None:
        refuse_types(module, leaves)
        start = time.perf_counter()
        self.module, self.exported = module, exported(module, leaves)
        self.weights = list(self.exported.states)
        self.precision = precision_of(module, leaves)
        self.model = convert(module, self.exported.program, self.exported.shapes)
        names = [port.any_name for port in self.model.inputs]
        self.order = [self.exported.names.index(name) for name in names]
        given = self.exported.given(leaves)
        self.sizes = [list(given[position].shape) for position in self.order]
        converted = time.perf_counter()
        self.plugin = Plugin(_resized(self.model, self.sizes), self.precision)
        self.general: Plugin | None = None
        done = time.perf_counter()
        wanted = [one.dtype for one in self.exported.outputs]
        if self.plugin.dtypes != wanted:
            raise BackendError(f"OpenVINO: converted to {self.plugin.dtypes}, expected {wanted}")
        self.remarks = [
            f"OpenVINO {importlib.metadata.version('openvino')} on {self.plugin.threads} thread(s), "
            f"converted in {converted - start:.1f} s, compiled in {done - converted:.1f} s",
            self.plugin.operations(),
        ]

    def fits(self, leaves: list[Any]) -> bool:
        return self.plugin.threads == torch.get_num_threads() and self.exported.fits(leaves)

    def __call__(self, leaves: list[Any]) -> list[Any]:
        found = self.exported.given(leaves)
        given = [found[position] for position in self.order]
        plugin = self.plugin
        if [list(one.shape) for one in given] != self.sizes:
            if self.general is None:
                self.general = Plugin(self.model, self.precision)
            plugin = self.general
        return self.exported.assembled(self.module, leaves, plugin(given))


def _resized(model: Any, sizes: list[list[int]]) -> Any:
    """A copy of a model for inputs of these sizes; the weights are shared."""
    from openvino import PartialShape

    twin = model.clone()
    twin.reshape(dict(zip(twin.inputs, map(PartialShape, sizes), strict=True)))
    return twin


def precision_of(module: fx.GraphModule, leaves: list[Any]) -> str:
    """What the plugin is to compute in: bfloat16 if the model does, and does nothing else."""
    floats = {one for one in dtypes_of(module, leaves) if one.is_floating_point}
    return "bf16" if floats == {torch.bfloat16} else "f32"


@functools.cache
def _core() -> Any:
    import openvino

    return openvino.Core()


def _shared(tensor: Tensor) -> Any:
    """A contiguous tensor as one of OpenVINO's, over the same memory."""
    import openvino

    if tensor.dtype == torch.bfloat16:  # NumPy has none
        bits = tensor.view(torch.int16).numpy()
        return openvino.Tensor(bits, openvino.Shape(list(tensor.shape)), openvino.Type.bf16)
    return openvino.Tensor(tensor.numpy(), shared_memory=True)


def _view(array: Any, dtype: torch.dtype) -> Tensor:
    if dtype == torch.bfloat16:
        return torch.from_numpy(array.view("int16")).view(dtype)
    return torch.from_numpy(array)


BACKEND = Backend("openvino", lower, missing)
