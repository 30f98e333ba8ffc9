"""What becomes known of one model, and how errors are worded."""

from __future__ import annotations

import dataclasses
import traceback
from pathlib import Path


class Wrong(AssertionError):
    """An optimized model that is not its source; the message says how."""


@dataclasses.dataclass
class Row:
    """What is known of one model. `verdict`: right, wrong, invalid (the source does not run) or
    timeout. `error` is relative; `noise` the source's own answer to a change of 1e-15."""

    kind: str
    mode: str
    verdict: str = "right"
    reason: str = ""
    captured: str = ""
    refused: str = ""
    batch: str = ""
    gradients: str = ""
    error: float = 0.0
    noise: float = 0.0
    seconds: float = 0.0
    applied: list[str] = dataclasses.field(default_factory=list)
    rolled_back: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    ops: list[str] = dataclasses.field(default_factory=list)
    shown: str = ""


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def place(error: BaseException) -> str:
    """The first line of an error, and where in graphopt it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [one for one in frames if "graphopt" in one.filename and "fuzz" not in one.filename]
    where = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    return first_line(error) + where
