"""What a shell completes. Torch is not imported for it: names are read from files, or stand here, and the
tests compare them with what there is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

Item = tuple[str, str]

MODES = ("deploy", "tune")
PRECISIONS = {"bf16": "bfloat16 where it takes the time", "int8": "bytes, with measured ranges"}
BACKENDS = {
    "eager": "torch, op by op", "prepacked": "weights in oneDNN's layout", "triton": "generated kernels",
    "openvino": "OpenVINO", "onnxruntime": "ONNX Runtime", "inductor": "torch.compile's",
}  # fmt: skip
AUTO = {"auto": "measures those that are installed, keeps the fastest"}
_NAME = re.compile(r'^(?:    name|NAME) = "([a-z0-9-]+)"', re.MULTILINE)


def _starting(known: dict[str, str], incomplete: str) -> list[Item]:
    return [(name, told) for name, told in known.items() if name.startswith(incomplete)]


def modes(incomplete: str) -> list[Item]:
    return _starting({"deploy": "weights folded", "tune": "parameters stay trainable"}, incomplete)


def precisions(incomplete: str) -> list[Item]:
    return _starting(PRECISIONS, incomplete)


def backends(incomplete: str) -> list[Item]:
    theirs = {one.name: "installed" for one in entry_points(group="graphopt.backends")}
    return _starting({**BACKENDS, **theirs}, incomplete)


def backends_or_auto(incomplete: str) -> list[Item]:
    return [*backends(incomplete), *_starting(AUTO, incomplete)]


@cache
def pass_names() -> tuple[str, ...]:
    """All installed passes, as the files of `graphopt.passes` and the entry points name them."""
    spec = find_spec("graphopt")
    home = Path(spec.origin).parent / "passes" if spec and spec.origin else Path()
    found = {name for file in home.rglob("*.py") for name in _NAME.findall(file.read_text("utf-8"))}
    return tuple(sorted(found | {one.name for one in entry_points(group="graphopt.passes")}))


def passes(incomplete: str) -> list[Item]:
    """A pass or a preset."""
    return _starting(
        {**dict.fromkeys(pass_names(), "pass"), **dict.fromkeys(MODES, "preset")}, incomplete
    )


def pipelines(incomplete: str) -> list[Item]:
    """The last item of a pipeline."""
    done, comma, last = incomplete.rpartition(",")
    return [(f"{done}{comma}{name}", told) for name, told in passes(last)]


def artifacts(incomplete: str) -> list[Item]:
    """Artifacts, and folders that may have some in them."""
    return list(_paths(incomplete, (".zip",)))


def sources(incomplete: str) -> list[Item]:
    libraries = {"torchvision:": "a model of torchvision", "timm:": "a model of timm"}
    return [*_starting(libraries, incomplete), *_paths(incomplete, (".zip", ".pt2"))]


def _paths(incomplete: str, suffixes: tuple[str, ...]) -> Iterator[Item]:
    head, slash, begin = incomplete.rpartition("/")
    folder = Path((head or slash) or ".")
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    for one in entries:
        if not one.name.startswith(begin) or (one.name.startswith(".") and not begin):
            continue
        path = f"{head}{slash}{one.name}"
        if (one / "manifest.json").is_file():
            yield path, "a saved model"
        elif one.is_dir():
            yield f"{path}/", "a folder"
        elif one.suffix in suffixes:
            yield path, "a file"
