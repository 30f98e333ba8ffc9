"""An artifact as one file: a zip archive, the same bytes for the same contents.

Members stand in the order of their names, stored and not compressed, with one date and one mode. Reading
unpacks nothing, and believes nothing that the archive says of itself: members have plain names, each once,
and no more bytes together than the file; their contents are compared with the manifest, as a folder's are.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from graphopt.artifact_data import ArtifactError

if TYPE_CHECKING:
    import torch

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")  # of a file of an artifact
MOST = 1000  # members
CHUNK = 1 << 20  # bytes read at a time; no directory of so many members is longer
_DATE, _MODE, _UNIX = (1980, 1, 1, 0, 0, 0), stat.S_IFREG | 0o644, 3
_FIRST = "graph.json"


def is_archive(path: Path) -> bool:
    """Whether an artifact of this name is one file."""
    return path.suffix == ".zip"


def pack(folder: Path, path: Path) -> None:
    """Write the files of a folder as an archive."""
    with zipfile.ZipFile(path, "w") as out:
        for file in sorted(folder.iterdir(), key=lambda one: one.name):
            member = zipfile.ZipInfo(file.name, _DATE)
            member.create_system, member.external_attr = _UNIX, _MODE << 16
            with open(file, "rb") as source, out.open(member, "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, CHUNK)


def begins_as_archive(path: Path) -> bool:
    """Whether a file begins as one of ours: a member of the first name, stored, of our date. The rest may be
    damaged."""
    try:
        with open(path, "rb") as file:
            begin = file.read(30 + len(_FIRST))
    except OSError:
        return False
    kind = b"\0\0" + b"\0\0\x21\0"  # not compressed; midnight of 1980-01-01
    return begin[:4] == b"PK\3\4" and begin[8:14] == kind and begin[30:] == _FIRST.encode()


class _Bounded:
    """A file of which nobody reads much at a time, whatever lengths it tells."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, count: int = -1) -> bytes:
        found = self._file.read(min(count, CHUNK + 1) if count >= 0 else CHUNK + 1)
        if len(found) > CHUNK or count > CHUNK:
            raise ValueError(f"{count} bytes where at most {CHUNK} are expected")
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Archive:
    """An archive that was looked at, for reading; nothing of it is written anywhere."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ArtifactError: if it is no archive, or one of its members is not as `pack` writes it.
        """
        self.path = path
        self._file = open(path, "rb")
        try:
            if self._file.read(4) != b"PK\3\4" or self._at_end(22) != b"PK\5\6":
                raise ValueError("it does not begin and end as an archive")
            self._zip = zipfile.ZipFile(_Bounded(self._file))  # type: ignore[arg-type]
            self._members = self._checked(self._zip.infolist())
        except BaseException as error:
            self._file.close()
            if isinstance(error, Exception):  # of zipfile, on files that anybody may have made
                raise self._error(error) from error
            raise

    def close(self) -> None:
        self._file.close()

    def _at_end(self, back: int) -> bytes:
        self._file.seek(max(0, os.fstat(self._file.fileno()).st_size - back))
        return self._file.read(4)

    def _error(self, error: Exception) -> ArtifactError:
        if isinstance(error, ArtifactError):
            return error
        what = " ".join(str(error).split())[:200] or type(error).__name__
        return ArtifactError(
            f"{self.path} is truncated or altered, or no archive of graphopt: {what}"
        )

    def _checked(self, members: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
        left = os.fstat(self._file.fileno()).st_size
        found: dict[str, zipfile.ZipInfo] = {}
        if len(members) > MOST:
            raise ValueError(f"{len(members)} members, expected at most {MOST}")
        for one in members:
            if not NAME.fullmatch(one.orig_filename):
                raise ValueError(f"{one.orig_filename!r:.110} is no name of a file of an artifact")
            if one.filename in found:
                raise ValueError(f"{one.filename} is there twice")
            if one.compress_type != zipfile.ZIP_STORED or one.flag_bits & 1:
                raise ValueError(f"{one.filename} is compressed or encrypted")
            if one.external_attr >> 16 != _MODE:
                raise ValueError(f"{one.filename} is no ordinary file")
            left -= max(one.file_size, one.compress_size)
            if left < 0:
                raise ValueError(f"{one.filename} is said to have {one.file_size} bytes")
            found[one.filename] = one
        return found

    def _chunks(self, name: str) -> Iterator[bytes]:
        """The contents of a member."""
        try:
            with self._zip.open(self._members[name]) as file:
                while chunk := file.read(CHUNK):
                    yield chunk
        except Exception as error:  # of zipfile
            raise self._error(error) from error

    # -- as graphopt.artifact reads it ----------------------------------------------------------

    def names(self) -> set[str]:
        return {*self._members}

    def text(self, name: str, largest: int) -> str:
        """
        Raises:
            ArtifactError: if there is no such member, it has more than `largest` bytes, or is no text.
        """
        if name not in self._members:
            raise ArtifactError(f"{self.path}: {name} is missing")
        if self._members[name].file_size > largest:
            raise ArtifactError(
                f"{self.path}: {name} cannot be read: more than {largest >> 20} MiB"
            )
        try:
            return b"".join(self._chunks(name)).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ArtifactError(f"{self.path}: {name} cannot be read: {error}") from error

    def check(self, name: str, size: int | None, digest: str) -> None:
        """
        Raises:
            ArtifactError: if a member is missing, or has another size or sha256.
        """
        if name not in self._members:
            raise ArtifactError(f"{self.path}: {name!r:.110} is missing")
        if (found := self._members[name].file_size) != size:
            raise ArtifactError(f"{self.path}: {name} is truncated or altered: it has {found} bytes, "
                                f"expected {size}")  # fmt: skip
        inner = hashlib.sha256()
        for chunk in self._chunks(name):
            inner.update(chunk)
        if inner.hexdigest() != digest:
            raise ArtifactError(f"{self.path}: {name} is truncated or altered: its sha256 is not the "
                                "manifest's")  # fmt: skip

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        from safetensors.torch import load

        return load(b"".join(self._chunks(name)))
