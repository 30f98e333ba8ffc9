"""The SOURCE of a model on the command line: from a text to a module and example inputs.

- `package.module:callable`: returns a module, or (module, example inputs); `.` is importable
- `torchvision:NAME`, `timm:NAME`: random weights, batch norms as `randomize_norms` leaves them
- a path: a model saved by graphopt, or, if trusted, a `.pt2` file
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from graphopt.ir.process import seeded
from graphopt.torchvision_ops import declare_missing_ops

Source = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

_EXPECTED = "expected package.module:callable, torchvision:NAME, timm:NAME or a saved model"
_IMAGE_SIZE = {"inception_v3": 299}  # torchvision's other models were trained at 224


class SourceError(ValueError):
    """A source that gives no model; the message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def load_source(text: str, *, trust: bool = False) -> Source:
    """The module that `text` names, and the (args, kwargs) it declares as example inputs.

    Empty args and kwargs mean that the source declares none. Models are in eval mode, and the same
    text gives the same weights and inputs every time.

    Raises:
        SourceError: if `text` names no model, or naming it is not enough to load it.
    """
    kind, colon, name = text.partition(":")
    if colon and kind in _LIBRARIES:
        with seeded(0), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about defaults of weights and initialization
            return _LIBRARIES[kind](name)
    if text.endswith(".pt2") or not colon or os.path.exists(text):
        return _from_file(Path(text), trust)
    if not (kind and name):
        raise SourceError(f"{text!r} names no model; {_EXPECTED}")
    with seeded(0):
        return _from_callable(kind, name)


@torch.no_grad()
def randomize_norms(model: nn.Module, seed: int = 0, inputs: tuple[Any, ...] | None = None) -> None:
    """Give every batch norm statistics and affine parameters that no rewrite can get right by luck.

    running_mean ~ N(0, 0.5), running_var ~ U[0.5, 2], |weight| ~ U[0.5, 1.5] with a random sign
    and 5% zeros, bias ~ N(0, 0.3): all modules with running statistics, frozen ones included. With
    `inputs`, the model runs once and the statistics of each norm are scaled to the root mean square
    of what reaches it, as training would have done: without, activations of deep residual networks
    grow until the parameters of early layers no longer matter.
    """
    draw = torch.Generator().manual_seed(seed)
    norms: list[Any] = [one for one in model.modules() if _has_statistics(one)]
    for norm in norms:
        size = norm.running_mean.shape
        signs = torch.where(torch.rand(size, generator=draw) < 0.5, -1.0, 1.0)
        signs[torch.rand(size, generator=draw) < 0.05] = 0.0
        weight = signs * (0.5 + torch.rand(size, generator=draw))
        bias = 0.3 * torch.randn(size, generator=draw)
        norm.running_mean.copy_(0.5 * torch.randn(size, generator=draw))
        norm.running_var.copy_(0.5 + 1.5 * torch.rand(size, generator=draw))
        for name, value in (("weight", weight), ("bias", bias)):
            if isinstance(getattr(norm, name, None), torch.Tensor):
                getattr(norm, name).copy_(value)
    if inputs is not None:
        _scale_statistics(model, norms, inputs)


def _has_statistics(module: nn.Module) -> bool:
    return all(
        isinstance(getattr(module, name, None), torch.Tensor)
        for name in ("running_mean", "running_var")
    )


def _scale_statistics(model: nn.Module, norms: list[Any], inputs: tuple[Any, ...]) -> None:
    def scale(norm: Any, args: tuple[Any, ...]) -> None:
        hooks.pop(norm).remove()  # a norm that is called twice is scaled to its first input
        size = float(args[0].double().square().mean().sqrt())
        if 0 < size < float("inf"):
            norm.running_mean.mul_(size)
            norm.running_var.mul_(size**2)

    hooks = {norm: norm.register_forward_pre_hook(scale) for norm in norms}
    training = model.training
    try:
        model.eval()(*inputs)
    finally:
        model.train(training)
        for hook in hooks.values():
            hook.remove()


# -- libraries ----------------------------------------------------------------------------------


def _from_torchvision(name: str) -> Source:
    models = _library("torchvision").models
    known = models.list_models(module=models)
    known += models.list_models(module=models.segmentation)
    if name not in known and name in models.list_models():
        raise SourceError(
            f"torchvision:{name} is not a classifier or a segmentation model; name a callable "
            "that returns (module, example inputs) instead"
        )
    _check_known("torchvision", name, known)
    weights = {
        key: None
        for key in ("weights", "weights_backbone")
        if key in inspect.signature(models.get_model_builder(name)).parameters
    }
    size = _IMAGE_SIZE.get(name, 224)
    return _image_model(models.get_model(name, **weights), (3, size, size))


