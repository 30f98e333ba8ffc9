"""An artifact as one file: a zip archive of a single form, so that the same contents are the same bytes, and
only what has exactly this form is believed.

    header, graph.json, header, manifest.json, ..., directory

Members stand in the order of their names, stored and not compressed, with one date, one mode and sizes of
64 bits; each begins at a multiple of 64 bytes, where it can be mapped. From the names, sizes and checksums
in the directory of an archive follow all bytes that are no contents, and they are compared with those that
there are: nothing can be twice, overlap, lie in a gap, be a link, or be larger than the file.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from graphopt.artifact_data import ArtifactError

if TYPE_CHECKING:
    import torch

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")  # of a file of an artifact
MOST = 1000  # members
ALIGNED = 64  # bytes
CHUNK = 1 << 20
_WIDE, _BIT16, _BIT32 = (
    1,
    0xFFFF,
    0xFFFFFFFF,
)  # the field with sizes of 64 bits, and what stands for it
_PADDING = 0xD935
_VERSION, _DATE, _MODE = 45, 0x21, 0o100644 << 16  # of the format; 1980-01-01; an ordinary file

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LOCAL_SIZES, _CENTRAL_SIZES = struct.Struct("<2H2Q"), struct.Struct("<2H3Q")
_END = struct.Struct("<4sQ2H2I4Q4sIQI4s4H2IH")  # with 64 bits, its locator, and that of 32 bits


class Member(NamedTuple):
    name: str
    size: int
    crc: int


class Layout(NamedTuple):
    """All bytes of an archive that are no contents: of each member its header, where that begins, and where
    the contents do; the directory, and where it begins."""

    headers: list[tuple[int, bytes]]
    contents: list[int]
    directory: bytes
    end: int


def layout(members: list[Member]) -> Layout:
    """The one form of an archive of these members."""
    place, headers, contents, directory = 0, [], [], b""
    for name, size, crc in members:
        encoded = name.encode("ascii")
        fixed = place + _LOCAL.size + len(encoded) + _LOCAL_SIZES.size + 4
        padding = -fixed % ALIGNED
        sizes = _LOCAL_SIZES.pack(_WIDE, 16, size, size)
        extra = sizes + struct.pack("<2H", _PADDING, padding) + bytes(padding)
        common = (_VERSION, 0, 0, 0, _DATE, crc, _BIT32, _BIT32, len(encoded))
        header = _LOCAL.pack(b"PK\3\4", *common, len(extra)) + encoded + extra
        wide = _CENTRAL_SIZES.pack(_WIDE, 24, size, size, place)
        directory += _CENTRAL.pack(
            b"PK\1\2", 3 << 8 | _VERSION, *common, len(wide), 0, 0, 0, _MODE, _BIT32
        )
        directory += encoded + wide
        headers.append((place, header))
        contents.append(place + len(header))
        place += len(header) + size
    count, size = len(members), len(directory)
    directory += _END.pack(
        b"PK\6\6", 44, 3 << 8 | _VERSION, _VERSION, 0, 0, count, count, size, place,
        b"PK\6\7", 0, place + size, 1,
        b"PK\5\6", 0, 0, _BIT16, _BIT16, _BIT32, _BIT32, 0,
    )  # fmt: skip
    return Layout(headers, contents, directory, place)


def is_archive(path: Path) -> bool:
    """Whether an artifact of this name is one file."""
    return path.suffix == ".zip"


def pack(folder: Path, path: Path) -> None:
    """Write the files of a folder as an archive."""
    files = sorted(folder.iterdir(), key=lambda one: one.name)
    members = [Member(one.name, one.stat().st_size, _crc(one)) for one in files]
    form = layout(members)
    with open(path, "wb") as out:
        for one, (_, header) in zip(files, form.headers, strict=True):
            out.write(header)
            with open(one, "rb") as file:
                while chunk := file.read(CHUNK):
                    out.write(chunk)
        out.write(form.directory)


def _crc(path: Path) -> int:
    found = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            found = zlib.crc32(chunk, found)
    return found


def begins_as_archive(path: Path) -> bool:
    """Whether a file begins with a header of ours; the rest may be damaged."""
    try:
        with open(path, "rb") as file:
            begin = file.read(_LOCAL.size + 100)
        length = _LOCAL.unpack_from(begin)[9]
        name = begin[_LOCAL.size :][:length].decode("ascii")
        (_, header), *_ = layout([Member(name, *_size_and_crc(begin, length))]).headers
        return header.startswith(begin[: _LOCAL.size + length])
    except (OSError, ValueError, struct.error):
        return False


def _size_and_crc(header: bytes, length: int) -> tuple[int, int]:
    return _LOCAL_SIZES.unpack_from(header, _LOCAL.size + length)[2], _LOCAL.unpack_from(header)[6]


class Archive:
    """An archive that was looked at, for reading; nothing of it is written anywhere."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ArtifactError: naming what is not as `pack` writes it.
        """
        self.path = path
        self._file = open(path, "rb")
        try:
            members = self._members()
            form = layout(members)
            size = os.fstat(self._file.fileno()).st_size
            if form.end + len(form.directory) != size:
                raise self._error(f"it has {size} bytes, expected {form.end + len(form.directory)}")
            if self._at(form.end, len(form.directory)) != form.directory:
                raise self._error("its directory is another one")
            for (place, header), one in zip(form.headers, members, strict=True):
                if self._at(place, len(header)) != header:
                    raise self._error(f"the header of {one.name} is another one")
        except BaseException:
            self._file.close()
            raise
        self._places = dict(zip((one.name for one in members), form.contents, strict=True))
        self._known = {one.name: one for one in members}

    def close(self) -> None:
        self._file.close()

    def _error(self, what: str) -> ArtifactError:
        return ArtifactError(
            f"{self.path} is truncated or altered, or no archive of graphopt: {what}"
        )

    def _at(self, place: int, size: int) -> bytes:
        self._file.seek(place)
        return self._file.read(size)

    def _members(self) -> list[Member]:
        """Names, sizes and checksums, as far as the directory can be read."""
        size = os.fstat(self._file.fileno()).st_size
        if size < _END.size:
            raise self._error(f"it has {size} bytes")
        end = _END.unpack(self._at(size - _END.size, _END.size))
        count, length, place = end[6], end[8], end[9]
        if end[0] != b"PK\6\6" or end[10] != b"PK\6\7" or end[14] != b"PK\5\6":
            raise self._error("it has no directory")
        if count > MOST or length > MOST * 200 or place + length + _END.size != size:
            raise self._error(f"{count} members, a directory of {length} bytes at {place}")
        found: list[Member] = []
        data = self._at(place, length)
        while data:
            if len(data) < _CENTRAL.size:
                raise self._error("its directory ends in an entry")
            entry = _CENTRAL.unpack_from(data)
            name = data[_CENTRAL.size :][: entry[10]].decode("latin-1")
            sizes = data[_CENTRAL.size + entry[10] :][: _CENTRAL_SIZES.size]
            if not NAME.fullmatch(name) or len(sizes) < _CENTRAL_SIZES.size:
                raise self._error(f"{name!r:.110} is no name of a file of an artifact")
            if found and found[-1].name >= name:
                raise self._error(f"{name} stands behind {found[-1].name}")
            wide = _CENTRAL_SIZES.unpack(sizes)[2]
            if wide > size:
                raise self._error(f"{name} is said to have {wide} bytes, the file has {size}")
            found.append(Member(name, wide, entry[7]))
            data = data[_CENTRAL.size + entry[10] + _CENTRAL_SIZES.size :]
        return found

    def _chunks(self, name: str) -> Iterator[bytes]:
        """The contents of a member, checked against its checksum at the end."""
        one, crc = self._known[name], 0
        place, left = self._places[name], one.size
        while left:
            chunk = self._at(place, min(left, CHUNK))
            if not chunk:
                raise self._error(f"{name} ends too early")
            crc = zlib.crc32(chunk, crc)
            place, left = place + len(chunk), left - len(chunk)
            yield chunk
        if crc != one.crc:
            raise self._error(f"{name} has another checksum")

    # -- as graphopt.artifact reads it ----------------------------------------------------------

    def names(self) -> set[str]:
        return {*self._known}

    def text(self, name: str, largest: int) -> str:
        """
        Raises:
            ArtifactError: if there is no such member, it has more than `largest` bytes, or is no text.
        """
        if name not in self._known:
            raise ArtifactError(f"{self.path}: {name} is missing")
        if self._known[name].size > largest:
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
        if name not in self._known:
            raise ArtifactError(f"{self.path}: {name!r:.110} is missing")
        if (found := self._known[name].size) != size:
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
