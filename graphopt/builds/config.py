"""`graphopt.toml`: what is built, from what, for which targets.

Unknown keys and wrong types are errors that name the line and the nearest valid key. Paths are relative to
the folder of the file.
"""

from __future__ import annotations

import difflib
import math
import tomllib
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graphopt.builds.errors import ConfigError

Location = tuple[str | int, ...]
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
          "complex64", "complex128")  # fmt: skip
LARGEST = 1 << 20  # bytes of a configuration
MOST = 1 << 31  # elements of an input


class Section(BaseModel):
    """A table of the file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Model(Section):
    """Where the model comes from."""

    source: str = Field(min_length=1, description="package.module:callable, torchvision:NAME, timm:NAME, "
                        "a saved graphopt model, or a .pt2 file (which needs trust)")  # fmt: skip
    weights: str | None = Field(
        None, description="a safetensors file, or a state_dict of torch.save"
    )
    trust: bool = Field(False, description="load a .pt2 file, which can execute code stored in it")


class Input(Section):
    """An input of the model, by the name of its parameter."""

    shape: list[int | str] = Field(
        description="sizes; a name is a dimension that may differ from call to call"
    )
    dtype: Literal[DTYPES] = "float32"  # type: ignore[valid-type]
    high: int | None = Field(None, gt=0, description="integers are drawn from 0 to high - 1")


class Dimension(Section):
    """A size that may differ from call to call."""

    example: int = Field(
        2, ge=2, description="the size that the model is captured with; 0 and 1 would stay"
    )
    min: int = Field(1, ge=0)
    max: int | None = None


class Calibration(Section):
    """Data that lossy passes are measured on and fitted to."""

    file: str | None = Field(
        None, description="npz or safetensors: a tensor for every input, samples first"
    )
    callable: str | None = Field(
        None, description="package.module:callable that returns [(inputs, target), ...]"
    )
    batch: int = Field(8, ge=1, description="samples in a batch, of a file")


class Verify(Section):
    """When a result counts as right."""

    limit: float = Field(1e-10, gt=0, description="of the relative error in float64")
    inputs: int = Field(
        2, ge=1, description="how many draws of inputs the stored artifact is compared on"
    )
    rolled_back: Literal["fail", "allow"] = Field(
        "fail", description="rewrites that were taken back at a site"
    )


class Budget(Section):
    """What a target may cost; more ends the build with exit code 5."""

    error: float | None = Field(None, gt=0, description="of outputs against float64, relative")
    parameters: int | None = Field(None, ge=0, description="that the result has at most")
    bytes: int | None = Field(None, ge=0, description="of the artifact")
    seconds: float | None = Field(None, gt=0, description="for optimizing")


class Target(Section):
    """One artifact."""

    name: str = Field("model", pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")
    mode: Literal["deploy", "tune"] = "deploy"
    passes: str | None = Field(None, description="a pipeline; by default that of the mode")
    backend: str = "eager"
    precision: Literal["bf16", "int8"] | None = None
    export: list[Literal["onnx", "openvino", "pt2", "aotinductor"]] = []
    budget: Budget = Budget()


class Build(Section):
    """Where results go."""

    output: str = Field("build", description="a folder")
    lock: str = Field("graphopt.lock", description="a file")
    archive: bool = Field(False, description="each artifact is one file, NAME.gopt.zip")


class Config(Section):
    """The whole file."""

    model: Model
    inputs: dict[str, Input] = {}
    dimensions: dict[str, Dimension] = {}
    calibration: Calibration | None = None
    verify: Verify = Verify()
    build: Build = Build()
    targets: list[Target] = Field(default=[Target()], min_length=1)


class File:
    """A configuration that was read, and where in the file everything is."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text = path, text
        self.folder = path.resolve().parent
        try:
            self.data = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise _not_toml(path, text, error) from None
        try:
            self.config = Config.model_validate(self.data)
        except ValidationError as error:
            raise self.error(*_said(error.errors(include_url=False)[0], self.data)) from None
        self._check()

    def error(self, where: Location, message: str) -> ConfigError:
        line = line_of(self.text, where)
        return ConfigError(f"{self.path}:{line}: {spelled(where)}: {message}")

    def _check(self) -> None:
        """What concerns several keys."""
        config, names = self.config, set()
        paths = {("model", "source"): config.model.source, ("model", "weights"): config.model.weights,
                 ("build", "output"): config.build.output, ("build", "lock"): config.build.lock}  # fmt: skip
        for place, value in paths.items():
            if value is not None and not (value and value.isprintable()):
                raise self.error(place, f"expected a name, found {value!r:.80}")
        for number, target in enumerate(config.targets):
            if target.name in names:
                raise self.error(("targets", number, "name"), f"{target.name!r} is taken already")
            names.add(target.name)
        used = set()
        for name, one in config.inputs.items():
            for size in one.shape:
                where: Location = ("inputs", name, "shape")
                if isinstance(size, int) and size < 0:
                    raise self.error(where, f"a size is {size}, expected at least 0")
                if isinstance(size, str):
                    used.add(size)
                    if not size.isidentifier():
                        raise self.error(where, f"{size!r} is no name of a dimension")
                    if size not in config.dimensions and config.dimensions:
                        near = nearest(size, config.dimensions)
                        raise self.error(where, f"there is no dimension {size!r}{near}")
            self._check_size(name, one)
            bits = one.dtype.lstrip("uint") if one.dtype.startswith(("int", "uint")) else ""
            if bits and one.high is None:
                raise self.error(
                    ("inputs", name), f"{one.dtype} needs high: values are drawn below it"
                )
            if one.high is not None:
                signed = one.dtype.startswith("int")
                most = min(1 << (int(bits) - signed), (1 << 63) - 1) if bits else 0
                if one.high > most:
                    raise self.error(
                        ("inputs", name, "high"),
                        f"expected at most {most} for {one.dtype}, found {one.high}",
                    )
        for name, dimension in config.dimensions.items():
            where = ("dimensions", name)
            if name not in used:
                raise self.error(where, f"no input has this dimension{nearest(name, used)}")
            most = dimension.max
            if not dimension.min <= dimension.example or (
                most is not None and most < dimension.example
            ):
                raise self.error(where, f"expected min <= example <= max, found {dimension.min}, "
                                 f"{dimension.example}, {most}")  # fmt: skip
        data = config.calibration
        if data is not None and (data.file is None) == (data.callable is None):
            raise self.error(("calibration",), "expected either file or callable")
        if data is not None and data.file is not None and not config.inputs:
            raise self.error(("calibration", "file"), "a file needs [inputs], whose names it uses")

    def _check_size(self, name: str, given: Input) -> None:
        sizes = [self.example(one) if isinstance(one, str) else one for one in given.shape]
        if math.prod(sizes) > MOST:
            raise self.error(
                ("inputs", name, "shape"), f"{math.prod(sizes)} elements, expected at most {MOST}"
            )

    def example(self, dimension: str) -> int:
        """The size that the model is captured with."""
        known = self.config.dimensions.get(dimension)
        return 2 if known is None else known.example

    def within(self, path: str) -> Path:
        """A path of the file, which is relative to its folder."""
        return self.folder / path


