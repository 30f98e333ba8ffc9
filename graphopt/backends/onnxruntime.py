"""ONNX Runtime's CPU kernels on our graph.

Exported to ONNX by `torch.onnx` from a program of `torch.export`, run with all of ONNX Runtime's graph
optimizations and as many threads as torch has.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.backends.base import Backend, BackendError
from graphopt.backends.exported import culprits, dtypes_of, exported, quiet
from graphopt.backends.frozen import Frozen, state

_NEEDED = ("onnxruntime", "onnx", "onnxscript")
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip
ONE_FILE = 1 << 30  # bytes of weights; a protobuf may have 2 GB


def missing() -> str:
    absent = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed: pip install graphopt[onnx]" if absent else ""


def lower(module: fx.GraphModule, trainable: bool) -> Callable[..., Any]:
    """A session for inference; a module that is to be trained is run as it is."""
    return module if trainable else Frozen(module, Session)


def convert(
    module: fx.GraphModule, program: Any, inputs: list[str] | None = None,
    outputs: list[str] | None = None,
) -> Any:  # fmt: skip
    """The program of a module as a `torch.onnx.ONNXProgram`.

    Raises:
        BackendError: naming the operators that have no conversion.
    """
    try:
        with quiet():
            return torch.onnx.export(
                program, dynamo=True, verbose=False, optimize=True, input_names=inputs,
                output_names=outputs,
            )  # fmt: skip
    except Exception as error:
        said = str(error).rpartition("Exception summary")[2] or str(error)
        named = culprits(module, said)
        reason = f"no conversion of {named}" if named else " ".join(said.split())[:300]
        raise BackendError(f"ONNX: {reason}") from error


def refuse_types(module: fx.GraphModule, leaves: list[Any]) -> None:
    """
    Raises:
        BackendError: if there are no kernels for some dtype of the graph.
    """
    held = dtypes_of(module, leaves)
    if strange := [f"{dtype} ({where})" for dtype, where in held.items() if dtype not in DTYPES]:
        raise BackendError(f"ONNX Runtime's CPU kernels do not compute in {', '.join(strange)}")


class Session:
    """One module in ONNX Runtime; see `frozen.Program`. May be called from several threads at a time.

    Graphs of known sizes are fused further and 2 to 5% faster, so the sizes of the first call have a session
    of their own, and all others share one for any size, converted when it is first asked for.
    """

    def __init__(self, module: fx.GraphModule, leaves: list[Any]) -> None:
        refuse_types(module, leaves)
        self.module, self.threads = module, torch.get_num_threads()
        start = time.perf_counter()
        self.exported = exported(module, leaves)
        self.weights = list(self.exported.states)
        given = self.exported.given(leaves)
        self.sizes = [one.shape for one in given]
        converted = convert(module, self.exported.program)
        done = time.perf_counter()
        self.session = self._session(converted, self.sizes)
        self.general: Any = None
        self.names = [one.name for one in self.session.get_inputs()]
        kinds = Counter(node.op_type for node in converted.model.graph)
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(6))
        self.remarks = [
            f"ONNX Runtime {importlib.metadata.version('onnxruntime')} on {self.threads} thread(s), "
            f"converted in {done - start:.1f} s, built in {time.perf_counter() - done:.1f} s",
            f"{kinds.total()} operations on {', '.join(self.session.get_providers())}: {listed}",
        ]

    def _session(self, converted: Any, sizes: list[torch.Size] | None) -> Any:
        """A session for inputs of these sizes, or of any."""
        fixed = {} if sizes is None else dict(_dimensions(converted.model_proto, sizes))
        size = sum(state(self.module, name).nbytes for name in self.weights)
        if size < ONE_FILE:
            return session(converted.model_proto.SerializeToString(), self.threads, fixed)
        with tempfile.TemporaryDirectory() as folder:
            save(converted, Path(folder) / "model.onnx", size)
            return session(Path(folder) / "model.onnx", self.threads, fixed)

    def fits(self, leaves: list[Any]) -> bool:
        return self.threads == torch.get_num_threads() and self.exported.fits(leaves)

    def __call__(self, leaves: list[Any]) -> list[Any]:
        tensors = self.exported.given(leaves)
        chosen = self.session
        if [one.shape for one in tensors] != self.sizes:
            if self.general is None:
                self.general = self._session(convert(self.module, self.exported.program), None)
            chosen = self.general
        given = [one.detach().contiguous().numpy() for one in tensors]
        # Memory of inputs is read where it is; every run allocates its outputs.
        found = chosen.run(None, dict(zip(self.names, given, strict=True)))
        computed: list[Tensor] = [torch.from_numpy(one) for one in found]
        return self.exported.assembled(self.module, leaves, computed)


def _dimensions(model: Any, sizes: list[torch.Size]) -> Iterator[tuple[str, int]]:
    """The sizes of the inputs' named axes."""
    for one, shape in zip(model.graph.input, sizes, strict=True):
        for axis, size in zip(one.type.tensor_type.shape.dim, shape, strict=True):
            if axis.dim_param:
                yield axis.dim_param, size


def session(model: bytes | Path, threads: int, sizes: Mapping[str, int] | None = None) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU, for given sizes of named axes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what fails is raised
    for name, size in (sizes or {}).items():
        options.add_free_dimension_override_by_name(name, size)
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise BackendError(f"ONNX Runtime: {reason}") from error


def save(converted: Any, path: Path, weights: int) -> None:
    """Write a `torch.onnx.ONNXProgram` with so many bytes of weights, which go to a second file if they
    are too many for one."""
    with quiet():
        converted.save(path, external_data=weights >= ONE_FILE)


BACKEND = Backend("onnxruntime", lower, missing)
