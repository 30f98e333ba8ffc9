"""What a configuration names, loaded: the model and its weights, inputs, data."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.builds.config import File, Location, nearest
from graphopt.builds.errors import BuildError
from graphopt.ir.inputs import declared_inputs
from graphopt.ir.source import first_line
from graphopt.sources import SourceError, import_object, load_source

Draw = tuple[tuple[Any, ...], dict[str, Any]]
SAFETENSORS = ".safetensors"


@dataclasses.dataclass
class Given:
    """A model in eval mode; example inputs, which may be none, and what of their sizes is dynamic; data;
    and the sha256 of all weights."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any
    data: Sequence[tuple[Any, Any]]
    weights_hash: str


def load(file: File) -> Given:
    """Everything that the builds of all targets share.

    Raises:
        ConfigError: naming the line of what cannot be loaded.
    """
    config = file.config
    try:
        model, args, kwargs = load_source(_source(file), trust=config.model.trust)
    except SourceError as error:
        raise file.error(("model", "source"), str(error)) from error
    if config.model.weights is not None:
        _load_weights(file, model, file.within(config.model.weights))
    shapes = None
    if config.inputs:
        _check_names(file, model)
        args, kwargs = (), draw(file, 0)
        shapes = dynamic_shapes(file)
    elif not args and not kwargs and declared_inputs(model) == (None, None):
        raise file.error(
            ("model", "source"), "the source declares no example inputs; expected [inputs]"
        )
    return Given(model.eval(), args, kwargs, shapes, _data(file), hash_of(model))


def _source(file: File) -> str:
    """The source; a path is relative to the file."""
    text = file.config.model.source
    path = file.within(text)
    return str(path) if path.exists() else text


