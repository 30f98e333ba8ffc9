"""Pipelines: passes in order, as text that round-trips or as objects.

    canonicalize,fold-batch-norm,mypackage.passes:drop_relu,materialize{limit=1000}

Passes in brackets share one worklist, so that each goes on where another one made room:
`[fold-batch-norm,merge-branches]`. A preset is a named pipeline and may stand inside another one.
An item with a colon is a pass or a rewrite by its place: `package.module:Name`, importable from the
working directory too.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import time
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from graphopt.ir.driver import Session
from graphopt.ir.lint import lint
from graphopt.memory import give_back
from graphopt.passes.base import (
    Data,
    Pass,
    PassError,
    RewritePass,
    SingleRewrite,
    Together,
    as_pass,
    available,
    find,
)
from graphopt.sources import SourceError, import_object

PRESETS = {
    "tune": "canonicalize,recognize-norms,recognize-activations,recognize-attention,fold-thresholds,"
    "[collect-terms,fold-batch-norm,absorb-scales,merge-sequences,merge-branches],merge-regions,absorb-scales,"
    "multiply-out,fold-thresholds,canonicalize",
    "deploy": "open-operators,drop-gradients,canonicalize,cancel-terms,batch-siblings{least=4},canonicalize,"
    "settle-thresholds,tune,center-norms,drop-zeros,stack-siblings,roll-steps,sink-expands,"
    "materialize,canonicalize,detach-masks",
}
_STAGE = re.compile(r"([\w.-]+(?::[\w.]+)?)(?:\{([^{}]*)\})?(?:,|$)")
_TOGETHER = re.compile(r"\[([^\[\]]*)\](?:,|$)")


class PipelineError(ValueError):
    """A pipeline text that cannot be read."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One pass of a pipeline and how it was written."""

    run: Pass
    text: str


class Pipeline:
    """Passes in order.

    `source` is text, or a sequence of passes, pass classes, rewrites and texts.
    `str(Pipeline(text)) == text`.

    Raises:
        PipelineError: for text that is not a pipeline.
        PassError: for an unknown pass or option, or an option of the wrong type.
    """

    def __init__(self, source: str | Iterable[Any]) -> None:
        if isinstance(source, str):
            self.text = source
            self.stages = tuple(parse(source))
        else:
            self.stages = tuple(stage for one in source for stage in _as_stages(one))
            self.text = ",".join(stage.text for stage in self.stages)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Pipeline({self.text!r})"

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)

    def within(self, seen: Callable[[Data], Data]) -> Pipeline:
        """The pipeline as it is for a part of the model (`Pass.within`)."""
        part = Pipeline(())
        part.text = self.text
        part.stages = tuple(
            dataclasses.replace(one, run=one.run.within(seen)) for one in self.stages
        )
        return part

    def run(
        self, session: Session, progress: Callable[[str], None] | None = None
    ) -> list[tuple[str, float]]:
        """Run every stage; returns (stage, seconds without validation) in order."""
        seconds = []
        for stage in self.stages:
            if progress is not None:
                progress(stage.text)
            start, checking = time.perf_counter(), session.validation_seconds
            session.pass_name, before = stage.run.name or stage.text, len(session.applied)
            stage.run.run(session)
            if len(session.applied) > before:
                give_back()
            lint(session.graph, stage.text)
            spent = time.perf_counter() - start - (session.validation_seconds - checking)
            seconds.append((stage.text, spent))
        return seconds


