"""The columns: ways to run a model, each from the model and its inputs to something to call."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.frozen import frozen

Run = Callable[..., Any]
Args = tuple[Any, ...]
Side = Callable[[nn.Module, Args], Run]


def eager(model: nn.Module, args: Args) -> Run:
    return model


def channels_last(model: nn.Module, args: Args) -> Run:
    if not any(isinstance(one, torch.Tensor) and one.ndim == 4 for one in args) or not any(
        isinstance(one, nn.Conv2d) for one in model.modules()
    ):
        raise NotImplementedError("not a model of images")
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def run(*args: Any) -> Any:
        return twin(*(one.to(memory_format=torch.channels_last) for one in args))

    return run


def compiled(model: nn.Module, args: Args) -> Run:
    return torch.compile(model)  # type: ignore[no-any-return]


def frozen_weights(model: nn.Module, args: Args) -> Run:
    return frozen(model)


def autotuned(model: nn.Module, args: Args) -> Run:
    return frozen(model, max_autotune=True)


def jit(model: nn.Module, args: Args) -> Run:
    traced = torch.jit.trace(copy.deepcopy(model), args, check_trace=False)
    return torch.jit.optimize_for_inference(torch.jit.freeze(traced))  # type: ignore[no-any-return]


def onnxruntime(model: nn.Module, args: Args) -> Run:
    import onnxruntime as ort

    exported = torch.onnx.export(model, args, dynamo=True, verbose=False)
    assert exported is not None
    data = io.BytesIO()
    exported.save(data)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(data.getvalue(), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def run(*args: Any) -> Any:
        feed = {name: one.numpy() for name, one in zip(names, args, strict=False)}
        return tuple(map(torch.from_numpy, session.run(None, feed)))

    return run


def openvino(model: nn.Module, args: Args) -> Run:
    import openvino as ov
    from openvino import properties as prop

    converted = ov.convert_model(torch.export.export(model, args))
    settings = {
        prop.hint.performance_mode(): prop.hint.PerformanceMode.LATENCY,
        prop.hint.inference_precision(): ov.Type.f32,
        prop.inference_num_threads(): torch.get_num_threads(),
    }
    request = ov.compile_model(converted, "CPU", settings)

    def run(*args: Any) -> Any:
        found = request([one.numpy() for one in args], share_inputs=True)
        return tuple(torch.from_numpy(one) for one in found.values())

    return run


def ours(backend: str, **options: Any) -> Side:
    def build(model: nn.Module, args: Args) -> Run:
        import graphopt

        fast = graphopt.optimize(model, args, backend=backend, **options)
        if backend != "auto" and fast.report.backend != backend:
            raise RuntimeError("; ".join(fast.report.backend_notes))
        return fast

    return build


PEERS: dict[str, Side] = {
    "eager": eager,
    "eager, channels last": channels_last,
    "torch.compile": compiled,
    "compile, freezing": frozen_weights,
    "compile, freezing, max-autotune": autotuned,
    "jit, optimize_for_inference": jit,
    "ONNX Runtime": onnxruntime,
    "OpenVINO": openvino,
}
OURS: dict[str, Side] = {
    f"ours, {backend}": ours(backend)
    for backend in ("eager", "prepacked", "inductor", "onnxruntime", "openvino")
} | {"ours, auto": ours("auto")}
SIDES = PEERS | OURS

warnings.simplefilter("ignore")