def _from_timm(name: str) -> Source:
    timm = _library("timm")
    if not timm.is_model(name):
        _check_known("timm", name, timm.list_models())
    model = timm.create_model(name, pretrained=False)
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    return _image_model(model, config.get("input_size", (3, 224, 224)))


def _image_model(model: nn.Module, shape: Iterable[int]) -> Source:
    image = torch.randn(1, *shape)
    randomize_norms(model, inputs=(image,))
    return model.eval(), (image,), {}


_LIBRARIES: dict[str, Callable[[str], Source]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
}


def _library(name: str) -> Any:
    declare_missing_ops()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise SourceError(f"{name} cannot be imported: {error}") from error
        raise SourceError(f"{name} is not installed: pip install {name}") from error
    except Exception as error:
        raise SourceError(f"{name} cannot be imported: {_brief(error)}") from error


def _check_known(library: str, name: str, known: list[str]) -> None:
    if name not in known:
        raise SourceError(f"{library} has no model {name!r}{_nearest(name, known)}")


# -- callables ----------------------------------------------------------------------------------


def _from_callable(path: str, name: str) -> Source:
    source = f"{path}:{name}"
    found = import_object(source, _EXPECTED)
    if not callable(found):
        raise SourceError(f"{source} is of type {type(found).__name__}, expected a callable")
    try:
        result = found if isinstance(found, nn.Module) else found()
    except Exception as error:
        raise SourceError(f"{source} raised {_brief(error)}") from error
    model, inputs = result, ()
    if isinstance(result, (tuple, list)) and len(result) == 2:
        model, inputs = result
    if not isinstance(model, nn.Module):
        raise SourceError(
            f"{source} returned {type(result).__name__}, expected an nn.Module or a pair of an "
            "nn.Module and its example inputs"
        )
    model.eval()
    if isinstance(inputs, torch.Tensor):
        return model, (inputs,), {}
    if isinstance(inputs, Mapping):
        return model, (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return model, tuple(inputs), {}
    raise SourceError(
        f"{source} returned {type(inputs).__name__} as example inputs, expected a tuple"
    )


def import_object(text: str, expected: str) -> Any:
    """The object that `package.module:name` names; `.` is importable.

    Raises:
        SourceError: if there is none; `expected` says what else could have been given.
    """
    path, _, name = text.partition(":")
    found: Any = _import(path, expected)
    for part in name.split("."):
        if not hasattr(found, part):
            public = [one for one in dir(found) if not one.startswith("_")]
            raise SourceError(f"{text}: {path} has no {name!r}{_nearest(part, public)}")
        found = getattr(found, part)
    return found


def _import(path: str, expected: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    declare_missing_ops()  # the module may import torchvision
    importlib.invalidate_caches()
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is not None and (path == error.name or path.startswith(error.name + ".")):
            raise SourceError(
                f"no module {error.name!r} here or among the installed packages; {expected}"
            ) from error
        raise SourceError(f"importing {path} raised {_brief(error)}") from error
    except (Exception, SystemExit) as error:
        raise SourceError(f"importing {path} raised {_brief(error)}") from error


# -- files --------------------------------------------------------------------------------------


def _from_file(path: Path, trust: bool) -> Source:
    if not path.exists():
        raise SourceError(f"{path}: no such file; {_EXPECTED}")
    if path.suffix == ".pt2":
        return _from_exported(path, trust)
    from graphopt.artifact import ArtifactError, load

    try:
        model = load(path)
    except (ArtifactError, OSError) as error:
        raise SourceError(str(error)) from error
    except Exception as error:
        raise SourceError(f"{path} cannot be loaded: {_brief(error)}") from error
    args, kwargs = model.example_inputs()
    return model, tuple(args), dict(kwargs)


def _from_exported(path: Path, trust: bool) -> Source:
    if not trust:
        raise SourceError(
            f"{path}: loading a .pt2 file can execute code; pass --trust if you trust it"
        )
    if not zipfile.is_zipfile(path):
        raise SourceError(f"{path} is not a .pt2 file, or it is truncated")
    try:
        program = torch.export.load(path)
        module = program.module()
    except Exception as error:
        raise SourceError(f"{path} cannot be loaded: {_brief(error)}") from error
    args, kwargs = program.example_inputs or ((), {})
    return module, tuple(args), dict(kwargs)


# -- words --------------------------------------------------------------------------------------


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; nearest: {', '.join(near)}" if near else ""


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