def read(path: Path) -> File:
    """The configuration in a file.

    Raises:
        ConfigError: naming the line, what was expected and what was found.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ConfigError(f"{path}: more than {LARGEST >> 20} MiB, which is no configuration")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    return File(path, text)


# -- errors -------------------------------------------------------------------------------------


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


def _said(error: Any, data: Any) -> tuple[Location, str]:
    """Where, and what, in our words."""
    where = tuple(
        part for part in error["loc"] if isinstance(part, int) or _is_key(part, error["loc"])
    )
    kind = error["type"]
    if kind == "extra_forbidden":
        section = _section(where[:-1])
        known = () if section is None else section.model_fields
        return where, f"unknown key{nearest(str(where[-1]), known)}"
    if kind == "missing":
        return where[:-1], f"{where[-1]} is missing"
    found: Any = data
    for part in where:
        try:
            found = found[part]
        except (KeyError, IndexError, TypeError):
            break
    message = error["msg"].removeprefix("Input ").replace("should be", "expected", 1)
    return where, f"{message}, found {found!r:.80}"


def _is_key(part: str, where: Location) -> bool:
    """Not the name of an alternative of a union, which pydantic adds at the end."""
    return not (part in ("int", "str") and where[-1] == part and isinstance(where[-2], int))


def _section(where: Location) -> type[BaseModel] | None:
    """The class of the table at a location."""
    found: type[BaseModel] | None = Config
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