def hash_of(model: nn.Module) -> str:
    """The sha256 of names, dtypes, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            plain = tensor.detach().cpu().contiguous()
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# -- inputs -------------------------------------------------------------------------------------


def draw(file: File, seed: int) -> dict[str, Any]:
    """Inputs of the configured shapes, the same for the same seed: normal draws, integers below `high`,
    fair coins."""
    generator = torch.Generator().manual_seed(seed)
    config, found = file.config, {}
    for name, one in config.inputs.items():
        shape = [_example(file, size) if isinstance(size, str) else size for size in one.shape]
        dtype: torch.dtype = getattr(torch, one.dtype)
        if dtype.is_floating_point or dtype.is_complex:
            wide = torch.complex128 if dtype.is_complex else torch.float64
            found[name] = torch.randn(shape, generator=generator, dtype=wide).to(dtype)
        else:
            high = one.high or 2
            found[name] = torch.randint(0, high, shape, generator=generator).to(dtype)
    return found


def _example(file: File, name: str) -> int:
    known = file.config.dimensions.get(name)
    return 2 if known is None else known.example


def dynamic_shapes(file: File) -> dict[str, Any]:
    """As `torch.export.export` takes them."""
    config, dims, found = file.config, {}, {}
    for name, one in config.inputs.items():
        axes = {}
        for axis, size in enumerate(one.shape):
            if isinstance(size, str):
                if size not in dims:
                    known = config.dimensions.get(size)
                    ends = {} if known is None else {"min": known.min, "max": known.max}
                    dims[size] = torch.export.Dim(size, **ends)
                axes[axis] = dims[size]
        found[name] = axes
    return found


def _check_names(file: File, model: nn.Module) -> None:
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return
    known = [
        one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.POSITIONAL_ONLY)
    ]
    for name in file.config.inputs:
        if name not in known:
            raise file.error(("inputs", name), f"forward of {type(model).__name__} has no parameter of "
                             f"this name{nearest(name, known)}")  # fmt: skip
    for one in parameters:
        if one.name in known and one.default is one.empty and one.name not in file.config.inputs:
            raise file.error(
                ("inputs",), f"forward of {type(model).__name__} needs {one.name!r} too"
            )


# -- weights ------------------------------------------------------------------------------------


def _load_weights(file: File, model: nn.Module, path: Path) -> None:
    where: Location = ("model", "weights")
    found = tensors(file, where, path)
    expected = {name: one for name, one in model.state_dict().items() if isinstance(one, Tensor)}
    for what, names in (
        ("lacks", expected.keys() - found),
        ("has no place for", found.keys() - expected),
    ):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (
                f" and {len(names) - 3} more" if len(names) > 3 else ""
            )
            whose = path.name if what == "lacks" else f"{type(model).__name__} of the source"
            raise file.error(where, f"{whose} {what} {shown}")
    for name, one in found.items():
        if one.shape != expected[name].shape:
            raise file.error(where, f"{path.name}: {name} has the shape {tuple(one.shape)}, expected "
                             f"{tuple(expected[name].shape)}")  # fmt: skip
        if (one.is_floating_point() or one.is_complex()) and not bool(one.isfinite().all()):
            raise file.error(where, f"{path.name}: {name} is not finite everywhere")
    model.load_state_dict(found)


def tensors(file: File, where: Location, path: Path) -> dict[str, Tensor]:
    """The tensors by name in a safetensors file, a state_dict of `torch.save`, or an npz file. No code in
    any of them is run.

    Raises:
        ConfigError: if it is none, or damaged.
    """
    if not path.is_file():
        raise file.error(where, f"{path.name} is not a file in {path.parent.name or path.parent}")
    try:
        found = _read_tensors(path)
    except BuildError:
        raise
    except Exception as error:  # of three libraries, on files that anybody may have made
        raise file.error(where, f"{path.name} cannot be read: {first_line(error)}") from error
    if not isinstance(found, Mapping) or not all(isinstance(one, str) for one in found):
        raise file.error(
            where, f"{path.name} holds {type(found).__name__}, expected tensors by name"
        )
    plain = {name: one for name, one in found.items() if isinstance(one, Tensor)}
    if other := sorted(found.keys() - plain):
        raise file.error(
            where, f"{path.name}: {other[0]} is {type(found[other[0]]).__name__}, expected a tensor"
        )
    return plain


def _read_tensors(path: Path) -> Any:
    if path.suffix == SAFETENSORS:
        from safetensors.torch import load_file

        return load_file(path)
    if path.suffix == ".npz":
        import numpy as np

        with zipfile.ZipFile(path) as archive:
            _bounded(path, archive)
        with np.load(path, allow_pickle=False) as data:
            return {name: torch.from_numpy(data[name]) for name in data.files}
    return torch.load(path, map_location="cpu", weights_only=True)


RATIO = 100  # by which a stored array may be compressed


def _bounded(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse archives that grow out of proportion."""
    size = sum(one.file_size for one in archive.infolist())
    if size > RATIO * max(path.stat().st_size, 1 << 20):
        raise ValueError(f"{size >> 20} MiB in a file of {path.stat().st_size >> 10} KiB")


# -- data ---------------------------------------------------------------------------------------


def _data(file: File) -> Sequence[tuple[Any, Any]]:
    given = file.config.calibration
    if given is None:
        return ()
    if given.callable is not None:
        where: Location = ("calibration", "callable")
        try:
            found = list(import_object(given.callable, "expected package.module:callable")())
        except SourceError as error:
            raise file.error(where, str(error)) from error
        except Exception as error:
            raise file.error(
                where, f"{given.callable} raised {type(error).__name__}: {first_line(error)}"
            ) from error
        for number, one in enumerate(found):
            if not isinstance(one, tuple) or len(one) != 2:
                raise file.error(
                    where, f"entry {number} is {type(one).__name__}, expected (inputs, target)"
                )
        return found
    where = ("calibration", "file")
    samples = tensors(file, where, file.within(str(given.file)))
    if samples.keys() != file.config.inputs.keys():
        raise file.error(
            where,
            f"it holds {', '.join(samples) or 'nothing'}; expected {', '.join(file.config.inputs)}",
        )
    counts = {name: len(one) if one.ndim else 0 for name, one in samples.items()}
    if len(set(counts.values())) != 1 or not all(counts.values()):
        raise file.error(
            where, f"expected as many samples of every input, found {json.dumps(counts)}"
        )
    parts = {name: torch.split(one, given.batch) for name, one in samples.items()}
    return [
        (dict(zip(parts, rows, strict=True)), None) for rows in zip(*parts.values(), strict=True)
    ]
