"""Files that are there whole or not at all: written beside their place, then moved into it in one step.

Work in progress is a folder `.NAME.graphopt-XXXXXXXX` beside NAME, locked for as long as its process lives. A
process that is killed leaves it behind; the next one that writes to NAME removes it.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows, where nothing is removed
    fcntl = None  # type: ignore[assignment]


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A new folder on the disk of `target`, gone afterwards; those that dead processes left go too."""
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.graphopt-"
    ours = re.compile(re.escape(prefix) + r"[a-z0-9_]{8}")  # as tempfile names them
    for one in target.parent.iterdir():
        if ours.fullmatch(one.name) and one.is_dir() and not one.is_symlink():
            _remove_if_left(one)
    work, lock = _locked(target.parent, prefix)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked(folder: Path, prefix: str) -> tuple[Path, int | None]:
    """A new folder and its lock: another process may take a new folder for a left one until it is locked,
    and then there is no folder."""
    while True:
        work = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
        if fcntl is None:
            return work, None
        try:
            lock = os.open(work, os.O_RDONLY)
        except FileNotFoundError:
            continue
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if work.exists():
            return work, lock
        os.close(lock)


def _remove_if_left(work: Path) -> None:
    """Remove a folder whose process is dead, and so holds no lock."""
    if fcntl is None:
        return
    with suppress(OSError):
        lock = os.open(work, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(work, ignore_errors=True)
        finally:
            os.close(lock)


def write(path: Path, text: str) -> None:
    """Write a file in one step."""
    with beside(path) as work:
        part = work / path.name
        part.write_text(text, encoding="utf-8")
        _settle(part)
        os.replace(part, path)
    _settle(path.parent)


def replace(work: Path, target: Path) -> None:
    """Put the file or directory `work` in the place of `target`, on the same disk. Killed at any moment, the
    old one is there or the new one; of directories, where the system can exchange them (Linux, macOS)."""
    if work.is_file():
        _settle(work)
        os.replace(work, target)
        _settle(target.parent)
        return
    for one in work.iterdir():
        with open(one, "rb") as file:
            os.fsync(file.fileno())
    if not target.exists():
        os.rename(work, target)
    elif _exchanged(work, target):
        shutil.rmtree(work, ignore_errors=True)  # the old one
    else:
        with beside(target) as old:
            os.rename(target, old / "artifact")
            try:
                os.rename(work, target)
            except OSError:
                os.rename(old / "artifact", target)
                raise
    _settle(target.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Whether two paths were exchanged in one step; Python has no name for it."""
    here, swap = -100, 2  # AT_FDCWD; RENAME_EXCHANGE, RENAME_SWAP
    names = os.fsencode(one), os.fsencode(other)
    try:
        libc = ctypes.CDLL(None)
        if sys.platform == "darwin":
            return int(libc.renamex_np(*names, swap)) == 0
        return int(libc.renameat2(here, names[0], here, names[1], swap)) == 0
    except (AttributeError, TypeError):
        return False


def _settle(path: Path) -> None:
    """Let what was written, or renamed, reach the disk."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
