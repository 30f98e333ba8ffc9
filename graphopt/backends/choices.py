"""What was measured before on this machine, so that the same graph is not measured again.

One JSON file, `choices.json` in the cache folder: `$GRAPHOPT_CACHE_DIR`, else `$XDG_CACHE_HOME/graphopt`,
else `~/.cache/graphopt`. An empty `GRAPHOPT_CACHE_DIR` switches it off. A file that cannot be read counts as
empty, one that cannot be written stays as it is; `notes` say so.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import json
import operator
import os
import platform
import re
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.text_graph import TextError, target_name

FORMAT = 1
MOST = 2000  # choices that are kept, the latest
MOST_BUILDS = 9  # of one backend


@dataclasses.dataclass(frozen=True)
class Entry:
    """One measurement: milliseconds a call and seconds to build of every backend that was good, and the
    seconds that those would have needed that the budget left out."""

    date: str
    milliseconds: dict[str, float]
    builds: dict[str, float]
    left_out: dict[str, float]

    @classmethod
    def now(
        cls, milliseconds: dict[str, float], builds: dict[str, float], left_out: dict[str, float]
    ) -> Entry:
        return cls(datetime.date.today().isoformat(), milliseconds, builds, left_out)

    @classmethod
    def read(cls, data: Any) -> Entry:
        """From JSON.

        Raises:
            ValueError, TypeError, KeyError: if that is something else.
        """
        tables = [{str(name): float(value) for name, value in data[key].items()}
                  for key in ("milliseconds", "builds", "left_out")]  # fmt: skip
        if not tables[0] or tables[0].keys() != tables[1].keys():
            raise ValueError("no measurements")
        return cls(str(data["date"]), *tables)


class Choices:
    """The file of choices in `folder`; kept nowhere if that is None."""

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / "choices.json"
        self.notes: list[str] = []

    def look_up(self, key: str) -> Entry | None:
        data = self._read()["choices"].get(key)
        try:
            return None if data is None else Entry.read(data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            self._note(f"an entry of {self.path} is damaged ({error!r}); measuring again")
            return None

    def correction(self, backend: str) -> float:
        """How much longer a backend has taken to build than it declares, the median of what is known."""
        found = self._read()["builds"].get(_where(backend))
        good = isinstance(found, list) and all(isinstance(one, (int, float)) for one in found)
        return statistics.median(found) if good and found else 1.0

    def remember(self, key: str, entry: Entry, builds: dict[str, float]) -> None:
        """Keep a measurement, and by backend how much longer than declared a build took."""
        if self.path is None:
            return
        data = self._read()  # anew: others write too
        data["choices"].pop(key, None)
        data["choices"][key] = dataclasses.asdict(entry)
        data["choices"] = dict(list(data["choices"].items())[-MOST:])
        for backend, ratio in builds.items():
            known = data["builds"].get(_where(backend))
            known = known if isinstance(known, list) else []
            data["builds"][_where(backend)] = [*known, round(ratio, 3)][-MOST_BUILDS:]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(prefix=".choices.", dir=self.path.parent)
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump(data, file, indent=1)
                os.replace(part, self.path)
            except BaseException:
                os.unlink(part)
                raise
        except OSError as error:
            self._note(f"the choice is not kept: {error}")

    def _read(self) -> dict[str, Any]:
        empty: dict[str, Any] = {"format": FORMAT, "choices": {}, "builds": {}}
        if self.path is None:
            return empty
        try:
            data = json.loads(self.path.read_text())
            tables = data["format"], data["choices"], data["builds"]
        except FileNotFoundError:
            return empty
        except (OSError, ValueError, TypeError, KeyError) as error:
            self._note(f"{self.path} cannot be read ({error!r}); measuring")
            return empty
        fits = tables[0] == FORMAT and all(isinstance(one, dict) for one in tables[1:])
        return data if fits else empty

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def folder() -> Path | None:
    """Where choices are kept; None if they are not."""
    named = os.environ.get("GRAPHOPT_CACHE_DIR")
    if named is not None:
        return Path(named) if named else None
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graphopt"
    except RuntimeError:  # this user has no home
        return None


# -- what a choice depends on ---------------------------------------------------------------------


def key(
    module: fx.GraphModule, leaves: Sequence[Any], trainable: bool, backends: Iterable[str]
) -> str:
    """A hash of all that decides which backend is fastest, but the values of weights and inputs."""
    parts = [
        graph_text(module), *map(_kind, leaves), str(trainable), device(leaves),
        f"threads {torch.get_num_threads()}", f"torch {torch.__version__}",
        *(f"{name} {version(name)}" for name in ("graphopt", *backends)),
    ]  # fmt: skip
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def graph_text(module: fx.GraphModule) -> str:
    """Ops, constants, shapes and dtypes, one node a line; names of nodes, sizes and states do not matter."""
    lines: list[str] = []
    names: dict[fx.Node, str] = {}
    for node in module.graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), names.__getitem__)
        what = _what(module, node)
        names[node] = f"%{len(names)}"
        lines.append(f"{names[node]} {node.op} {what} {args} {kwargs}")
    sizes: dict[str, str] = {}
    return re.sub(
        r"\bs\d+\b", lambda one: sizes.setdefault(one[0], f"s{len(sizes)}"), "\n".join(lines)
    )


def _what(module: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "placeholder":
        return str(node.meta.get("type"))
    if node.op == "get_attr":
        return _kind(operator.attrgetter(str(node.target))(module))
    try:
        return target_name(node)
    except TextError:
        return getattr(node.target, "__name__", str(node.target))


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        strides = value.stride() if value.layout == torch.strided else value.layout
        return f"{value.dtype} {tuple(value.shape)} {strides} {value.device.type}"
    return repr(value)


def device(leaves: Iterable[Any]) -> str:
    """The processor that the tensors are on: a model name and what it can do."""
    found = {one.device for one in leaves if isinstance(one, Tensor)}
    gpus = sorted({torch.cuda.get_device_name(one) for one in found if one.type == "cuda"})
    return " + ".join([*gpus, cpu()])


@functools.cache
def cpu() -> str:
    """The processor's name and the widest instructions that torch uses on it."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(one.partition(":")[2].strip() for one in lines if one.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def _where(backend: str) -> str:
    return f"{backend} on {cpu()}"


@functools.cache
def version(library: str) -> str:
    """That of an installed distribution; empty for what is none."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""
