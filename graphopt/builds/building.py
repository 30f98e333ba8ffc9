"""The build: every target optimized, stored, loaded again, compared with the source, and only then put in
its place.

    build/NAME.gopt/      graph.json, weights.safetensors, manifest.json; exports beside them
                          (build/NAME.gopt.zip with archive = true)
    build/NAME.json       the report, with all that is measured and differs from run to run: times
    build/NAME.html       the same as one page, for people

The artifact holds nothing that differs between two builds of the same input on the same machine: no time, no
path. A target that fails leaves what was there before.
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graphopt import artifact
from graphopt.backends.base import BackendError, find
from graphopt.builds import lock as locking
from graphopt.builds.config import File, Target, read
from graphopt.builds.errors import BuildError, NotCaptured, NotWritten, OverBudget, Violated
from graphopt.builds.given import Given, draw, load
from graphopt.builds.toml import nearest
from graphopt.export import SUFFIXES
from graphopt.filecheck import ExportError
from graphopt.files import beside, replace, write
from graphopt.ir.source import first_line
from graphopt.laws import proved
from graphopt.module import OptimizedModule
from graphopt.optimize import PRECISIONS, at_precision, optimize, pipeline_of
from graphopt.passes.base import PassError
from graphopt.pipeline import Pipeline, PipelineError
from graphopt.report import Report
from graphopt.sources import SourceError
from graphopt.verify.compare import Comparison, verify
from graphopt.verify.side import VerifyError

Say = Callable[[str], None]
SUFFIX = {format: suffix for suffix, format in SUFFIXES.items()}


@dataclasses.dataclass(frozen=True)
class Built:
    """A target that was built and verified: where, its sha256, and the largest relative errors over the
    inputs it was compared on: in float64, and in its own dtype (the source's beside it)."""

    name: str
    path: Path
    sha256: str
    float64_error: float
    error: float
    source_error: float
    seconds: float
    bytes: int
    exports: tuple[str, ...]
    report: Any

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `json.dumps` takes."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return data | {"path": str(self.path), "report": self.report.to_dict()}


def build(
    path: str | os.PathLike[str], *, locked: bool = False, targets: list[str] | None = None,
    progress: Say | None = None,
) -> list[Built]:  # fmt: skip
    """Build what a configuration describes.

    Args:
        path: a `graphopt.toml`.
        locked: refuse other versions, sources or artifacts than those of the lock file; without, the lock
            file is written.
        targets: names of those to build; all by default.
        progress: called with a line of text at each step.

    Raises:
        BuildError: of the kind that says what went wrong; targets that were built before it stay.
    """
    say = progress or (lambda _: None)
    file = read(Path(path))
    config = file.config
    chosen = plan(file, targets)
    lock_path = file.within(config.build.lock)
    lock = locking.read(lock_path) if locked else None
    versions = locking.versions(config)
    if lock is not None:
        locking.compare(lock_path, "versions", lock["versions"], versions)
    with importable(file.folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        say("loading the model")
        given = load(file)
        sources = locking.sources(file.data, given.hashes)
        if lock is not None:
            locking.compare(lock_path, "sources", lock["sources"], sources)
        output = file.within(config.build.output)
        about = {"sources": sources, "versions": versions}
        expected = lock["artifacts"] if lock is not None else None
        found = []
        for target, pipeline in chosen:
            try:
                found.append(_build(file, given, target, pipeline, output, about, expected, say))
            except Exception as error:
                if (why := _unwritten(error)) is None:
                    raise
                raise NotWritten(f"{output / target.name}.gopt {why}") from error
    if lock is None:
        _write_lock(lock_path, {**about, "artifacts": {one.name: one.sha256 for one in found}},
                    whole=targets is None)  # fmt: skip
    return found


def plan(file: File, only: list[str] | None = None) -> list[tuple[Target, Pipeline]]:
    """The targets to build and their pipelines; nothing is loaded yet.

    Raises:
        ConfigError: naming the line of a pass, backend or export that there is not.
    """
    found = []
    for number, target in enumerate(file.config.targets):
        where = ("targets", number)
        try:
            pipeline = pipeline_of(target.mode, target.passes)
        except (PipelineError, PassError, SourceError) as error:
            raise file.error((*where, "passes"), str(error)) from error
        try:
            at_precision(pipeline, target.precision, target.mode)
        except ValueError as error:
            raise file.error((*where, "precision"), str(error)) from error
        try:
            if target.backend != "auto":
                find(target.backend)
        except (BackendError, ValueError) as error:
            raise file.error((*where, "backend"), str(error)) from error
        if len(set(target.export)) < len(target.export):
            raise file.error((*where, "export"), f"a format twice in {target.export}")
        if target.export and target.mode == "tune":
            raise file.error((*where, "export"), "expected mode 'deploy', found mode 'tune', which keeps a "
                             "model trainable")  # fmt: skip
        found.append((target, pipeline))
    names = [target.name for target, _ in found]
    for name in only or ():
        if name not in names:
            raise file.error(("targets",), f"there is no target {name!r}{nearest(name, names)}")
    return [one for one in found if not only or one[0].name in only]


def _build(
    file: File, given: Given, target: Target, pipeline: Pipeline, output: Path, about: dict[str, Any],
    expected: dict[str, str] | None, say: Say,
) -> Built:  # fmt: skip
    place = output / f"{target.name}.gopt{'.zip' if file.config.build.archive else ''}"
    try:
        artifact.check_place(place)
    except artifact.ArtifactError as error:
        raise NotWritten(str(error)) from error
    start = time.perf_counter()
    fast = _optimized(file, given, target, pipeline, lambda what: say(f"{target.name}: {what}"))
    seconds = time.perf_counter() - start
    with beside(place) as work:
        stored = work / place.name
        say(f"{target.name}: storing")
        exports = tuple(f"model{SUFFIX[one]}" for one in target.export)
        about = {**about, "target": target.model_dump(), "proofs": proofs(fast.report)}
        try:
            artifact.save(fast, stored, about=about, add=lambda work: _export(fast, work, exports, say),
                          timed=False)  # fmt: skip
        except artifact.ArtifactError as error:
            raise Violated(f"{target.name} cannot be stored: {error}") from error
        say(f"{target.name}: comparing what is stored with the source")
        found = _verified(file, given, target, fast, stored)
        among = stored.rglob("*") if stored.is_dir() else [stored]
        size = sum(one.stat().st_size for one in among if one.is_file())
        digest = locking.hash_of(stored)
        result = Built(
            target.name, place, digest, max(one.float64_error for one in found),
            max(one.error for one in found), max(one.source_error for one in found),
            seconds, size, exports, fast.report,
        )  # fmt: skip
        _within_budget(target, result, fast)
        if expected is not None:
            locked = {target.name: expected[target.name]} if target.name in expected else {}
            locking.compare(
                file.within(file.config.build.lock), "artifacts", locked, {target.name: digest}
            )
        replace(stored, place)
    _write(output / f"{target.name}.json", result.to_dict())
    fast.report.save_html(output / f"{target.name}.html")
    return result


def _optimized(
    file: File, given: Given, target: Target, pipeline: Pipeline, say: Say
) -> OptimizedModule:
    """
    Raises:
        NotCaptured: if the model is not one graph.
        Violated: if a rewrite, or the whole, is not what was promised.
    """
    try:
        fast = optimize(
            given.model, given.args or None, given.kwargs or None, mode=target.mode,
            passes=measured_on(pipeline, given.data),
            backend=target.backend, precision=target.precision, progress=say,
            data=given.data if target.precision else (), dynamic_shapes=given.dynamic_shapes,
        )  # fmt: skip
    except PassError as error:
        raise Violated(f"{target.name}: {error}") from error
    except Exception as error:  # of the model, on its inputs
        raise NotCaptured(
            f"{target.name}: the model does not run on its inputs: {first_line(error)}"
        ) from error
    report = fast.report
    if fast.graph_module is None:
        left = [
            f"{where or 'the whole model'}: {why}" for where, why in report.capture.left_out.items()
        ]
        why = "; ".join((*left[:3], *report.capture.notes))
        raise NotCaptured(f"{target.name}: the model is not captured as one graph: {why:.600}")
    if report.check is not None and report.check.reason:
        raise Violated(f"{target.name}: {report.check.reason}")
    if report.rolled_back and file.config.verify.rolled_back == "fail":
        one = report.rolled_back[0]
        raise Violated(
            f"{target.name}: {one.rewrite} at {one.where or one.node} broke its contract and was taken back: "
            f'{one.reason}; verify.rolled_back = "allow" builds without it'
        )
    if target.precision is not None:
        _check_precision(target, report)
    if target.backend not in ("auto", report.backend):
        raise Violated(
            f"{target.name}: backend {target.backend} was not used: {'; '.join(report.backend_notes)}"
        )
    return fast


def measured_on(pipeline: Pipeline, data: Sequence[tuple[Any, Any]]) -> Pipeline:
    """The same pipeline; passes that are measured on data get it."""
    found = copy.copy(pipeline)
    found.stages = tuple(
        dataclasses.replace(one, run=dataclasses.replace(one.run, data=tuple(data)))  # type: ignore[call-arg]
        if data and dataclasses.is_dataclass(one.run) and hasattr(one.run, "data")
        else one
        for one in pipeline.stages
    )
    return found


def _check_precision(target: Target, report: Report) -> None:
    """
    Raises:
        Violated: if nothing is computed in the precision that was asked for.
    """
    stages = {one.run.name for one in Pipeline(PRECISIONS[str(target.precision)]).stages}
    if not any(one.stage in stages for one in report.applied):
        why = [f"{one.where}: {one.reason}" for one in report.refused if one.stage in stages]
        raise Violated(
            f"{target.name}: nothing is computed in {target.precision}: {'; '.join(why[:3])}"
        )


def _export(fast: OptimizedModule, folder: Path, names: Iterable[str], say: Say) -> None:
    for name in names:
        say(f"exporting {name}")
        try:
            fast.export(folder / name)
        except ExportError as error:
            raise Violated(f"{name}: {error}") from error


def proofs(report: Report) -> dict[str, str]:
    """Of every rewrite that was applied, whether it is proved for all inputs, or was checked at each site
    alone."""
    names = sorted({one.rewrite for one in report.applied})
    known = proved(names)
    return {name: "proved" if name in known else "checked at each site" for name in names}


def _verified(
    file: File, given: Given, target: Target, fast: OptimizedModule, stored: Path
) -> list[Comparison]:
    """What is stored, against the source on draws of inputs; against the optimized model where the source is
    not what it promises to equal.

    Raises:
        Violated: naming the first difference.
    """
    config = file.config
    try:
        loaded = artifact.load(stored)
    except artifact.ArtifactError as error:
        raise Violated(f"what was stored is not loaded again: {error}") from error
    loaded.train(fast.training)
    lossy = [one for one in fast.report.applied if one.contract not in ("Exact", "Algebraic")]
    source = fast if lossy else given.model
    limit = config.verify.limit
    found = []
    for seed in range(config.verify.inputs):
        args, kwargs = (
            (given.args, given.kwargs) if not config.inputs else ((), draw(file, 1 + seed))
        )
        if not config.inputs and seed:
            break  # the source has these inputs alone
        try:
            one = verify(source, loaded, args or None, kwargs or None, limit=limit, locate=False)
        except VerifyError as error:
            raise Violated(f"{target.name}: {error}") from error
        if not one.ok:
            raise Violated(f"{target.name}: {one.check.reason}")
        found.append(one)
    return found


def _within_budget(target: Target, result: Built, fast: OptimizedModule) -> None:
    check, budget = fast.report.check, target.budget
    after = fast.report.after
    error = max(result.error, 0.0 if check is None else check.error)
    spent = {
        "error": error, "parameters": 0 if after is None else after.parameters,
        "bytes": result.bytes, "seconds": result.seconds,
    }  # fmt: skip
    for name, value in spent.items():
        limit = getattr(budget, name)
        if limit is not None and not value <= limit:
            raise OverBudget(f"{target.name}: budget.{name} is {limit:g}, found {value:.4g}")


# -- files --------------------------------------------------------------------------------------


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Callables of a configuration are looked for beside it first."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _write(path: Path, data: Any) -> None:
    write(path, json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n")


def _write_lock(path: Path, lock: locking.Lock, whole: bool) -> None:
    """Targets that were not built now keep their artifacts' hashes."""
    if not whole and path.exists():
        try:
            lock["artifacts"] = {**locking.read(path)["artifacts"], **lock["artifacts"]}
        except BuildError:
            pass  # damaged: written anew
    try:
        locking.write(path, lock)
    except OSError as error:
        raise NotWritten(f"{path} {_unwritten(error)}") from error


FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up",
        errno.EFBIG: "a file is larger than is allowed here", errno.EROFS: "it is read-only"}  # fmt: skip


def _unwritten(error: BaseException) -> str | None:
    """Why nothing could be written; None if the error is of another kind. Libraries pass on what the
    system says in errors, and texts, of their own."""
    cause: BaseException | None = error
    why = None
    while cause is not None and why is None:
        number = cause.errno if isinstance(cause, OSError) else None
        if number is None and (found := re.search(r"\(os error (\d+)\)", str(cause))):
            number = int(found[1])
        if number in FULL:
            why = FULL[number]
        elif isinstance(cause, OSError) and cause is error:
            why = f"{cause.strerror or cause}{f' ({cause.filename})' if cause.filename else ''}"
        elif "PytorchStreamWriter failed writing" in str(cause):
            why = "torch could not write all of it"
        cause = cause.__cause__ or cause.__context__
    return None if why is None else f"cannot be written: {why}; what was there before stays"
