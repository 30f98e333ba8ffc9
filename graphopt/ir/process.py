"""What belongs to the whole process, and how graphopt uses it.

The random state is put back, and one thread at a time captures or builds: both patch what all threads see.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_LOCK = threading.RLock()


@contextmanager
def alone() -> Iterator[None]:
    """One thread at a time, and outside `torch.inference_mode()`: tensors that are made in it can neither be
    trained nor watched."""
    with _LOCK, ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw random numbers from this seed on; afterwards the random state is what it was, on GPUs too."""
    devices = range(torch.cuda.device_count()) if _on_gpus() else ()
    with torch.random.fork_rng(devices):
        reseed(seed)
        yield


def reseed(seed: int) -> None:
    """As `torch.manual_seed`, but for devices that are not in use: they would take the seed later."""
    torch.default_generator.manual_seed(seed)
    if _on_gpus():
        torch.cuda.manual_seed_all(seed)


def _on_gpus() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
