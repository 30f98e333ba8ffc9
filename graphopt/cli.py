"""The command line: `graphopt optimize SOURCE`, `graphopt passes [NAME]`.

Exit codes: 0 done, 2 bad input (one line on stderr says what), 1 anything unexpected.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help="The optimizing compiler for trained PyTorch models.",
)  # fmt: skip


def main() -> None:
    app()


def _fail(error: Exception | str) -> NoReturn:
    typer.echo(f"graphopt: {error}", err=True)
    raise typer.Exit(2)


SOURCE = typer.Argument(
    help="package.module:callable, torchvision:NAME, timm:NAME, a saved graphopt model, or a .pt2 "
    "file (with --trust)."
)
OUTPUT = typer.Option("-o", "--output", help="Save the result here.")
PASSES = typer.Option(help="A pipeline, as in canonicalize,fold-batch-norm; default: the mode's.")
TRUST = typer.Option(help="Load a .pt2 file, which can execute code stored in it.")


@app.command()
def optimize(
    source: Annotated[str, SOURCE],
    output: Annotated[Path | None, OUTPUT] = None,
    mode: Annotated[str, typer.Option(help="deploy or tune.")] = "deploy",
    passes: Annotated[str | None, PASSES] = None,
    backend: Annotated[str, typer.Option(help="eager, inductor, or auto.")] = "eager",
    trust: Annotated[bool, TRUST] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Optimize a model and print the report."""
    # Everything that can be wrong with the command is checked before torch does any work.
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("loading torch") as status:
        import graphopt
        from graphopt.backends.base import BackendError, find
        from graphopt.sources import SourceError, load_source

        try:
            pipeline = graphopt.Pipeline(mode if passes is None else passes)
            if mode not in ("deploy", "tune"):
                _fail(f"unknown mode {mode!r}; expected deploy or tune")
            if backend != "auto":
                find(backend)
            if output is not None and output.exists() and not (output / "manifest.json").is_file():
                _fail(f"{output} exists and is not a graphopt artifact; not overwriting it")
            status.update(f"loading {source}")
            model, args, kwargs = load_source(source, trust=trust)
            if not args and not kwargs and graphopt.declared_inputs(model) == (None, None):
                _fail(
                    f"{source} declares no example inputs; let the callable return (model, inputs)"
                )
        except (graphopt.PassError, graphopt.PipelineError, BackendError, SourceError,
                graphopt.ArtifactError) as error:  # fmt: skip
            _fail(error)
        try:
            result = graphopt.optimize(
                model, args or None, kwargs or None, mode=mode, passes=pipeline, backend=backend,
                progress=status.update,
            )  # fmt: skip
        except (RuntimeError, ValueError, TypeError) as error:
            # The model does not run on these inputs: the first line says what torch found.
            _fail(f"{source}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        if output is not None:
            status.update(f"saving {output}")
            try:
                result.save(output)
            except (graphopt.ArtifactError, OSError) as error:
                _fail(error)
    if as_json:
        import json

        typer.echo(json.dumps(result.report.to_dict(), allow_nan=False))
    else:
        typer.echo(str(result.report))
        if output is not None:
            typer.echo(f"saved      {output}")


@app.command()
def passes(
    name: Annotated[str | None, typer.Argument(help="A pass, a rewrite or a preset.")] = None,
) -> None:
    """List the passes, or show one: what it does, its options, its rewrites and contracts."""
    import dataclasses
    import inspect
    import sys

    from graphopt.passes.base import PassError, available, find
    from graphopt.pipeline import PRESETS

    if name is None:
        width = max(map(len, [*available(), *PRESETS]))
        for key, cls in available().items():
            typer.echo(f"{key:<{width}}  {cls.summary()}")
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
        typer.echo(f"  {one.name:<28} {one.contract!s:<10} {one.summary}")
