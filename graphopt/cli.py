"""The command line: `graphopt optimize`, `build`, `init`, `verify`, `bisect`, `passes`, `kernels`.

Exit codes: 0 done (or equal, or good), 2 bad input (one line on stderr says what), 1 a difference was
found by `verify` or `bisect`, or anything unexpected; `build` has more, see `graphopt.builds.errors`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from graphopt.builds import command
from graphopt.fleet.command import EPILOG, checkpoint

if TYPE_CHECKING:
    from graphopt.sources import Source

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False,
    help="The optimizing compiler for trained PyTorch models.",
)  # fmt: skip
app.command(epilog=command.BUILD_EPILOG)(command.build)
app.command(epilog=command.INIT_EPILOG)(command.init)
app.command(epilog=EPILOG)(checkpoint)


def main() -> None:
    app()


def _fail(error: Exception | str) -> NoReturn:
    typer.echo(f"graphopt: {error}", err=True)
    raise typer.Exit(2)


SOURCE_HELP = (
    "package.module:callable, torchvision:NAME, timm:NAME, a saved graphopt model, or a .pt2 file "
    "(with --trust)."
)
SOURCE = typer.Argument(help=SOURCE_HELP)
OUTPUT = typer.Option("-o", "--output", help="Save the result here.")
MODE = typer.Option(help="deploy or tune.")
PASSES = typer.Option(
    help="A pipeline, as in canonicalize,package.module:my_rewrite; default: the mode's."
)
TRUST = typer.Option(help="Load a .pt2 file, which can execute code stored in it.")
LIMIT = typer.Option(help="Apply this many rewrites at most.", min=0)
VALIDATE = typer.Option(help="Roll back rewrites that fail their check.")
EXPLAIN = typer.Option(
    metavar="MODULE",
    help="Tell what happened to a module, as in layer1.0.conv1, and inside it; may be repeated.",
)


@contextmanager
def _one_line(source: str) -> Iterator[None]:
    """Whatever is wrong with a user's input ends the command with one line."""
    import graphopt
    from graphopt.backends.base import BackendError
    from graphopt.sources import SourceError

    try:
        yield
    except typer.Exit:  # a RuntimeError
        raise
    except (graphopt.PassError, graphopt.PipelineError, graphopt.ArtifactError, BackendError,
            graphopt.BisectError, graphopt.VerifyError, graphopt.UnknownModule, SourceError,
            OSError) as error:  # fmt: skip
        _fail(error)
    except (RuntimeError, ValueError, TypeError) as error:
        # The model does not run on these inputs: the first line says what torch found.
        _fail(f"{source}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")


def _check_mode(mode: str) -> None:
    if mode not in ("deploy", "tune"):
        _fail(f"unknown mode {mode!r}; expected deploy or tune")


def _load(source: str, trust: bool) -> Source:
    """The model and the inputs that it comes with, or else declares."""
    import graphopt
    from graphopt.sources import load_source

    model, args, kwargs = load_source(source, trust=trust)
    if not args and not kwargs and graphopt.declared_inputs(model) == (None, None):
        _fail(f"{source} declares no example inputs; let the callable return (model, inputs)")
    return model, args, kwargs


