"""Proofs kept between runs, under the sources they depend on: `~/.cache/graphopt/proofs.json`."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from graphopt.ir.rewrite import Rewrite
from graphopt.verify.proof.prove import Proof, prove


def proof_of(rewrite: Rewrite, depth: int = 1, seconds: float = 300.0) -> Proof:
    """The proof of a rewrite, from the cache if nothing it depends on has changed since."""
    path = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "graphopt/proofs.json"
    source = _source(rewrite)
    if not source:
        return prove(rewrite, depth=depth, seconds=seconds)
    known = _read(path)
    key = hashlib.sha256(f"{_prover()} {depth} {rewrite.name} {source}".encode()).hexdigest()
    if key in known:
        fields = known[key]
        return Proof(**{**fields, "conditions": tuple(fields["conditions"])})
    proof = prove(rewrite, depth=depth, seconds=seconds)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({**_read(path), key: dataclasses.asdict(proof)}))
        part.replace(path)
    except OSError:
        pass  # nowhere to keep it: proved again next time
    return proof


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
    return source + (inspect.getdoc(rewrite.function) or "")


@lru_cache(maxsize=1)
def _prover() -> str:
    """A hash of everything a proof rests on: this folder and `graphopt.ir`."""
    here = Path(__file__).parent
    files = sorted([*here.glob("*.py"), *here.parents[1].joinpath("ir").rglob("*.py")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
