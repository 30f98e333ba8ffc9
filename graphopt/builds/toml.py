"""Configuration files: TOML that pydantic checks; errors name the line and the nearest valid key."""

from __future__ import annotations

import difflib
import tomllib
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from graphopt.builds.errors import ConfigError

Location = tuple[str | int, ...]
LARGEST = 1 << 20  # bytes of a configuration


class Section(BaseModel):
    """A table of the file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


Schema = TypeVar("Schema", bound=Section)


class File(Generic[Schema]):
    """A configuration that was read, and where in the file everything is."""

    schema: ClassVar[type[Section]]
    config: Schema

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text = path, text
        self.folder = path.resolve().parent
        try:
            self.data = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise _not_toml(path, text, error) from None
        try:
            self.config = self.schema.model_validate(self.data)  # type: ignore[assignment]
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise self.error(*_said(first, self.data, self.schema)) from None
        self.check()

    @classmethod
    def read(cls, path: Path) -> Self:
        """
        Raises:
            ConfigError: naming the line, what was expected and what was found.
        """
        try:
            if path.stat().st_size > LARGEST:
                raise ConfigError(
                    f"{path}: more than {LARGEST >> 20} MiB, which is no configuration"
                )
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not a text file: {error}") from error
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
        return cls(path, text)

    def check(self) -> None:
        """What concerns several keys."""

    def error(self, where: Location, message: str) -> ConfigError:
        line = line_of(self.text, where)
        return ConfigError(f"{self.path}:{line}: {spelled(where)}: {message}")

    def within(self, path: str) -> Path:
        """A path of the file, which is relative to its folder."""
        return self.folder / path


def _not_toml(path: Path, text: str, error: Exception) -> ConfigError:
    """The parser puts the place last: "... (at line 3, column 5)"."""
    if isinstance(error, RecursionError):
        return ConfigError(f"{path}: not a TOML file: it is nested too deep")
    said, _, place = str(error).partition(" (at ")
    line = place.removeprefix("line ").partition(",")[0]
    if place.startswith("end of document"):
        line = str(len(text.splitlines()))
    return ConfigError(
        f"{path}{f':{line}' if line.isdigit() else ''}: not a TOML file: {said:.200}"
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?", or what there is, or nothing."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; expected one of {', '.join(known)}" if known else ""


def spelled(where: Location) -> str:
    """As in targets[0].backend."""
    text = ""
    for part in where:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "the file"


def _said(error: Any, data: Any, schema: type[BaseModel]) -> tuple[Location, str]:
    """Where, and what, in our words."""
    where, kind = error["loc"], error["type"]
    if kind == "missing":
        return where[:-1], f"{where[-1]} is missing"
    if kind == "extra_forbidden":
        section = _section(where[:-1], schema)
        known = () if section is None else section.model_fields
        return where, f"unknown key{nearest(str(where[-1]), known)}"
    written: list[str | int] = []
    for part in where:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            break  # at the end may be the name of one of several types
        written.append(part)
    message = error["msg"].removeprefix("Input ").replace("should be", "expected", 1)
    return tuple(written), f"{message}, found {data!r:.80}"


def _section(where: Location, schema: type[BaseModel]) -> type[BaseModel] | None:
    """The class of the table at a location."""
    found: type[BaseModel] | None = schema
    entry = False
    for part in where:
        if entry:  # of a list or a dictionary
            entry = False
            continue
        field = None if found is None else found.model_fields.get(str(part))
        if field is None:
            return None
        entry = typing.get_origin(field.annotation) in (dict, list)
        found = next(_classes(field.annotation), None)
    return found


def _classes(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for one in typing.get_args(annotation):
        yield from _classes(one)


def line_of(text: str, where: Location) -> int:
    """The line, from 1, on which a key begins, or else the table around it."""
    lines = text.splitlines(keepends=True)
    for depth in range(len(where), 0, -1):
        if _has(_parsed("".join(lines)), where[:depth]):
            break
    else:
        return 1
    low, high = (
        0,
        len(lines),
    )  # of lines at the beginning; those of `low` do not have the key, of `high` do
    while high - low > 1:
        middle = low + (high - low) // 2
        data = None
        while middle > low and (data := _parsed("".join(lines[:middle]))) is None:
            middle -= 1  # in the middle of a value
        if data is None:
            low = low + (high - low) // 2  # all between is one value
        elif _has(data, where[:depth]):
            high = middle
        else:
            low = middle
    return _begin(lines, high)


def _begin(lines: list[str], end: int) -> int:
    """The first line of what is complete with line `end`."""
    first = end - 1
    while first > 0 and _parsed("".join(lines[:first])) is None:
        first -= 1
    return first + 1


def _parsed(text: str) -> Any:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError):
        return None


def _has(data: Any, where: Location) -> bool:
    for part in where:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return False
    return True
