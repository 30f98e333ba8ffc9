"""torch.compile with frozen weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def frozen(model: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`model` compiled with its weights as constants, for calls without gradients.

    As an option of torch.compile, freezing does nothing (torch 2.13): Dynamo has to see it too, whenever
    it compiles, as it does anew for another number of threads. The option tells the code apart from that
    of the same model without.
    """
    compiled = torch.compile(model, options={"freezing": True, **options})
    ready: set[Any] = set()

    def run(*args: torch.Tensor) -> Any:
        kind = (torch.get_num_threads(), *(one.shape for one in args))
        if kind in ready:
            return compiled(*args)
        with torch._inductor.config.patch(freezing=True), torch.no_grad():
            found = compiled(*args)
        ready.add(kind)
        return found

    return run
