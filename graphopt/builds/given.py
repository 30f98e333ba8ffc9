"""What a configuration names, loaded: the model and its weights, inputs, data."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from graphopt.builds.config import File
from graphopt.builds.errors import BuildError
from graphopt.builds.toml import Location, nearest
from graphopt.ir.inputs import declared_inputs
from graphopt.ir.source import first_line
from graphopt.module import OptimizedModule
from graphopt.sources import SourceError, import_object, load_source

Draw = tuple[tuple[Any, ...], dict[str, Any]]
SAFETENSORS = ".safetensors"


@dataclasses.dataclass
class Given:
    """A model in eval mode; example inputs, which may be none, and what of their sizes is dynamic; data;
    and the sha256 of all weights and data."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any
    data: Sequence[tuple[Any, Any]]
    hashes: dict[str, str]


def load(file: File) -> Given:
    """Everything that the builds of all targets share.

    Raises:
        ConfigError: naming the line of what cannot be loaded.
    """
    config = file.config
    if config.model.source.endswith(".pt2") and not config.model.trust:
        raise file.error(("model", "source"), "loading a .pt2 file can execute code stored in it; "
                         "trust = true allows it")  # fmt: skip
    try:
        model, args, kwargs = load_source(_source(file), trust=config.model.trust)
    except SourceError as error:
        raise file.error(("model", "source"), str(error)) from error
    if isinstance(model, OptimizedModule) and model.graph_module is not None:
        model = model.graph_module  # its inputs have names
    if config.model.weights is not None:
        _load_weights(file, model, file.within(config.model.weights))
    else:
        _check_finite(file, ("model", "source"), config.model.source, model)
    shapes = None
    if config.inputs:
        _check_names(file, model)
        args, kwargs = (), draw(file, 0)
        shapes = dynamic_shapes(file)
    elif not args and not kwargs and declared_inputs(model) == (None, None):
        raise file.error(
            ("model", "source"), "the source declares no example inputs; expected [inputs]"
        )
    with suppress(NotImplementedError):  # an exported program has one mode
        model.eval()
    data = _data(file)
    hashes = {"weights": hash_of(model.state_dict())}
    if data:
        leaves = pytree.tree_leaves(data)
        hashes["calibration"] = hash_of({f"{index:09}": one for index, one in enumerate(leaves)})
    return Given(model, args, kwargs, shapes, data, hashes)


def _source(file: File) -> str:
    """The source; a path is relative to the file."""
    text = file.config.model.source
    path = file.within(text)
    return str(path) if path.exists() else text


def hash_of(named: Mapping[str, Any]) -> str:
    """The sha256 of names, dtypes, shapes and bytes of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named.items()):
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
        shape = [file.example(size) if isinstance(size, str) else size for size in one.shape]
        dtype: torch.dtype = getattr(torch, one.dtype)
        if dtype.is_floating_point or dtype.is_complex:
            wide = torch.complex128 if dtype.is_complex else torch.float64
            found[name] = torch.randn(shape, generator=generator, dtype=wide).to(dtype)
        else:
            high = one.high or 2
            found[name] = torch.randint(0, high, shape, generator=generator).to(dtype)
    return found


def dynamic_shapes(file: File) -> dict[str, Any]:
    """Of every input, the dimensions of its axes as `torch.export.export` takes them."""
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
    if rest := [one.name for one in parameters if one.kind is one.VAR_KEYWORD]:
        named = {one.name for one in parameters} - {*rest}
        for name, given in file.config.inputs.items():
            if name not in named and any(isinstance(size, str) for size in given.shape):
                raise file.error(("inputs", name, "shape"), f"forward takes it by **{rest[0]}, of which no "
                                 "size may be dynamic; expected numbers")  # fmt: skip
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
        if one.dtype.is_complex and not expected[name].dtype.is_complex:
            raise file.error(
                where, f"{path.name}: {name} is complex, expected {expected[name].dtype}"
            )
    model.load_state_dict(found)
    _check_finite(file, where, path.name, model)


def _check_finite(file: File, where: Location, whose: str, model: nn.Module) -> None:
    """No weight is infinite or not a number; buffers may be infinite, as masks are."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, one in model.state_dict().items():
        if isinstance(one, Tensor) and (one.is_floating_point() or one.is_complex()):
            if bool(one.isnan().any()) or (name in parameters and bool(one.isinf().any())):
                raise file.error(where, f"{whose}: {name} is not finite everywhere")


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
    for name, one in found.items():
        if not isinstance(one, Tensor):
            raise file.error(
                where, f"{path.name}: {name} is {type(one).__name__}, expected a tensor"
            )
        if one.layout is not torch.strided or one.device.type != "cpu" or one.is_quantized:
            raise file.error(where, f"{path.name}: {name} is no plain tensor")
        if one.untyped_storage().nbytes() < one.nbytes:
            raise file.error(where, f"{path.name}: {name} is larger than what is stored of it")
    return dict(found)


def _read_tensors(path: Path) -> Any:
    if path.suffix == SAFETENSORS:
        from safetensors.torch import load_file

        return load_file(path)
    if path.suffix == ".npz" or zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            _bounded(path, archive)
    if path.suffix == ".npz":
        import numpy as np

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
            raise file.error(where, f"{given.callable} raised {first_line(error)}") from error
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
