"""What the rewrites of a pipeline say of themselves, and which of them are proved."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Collection, Iterable, Iterator

from graphopt.ir.rewrite import Rewrite
from graphopt.passes.base import Pass, SingleRewrite, Together, available
from graphopt.pipeline import Pipeline
from graphopt.report.laws import Law, ask
from graphopt.verify.proof.cache import SHIPPED, key


def laws_of(pipeline: Pipeline, names: Collection[str]) -> dict[str, Law]:
    """The laws of those of `names` that are rewrites of the pipeline, or passes of it."""
    found: dict[str, Law] = {}
    for one in _passes(stage.run for stage in pipeline):
        found |= {rewrite.name: _law(rewrite) for rewrite in _rewrites(one)}
        found.setdefault(one.name, Law(inspect.getdoc(type(one)) or ""))
    return {name: found[name] for name in dict.fromkeys(names) if name in found}


def _passes(among: Iterable[Pass]) -> Iterator[Pass]:
    for one in among:
        yield from one.passes if isinstance(one, Together) else [one]


def _rewrites(one: Pass) -> tuple[Rewrite, ...]:
    return (one.rewrite,) if isinstance(one, SingleRewrite) else one.all_rewrites()


def _law(rewrite: Rewrite) -> Law:
    """Its docstring, and that of its file, where the formula of a family of rewrites stands."""
    module = sys.modules.get(rewrite.function.__module__)
    found = [inspect.getdoc(one) for one in (rewrite.function, module) if one is not None]
    return Law("\n\n".join(filter(None, found)), rewrite.unproved)


def proved(names: Collection[str]) -> set[str]:
    """Those of the rewrites of these names that are proved, by the proofs that come with graphopt."""
    proofs = json.loads(SHIPPED.read_text())
    rewrites = {one.name: one for cls in available().values() for one in cls.all_rewrites()}
    return {
        name for name in names
        if name in rewrites and proofs.get(key(rewrites[name], 1), {}).get("proved")
    }  # fmt: skip


ask(proved)
