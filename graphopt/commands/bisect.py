"""The command `graphopt bisect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphopt.commands.shared import (
    BAD_INPUT,
    MODE,
    PASSES,
    SOURCE,
    TRUST,
    check_mode,
    epilog,
    load,
    one_line,
)

EPILOG = epilog(
    """
    graphopt bisect mine.models:net --passes canonicalize,mine.passes:my_rewrite,deploy
    graphopt bisect mine.models:net --predicate 'python accuracy.py {}' --verbose -o why.py
    """,
    {0: "nothing is wrong", 1: "a rewrite is, and the reproducer is written", **BAD_INPUT},
)
OUTPUT = typer.Option("-o", "--output", help="Write the reproducer here.")
PREDICATE = typer.Option(
    help="A shell command that exits with 0 if a saved model is good; {} stands for its "
    "path (default: it is the last argument). Without, models are compared in float64."
)


def bisect(
    source: Annotated[str, SOURCE],
    output: Annotated[Path, OUTPUT] = Path("reproducer.py"),
    mode: Annotated[str, MODE] = "deploy",
    passes: Annotated[str | None, PASSES] = None,
    predicate: Annotated[str | None, PREDICATE] = None,
    trust: Annotated[bool, TRUST] = False,
    verbose: Annotated[bool, typer.Option(help="Show what the predicate prints.")] = False,
) -> None:
    """Find the one application of a rewrite that breaks a model; exit with 1 if there is one."""
    from graphopt.progress import shown

    with shown("loading torch") as status, one_line(source):
        import graphopt
        from graphopt.bisect import command

        pipeline = graphopt.Pipeline(mode if passes is None else passes)
        check_mode(mode)
        status(f"loading {source}")
        model, args, kwargs = load(source, trust)
        show = (lambda said: typer.echo(said, err=True)) if verbose else None
        found = graphopt.bisect(
            model, args or None, kwargs or None, mode=mode, passes=pipeline,
            predicate=None if predicate is None else command(predicate, show),
            progress=status,
        )  # fmt: skip
        if found.record is not None:
            found.save(output)
    typer.echo(str(found))
    if found.record is not None:
        typer.echo(f"  reproducer {output}")
        raise typer.Exit(1)
