"""Proofs kept under the sources they depend on: those of our rewrites in `proofs.json` beside this
file (written by `python -m benchmarks.proofs`), others in `~/.cache/graphopt/proofs.json`."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import json
import os
import sys
import textwrap
from functools import lru_cache
from pathlib import Path
from typing import Any

from graphopt.ir.rewrite import Rewrite
from graphopt.verify.proof.prove import Proof, prove

SHIPPED = Path(__file__).parent / "proofs.json"


def proof_of(rewrite: Rewrite, depth: int = 1, seconds: float = 600.0) -> Proof:
    """The proof of a rewrite, a known one if nothing it depends on has changed since."""
    path = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "graphopt/proofs.json"
    name = key(rewrite, depth)
    for known in (_read(SHIPPED), _read(path)) if name else ():
        if name in known:
            fields = known[name]
            return Proof(**{**fields, "conditions": tuple(fields["conditions"])})
    proof = prove(rewrite, depth=depth, seconds=seconds)
    if name:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps({**_read(path), name: dataclasses.asdict(proof)}))
            part.replace(path)
        except OSError:
            pass  # nowhere to keep it: proved again next time
    return proof


def key(rewrite: Rewrite, depth: int) -> str:
    """What a proof is kept under; empty where the source of the rewrite is not known."""
    source = _source(rewrite)
    text = f"{_foundation(rewrite.function.__module__)} {depth} {rewrite.name} {source}"
    return hashlib.sha256(text.encode()).hexdigest() if source else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _source(rewrite: Rewrite) -> str:
    """The file a rewrite is written in, and what it says of itself (a pattern and a replacement
    are written out there)."""
    module = sys.modules.get(rewrite.function.__module__)
    try:
        source = inspect.getsource(module if module is not None else rewrite.function)
    except (OSError, TypeError):
        source = ""
    return code(textwrap.dedent(source)) + (inspect.getdoc(rewrite.function) or "")


PACKAGE = Path(__file__).parents[2]


@lru_cache(maxsize=64)
def _foundation(module: str) -> str:
    """A hash of everything a proof rests on: this folder, what the module of the rewrite imports of
    ours, and what these import in turn."""
    found: dict[Path, str] = {}
    waiting = [_file(module), *Path(__file__).parent.rglob("*.py")]
    while waiting:
        path = waiting.pop()
        if path is None or path in found:
            continue
        found[path], imported = _contents(path)
        waiting += map(_file, imported)
    text = "\n".join(found[path] for path in sorted(found))
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache(maxsize=1024)
def _contents(path: Path) -> tuple[str, list[str]]:
    """The code of a file, and the names of what it imports."""
    text, names = path.read_text(), []
    for one in ast.walk(ast.parse(text)):
        if isinstance(one, ast.ImportFrom) and one.module:
            names += [one.module, *(f"{one.module}.{alias.name}" for alias in one.names)]
    return code(text), names


def code(text: str) -> str:
    """Source without its docstrings, which no proof rests on."""
    lines: list[str | None] = [*text.split("\n")]
    for node in ast.walk(ast.parse(text)):
        match getattr(node, "body", None):
            case [ast.Expr(value=ast.Constant(value=str())) as said, *_]:
                span = range(said.lineno - 1, said.end_lineno or said.lineno)
                lines[span.start : span.stop] = [None] * len(span)
    return "\n".join(one for one in lines if one is not None)


@lru_cache(maxsize=1024)
def _file(module: str) -> Path | None:
    """The file of a module of ours."""
    package, *rest = module.split(".")
    path = PACKAGE.joinpath(*rest)
    for found in (path.with_suffix(".py"), path / "__init__.py"):
        if rest and package == PACKAGE.name and found.is_file():
            return found
    return None
