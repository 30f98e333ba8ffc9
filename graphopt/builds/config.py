"""`graphopt.toml`: what is built, from what, for which targets.

Unknown keys and wrong types are errors that name the line and the nearest valid key. Paths are relative to
the folder of the file.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import Field

from graphopt.builds import toml
from graphopt.builds.toml import Location, Section, nearest

DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
          "complex64", "complex128")  # fmt: skip
MOST = 1 << 31  # elements of an input


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
    export: list[Literal["onnx", "openvino", "pt2", "aotinductor"]] = Field(default_factory=list)
    budget: Budget = Budget()


class Build(Section):
    """Where results go."""

    output: str = Field("build", description="a folder")
    lock: str = Field("graphopt.lock", description="a file")
    archive: bool = Field(False, description="each artifact is one file, NAME.gopt.zip")


class Config(Section):
    """The whole file."""

    model: Model
    inputs: dict[str, Input] = Field(default_factory=dict)
    dimensions: dict[str, Dimension] = Field(default_factory=dict)
    calibration: Calibration | None = None
    verify: Verify = Verify()
    build: Build = Build()
    targets: list[Target] = Field(default=[Target()], min_length=1)


class File(toml.File[Config]):
    """A configuration that was read, and where in the file everything is."""

    schema = Config

    def check(self) -> None:
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


def read(path: Path) -> File:
    """The configuration in a file.

    Raises:
        ConfigError: naming the line, what was expected and what was found.
    """
    return File.read(path)