@app.command()
def optimize(
    source: Annotated[str, SOURCE],
    output: Annotated[Path | None, OUTPUT] = None,
    mode: Annotated[str, MODE] = "deploy",
    passes: Annotated[str | None, PASSES] = None,
    backend: Annotated[
        str,
        typer.Option(help="eager, prepacked, openvino, onnxruntime, inductor, triton, or auto."),
    ] = "eager",
    precision: Annotated[
        str | None,
        typer.Option(help="bf16 or int8; measured, see docs/precision.md and docs/int8.md."),
    ] = None,
    tune_seconds: Annotated[
        float, typer.Option(min=0, help="What backend auto may spend on building and measuring.")
    ] = 60.0,
    trust: Annotated[bool, TRUST] = False,
    bisect_limit: Annotated[int | None, LIMIT] = None,
    validate: Annotated[bool, VALIDATE] = True,
    explain: Annotated[list[str] | None, EXPLAIN] = None,
    page: Annotated[
        Path | None, typer.Option("--html", help="Write the report as one HTML page here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Optimize a model and print the report."""
    # Everything that can be wrong with the command is checked before torch does any work.
    from graphopt.progress import shown

    with shown("loading torch") as status, _one_line(source):
        import graphopt
        from graphopt.backends.base import find
        from graphopt.optimize import at_precision
        from graphopt.report.story import modules_of, spellings

        _check_mode(mode)
        pipeline = graphopt.Pipeline(mode if passes is None else passes)
        at_precision(pipeline, precision, mode)
        if backend != "auto":
            find(backend)
        if output is not None and output.exists() and not (output / "manifest.json").is_file():
            _fail(f"{output} exists and is not a graphopt artifact; not overwriting it")
        status.expected = len(pipeline.stages) + 4
        status(f"loading {source}")
        model, args, kwargs = _load(source, trust)
        modules = modules_of(model)
        for one in explain or ():
            spellings(one, modules)
        result = graphopt.optimize(
            model, args or None, kwargs or None, mode=mode, passes=pipeline, backend=backend,
            validate=validate, bisect_limit=bisect_limit, progress=status,
            tune_seconds=tune_seconds, precision=precision,
        )  # fmt: skip
        if output is not None:
            status(f"saving {output}")
            result.save(output)
        if page is not None:
            result.report.save_html(page)
    stories = {one: result.report.explain(one) for one in explain or ()}
    if as_json:
        data = result.report.to_dict()
        if stories:
            data["stories"] = {path: story.to_dict() for path, story in stories.items()}
        typer.echo(json.dumps(data, allow_nan=False))
    else:
        typer.echo(str(result.report))
        if output is not None:
            typer.echo(f"saved      {output}")
        for story in stories.values():
            typer.echo(f"\n{story}")


@app.command()
def kernels(
    source: Annotated[str, SOURCE],
    mode: Annotated[str, MODE] = "deploy",
    passes: Annotated[str | None, PASSES] = None,
    trust: Annotated[bool, TRUST] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the kernels as JSON.")] = False,
) -> None:
    """Print the Triton kernels that a model becomes: what each computes, moves, and its source.

    Without a GPU, set TRITON_INTERPRET=1.
    """
    from rich.console import Console

    with Console(stderr=True).status("loading torch") as status, _one_line(source):
        import graphopt
        from graphopt.backends.base import find

        pipeline = graphopt.Pipeline(mode if passes is None else passes)
        _check_mode(mode)
        find("triton")
        status.update(f"loading {source}")
        model, args, kwargs = _load(source, trust)
        result = graphopt.optimize(
            model, args or None, kwargs or None, mode=mode, passes=pipeline, backend="triton",
            progress=status.update,
        )  # fmt: skip
        if result.report.backend != "triton" and not result.kernels:
            _fail(f"{source}: {'; '.join(result.report.backend_notes)}")
        found = result.kernels
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(one) for one in found], allow_nan=False))
        return
    for one in found:
        where = ", ".join(one.origins) or "-"
        typer.echo(f"# {one.name} ({one.kind}): {one.nodes} ops of {where}; "
                   f"{one.bytes} bytes, {one.flops} FLOPs")  # fmt: skip
        typer.echo(f"{one.source}\n")


