"""A progress bar with what is being done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Bar:
    """Called with a line of text at each step; `expected` is how many there will be, as far as known."""

    def __init__(self, progress: Progress, first: str) -> None:
        self._progress, self._done, self.expected = progress, -1, 0
        self._task = progress.add_task(first, total=None)

    def __call__(self, what: str) -> None:
        self._done += 1
        total = max(self.expected, self._done + 1)
        self._progress.update(self._task, description=what, completed=self._done, total=total)


@contextmanager
def shown(first: str = "") -> Iterator[Bar]:
    """A bar on standard error while the block runs: steps done, the present one, seconds. Nothing is left
    of it, and where standard error is no terminal nothing is printed."""
    columns = (
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        yield Bar(progress, first)


@contextmanager
def followed(
    progress: Callable[[str], None] | bool | None, steps: int
) -> Iterator[Callable[[str], None] | None]:
    """Who is told of each step: a bar if `progress` is True, nobody if it is False or None."""
    if progress is not True:
        yield progress or None
        return
    with shown() as bar:
        bar.expected = steps
        yield bar
