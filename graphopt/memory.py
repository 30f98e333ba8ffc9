"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


@cache
def _trim() -> Any:
    """glibc's `malloc_trim`, where there is one."""
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # no such library; Windows
        return None


def give_back() -> None:
    """glibc keeps what was freed between blocks in use: after many temporary tensors that is more than
    all that is in use. Takes milliseconds; does nothing elsewhere."""
    if (trim := _trim()) is not None:
        trim(0)