def parse(text: str) -> Iterator[Stage]:
    """The stages that a text names, presets spelled out."""
    stripped = text.strip()
    if not stripped:
        raise PipelineError("empty pipeline; name at least one pass")
    position = 0
    compact = re.sub(r"\s+", "", stripped)
    if compact.endswith(","):
        raise PipelineError("the pipeline ends with a comma; expected another pass")
    while position < len(compact):
        if (group := _TOGETHER.match(compact, position)) is not None:
            position = group.end()
            yield _together(group[1])
            continue
        match = _STAGE.match(compact, position)
        if match is None or match.end() == position:
            raise PipelineError(
                f"cannot read the pipeline at {compact[position : position + 20]!r}; expected "
                "name{option=value,...} or [name,...] separated by commas"
            )
        position = match.end()
        name, options = match[1], match[2]
        if name in PRESETS and options is None:
            yield from parse(PRESETS[name])
        else:
            written = match[0].rstrip(",") if options is None else f"{name}{{{options}}}"
            yield Stage(make(name, options), written)


def _together(text: str) -> Stage:
    stages = list(parse(text))
    for stage in stages:
        if not isinstance(stage.run, (RewritePass, SingleRewrite)):
            raise PipelineError(
                f"{stage.text} is not a set of rewrites; only these share a worklist in [...]"
            )
    return Stage(Together(tuple(stage.run for stage in stages)), f"[{text}]")  # type: ignore[misc]


def make(name: str, options: str | None = None) -> Pass:
    """A pass from its name (or place) and its options as text.

    Raises:
        PassError: if there is no such pass or option, or a value has the wrong type.
    """
    made = _imported(name) if ":" in name else _installed(name)
    fields = {} if isinstance(made, SingleRewrite) else {
        field.name: field for field in dataclasses.fields(made)
    }  # fmt: skip
    types = typing.get_type_hints(made if isinstance(made, type) else type(made))
    values: dict[str, Any] = {}
    for item in filter(None, (options or "").split(",")):
        key, _, given = item.partition("=")
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise PassError(f"{name} has no option {key!r} (options: {known})")
        values[key] = _convert(name, key, given or "true", types[key])
    return made(**values) if isinstance(made, type) else dataclasses.replace(made, **values)


def _installed(name: str) -> type[Pass]:
    try:
        return find(name)
    except PassError as error:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        raise PassError(f"{error}{f'; or the preset {near[0]}?' if near else ''}") from None


def _imported(place: str) -> Pass | type[Pass]:
    try:
        found = import_object(place, "expected package.module:Name, or the name of a pass")
    except SourceError as error:
        reason = str(error).removeprefix(f"{place}: ")
        raise PassError(f"unknown pass {place}: {reason}") from error
    made = as_pass(found)
    if made is None:
        raise PassError(f"{place} is of type {type(found).__name__}, expected a Pass or a Rewrite")
    return made


_PLAIN = (bool, int, float, str)  # what can be written in a pipeline


def _convert(name: str, key: str, given: str, to: Any) -> Any:
    kinds = [one for one in typing.get_args(to) or (to,) if one in _PLAIN]
    if not kinds:
        raise PassError(f"{name}: option {key} can be given in Python only")
    for kind in kinds:
        if kind is bool:
            if given in ("true", "false"):
                return given == "true"
            continue
        try:
            return kind(given)
        except ValueError:
            pass
    expected = " or ".join(one.__name__ for one in kinds)
    raise PassError(f"{name}: option {key} expects {expected}, found {given!r}")


def _as_stages(item: Any) -> Iterator[Stage]:
    if isinstance(item, str):
        yield from parse(item)
        return
    made = as_pass(item)
    if made is None:
        raise PipelineError(f"expected a pass, a rewrite or text; found {item!r}")
    one = made() if isinstance(made, type) else made
    yield Stage(one, _spell(one))


def _spell(one: Pass) -> str:
    if isinstance(one, SingleRewrite):
        return one.rewrite.name
    changed = []
    for field in dataclasses.fields(one):
        value = getattr(one, field.name)
        if field.repr and value != field.default:
            value = getattr(value, "__name__", value)
            changed.append(
                f"{field.name}={str(value).lower() if value is True or value is False else value}"
            )
    name = one.name or type(one).__name__
    return f"{name}{{{','.join(changed)}}}" if changed else name


__all__ = ["PRESETS", "Pipeline", "PipelineError", "Stage", "available", "make", "parse"]