@app.command()
def verify(
    source: Annotated[str, typer.Argument(metavar="A", help=SOURCE_HELP)],
    optimized: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    trust: Annotated[bool, TRUST] = False,
    limit: Annotated[
        float, typer.Option(help="Relative error in float64 of equal models.")
    ] = 1e-10,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Compare any model with any other; exit with 1 if they differ. Inputs are A's, or else B's."""
    from rich.console import Console

    with Console(stderr=True).status("loading torch") as status:
        import graphopt
        from graphopt.sources import load_source

        loaded: list[Source] = []
        for text in (source, optimized):
            with _one_line(text):
                status.update(f"loading {text}")
                loaded.append(load_source(text, trust=trust))
        status.update(f"comparing {source} and {optimized}")
        with _one_line(f"{source} and {optimized}"):
            (a, args, kwargs), (b, *_) = loaded
            if not args and not kwargs and graphopt.declared_inputs(a) == (None, None):
                _, args, kwargs = loaded[1]
            found = graphopt.verify(a, b, args or None, kwargs or None, limit=limit)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), allow_nan=False))
    else:
        typer.echo(str(found))
    raise typer.Exit(0 if found.ok else 1)


@app.command()
def bisect(
    source: Annotated[str, SOURCE],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Write the reproducer here.")
    ] = Path("reproducer.py"),
    mode: Annotated[str, MODE] = "deploy",
    passes: Annotated[str | None, PASSES] = None,
    predicate: Annotated[
        str | None,
        typer.Option(
            help="A shell command that exits with 0 if a saved model is good; {} stands for its "
            "path (default: it is the last argument). Without, models are compared in float64."
        ),
    ] = None,
    trust: Annotated[bool, TRUST] = False,
    verbose: Annotated[bool, typer.Option(help="Show what the predicate prints.")] = False,
) -> None:
    """Find the one application of a rewrite that breaks a model; exit with 1 if there is one."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("loading torch") as status, _one_line(source):
        import graphopt
        from graphopt.bisect import command

        pipeline = graphopt.Pipeline(mode if passes is None else passes)
        _check_mode(mode)
        status.update(f"loading {source}")
        model, args, kwargs = _load(source, trust)
        show = (lambda said: typer.echo(said, err=True)) if verbose else None
        found = graphopt.bisect(
            model, args or None, kwargs or None, mode=mode, passes=pipeline,
            predicate=None if predicate is None else command(predicate, show),
            progress=status.update,
        )  # fmt: skip
        if found.record is not None:
            found.save(output)
    typer.echo(str(found))
    if found.record is not None:
        typer.echo(f"  reproducer {output}")
        raise typer.Exit(1)


@app.command()
def passes(
    name: Annotated[str | None, typer.Argument(help="A pass, a rewrite or a preset.")] = None,
) -> None:
    """List the passes with the state of their proofs, or show one: formula, preconditions, proof.

    Proofs are made on first use and kept under ~/.cache/graphopt.
    """
    import inspect

    from rich.console import Console

    from graphopt.passes.base import PassError, available, find
    from graphopt.pipeline import PRESETS
    from graphopt.verify.proof import proof_of

    def proof(one: Any) -> Any:
        with Console(stderr=True).status(f"proving {one.name}"):
            return proof_of(one)

    def status(one: Any) -> str:
        if one.unproved:
            return "checked per site"
        return "proved" if proof(one).proved else "NOT PROVED"

    if name is None:
        width = max(map(len, [*available(), *PRESETS]))
        for key, cls in available().items():
            counts = Counter(map(status, cls.all_rewrites()))
            proofs = ", ".join(f"{count} {what}" for what, count in counts.items())
            typer.echo(f"{key:<{width}}  {cls.summary()} [{proofs or 'checked per site'}]")
        for key, text in PRESETS.items():
            typer.echo(f"{key:<{width}}  = {text}")
        return
    if name in PRESETS:
        typer.echo(f"{name} = {PRESETS[name]}")
        return
    if name not in available():
        for cls in available().values():
            for one in cls.all_rewrites():
                if one.name == name:
                    typer.echo(f"{one.name} ({one.contract}), a rewrite of {cls.name}")
                    typer.echo(inspect.getdoc(one.function))
                    typer.echo(f"not proved: {one.unproved}" if one.unproved else str(proof(one)))
                    return
    try:
        cls = find(name)
    except PassError as error:
        _fail(error)
    typer.echo(f"{name}: {inspect.getdoc(cls)}\n")
    module = sys.modules[cls.__module__]
    if module.__doc__:
        typer.echo(module.__doc__.strip() + "\n")
    for field in dataclasses.fields(cls):
        typer.echo(f"option {field.name}: {field.type} = {field.default}")
    for one in cls.all_rewrites():
        typer.echo(f"{one.name} ({one.contract}): {one.summary}")
        lines = (
            [f"not proved: {one.unproved}"] if one.unproved else str(proof(one)).splitlines()[:1]
        )
        if not one.unproved:
            lines += [f"  {line}" for line in _preconditions(proof(one))]
        for line in lines:
            typer.echo(f"    {line}")


def _preconditions(proof: Any) -> list[str]:
    if not proof.proved:
        return [f"residual: {proof.residual}"]
    return [f"given {one}" for one in proof.conditions]
