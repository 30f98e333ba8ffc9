"""CUDA graphs: the whole module as one launch, captured per shape of the inputs.

Where shapes allow: every tensor is on the GPU, nothing is written but the results, and what runs
between the kernels does not wait for the GPU. Otherwise, and for more than a few shapes, the module
runs as it is; `notes` says why. Results are copies: the next call does not change them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

MOST_SHAPES = 8
WARM_UP = 2  # runs before a capture: they compile kernels and measure blocks

Run = Callable[..., Any]
Capture = Callable[[Run, list[Any]], tuple[Callable[[], None], Any]]


class Graphs:
    """Calls `run`, a function from leaves to a tuple of tensors, by replaying a capture of it."""

    def __init__(self, run: Run, capture: Capture | None = None) -> None:
        self.run = run
        self.capture = capture or captured
        self.notes: list[str] = []
        self._by_shape: dict[Any, Any] = {}

    def __call__(self, leaves: Sequence[Any]) -> Any:
        key = tuple(
            (one.shape, one.stride(), one.dtype) if isinstance(one, torch.Tensor) else one
            for one in leaves
        )
        if key not in self._by_shape:
            self._by_shape[key] = self._captured(leaves)
        entry = self._by_shape[key]
        if entry is None:
            return self.run(*leaves)
        replay, inputs, outputs = entry
        for place, one in zip(inputs, leaves, strict=True):
            if isinstance(one, torch.Tensor):
                place.copy_(one)
        replay()
        return tuple(one.clone() if isinstance(one, torch.Tensor) else one for one in outputs)

    def _captured(self, leaves: Sequence[Any]) -> Any:
        if sum(one is not None for one in self._by_shape.values()) >= MOST_SHAPES:
            self.notes.append(f"more than {MOST_SHAPES} shapes: not captured in CUDA graphs")
            return None
        inputs = [one.clone() if isinstance(one, torch.Tensor) else one for one in leaves]
        try:
            replay, outputs = self.capture(self.run, inputs)
        except RuntimeError as error:
            torch.cuda.synchronize() if torch.cuda.is_available() else None
            self.notes.append(f"not captured in a CUDA graph: {str(error).splitlines()[0]}")
            return None
        return replay, inputs, outputs


def captured(run: Run, inputs: list[Any]) -> tuple[Callable[[], None], Any]:
    """A replay of `run` on these very tensors, and where its results are."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(*inputs)
    return graph.replay, outputs


def may_capture(leaves: Sequence[Any], writes: bool) -> bool:
    """Whether a module that writes its states (or does not) may be captured for these inputs."""
    tensors = [one for one in leaves if isinstance(one, torch.Tensor)]
    return not writes and bool(tensors) and all(one.is_cuda for one in tensors)
