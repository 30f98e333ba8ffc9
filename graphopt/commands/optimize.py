"""The command `graphopt optimize`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from graphopt.commands import complete
from graphopt.commands.shared import (
    DONE,
    JSON,
    MODE,
    PASSES,
    PRECISION,
    SOURCE,
    TRUST,
    check_mode,
    epilog,
    load,
    one_line,
)

EPILOG = epilog(
    """
    graphopt optimize torchvision:resnet50
    graphopt optimize mine.models:net -o net.gopt --backend auto --html report.html
    graphopt optimize mine.models:net --passes canonicalize,mine.passes:my_rewrite,deploy
    graphopt optimize net.gopt.zip --explain layer1.0.conv1 --json
    """,
    DONE,
)
OUTPUT = typer.Option("-o", "--output", help="Save the result here, as a folder or a .zip.")
LIMIT = typer.Option(help="Apply this many rewrites at most.", min=0)
VALIDATE = typer.Option(help="Roll back rewrites that fail their check.")
EXPLAIN = typer.Option(
    metavar="MODULE",
    help="Tell what happened to a module, as in layer1.0.conv1, and inside it; may be repeated.",
)
BACKEND = typer.Option(
    help="eager, prepacked, openvino, onnxruntime, inductor, triton, or auto.",
    autocompletion=complete.backends_or_auto,
)


def optimize(
    source: Annotated[str, SOURCE],
    output: Annotated[Path | None, OUTPUT] = None,
    mode: Annotated[str, MODE] = "deploy",
    passes: Annotated[str | None, PASSES] = None,
    backend: Annotated[str, BACKEND] = "eager",
    precision: Annotated[str | None, PRECISION] = None,
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
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Optimize a model and print the report."""
    # Everything that can be wrong with the command is checked before torch does any work.
    from graphopt.progress import shown

    with shown("loading torch") as status, one_line(source):
        import graphopt
        from graphopt.artifact import check_place
        from graphopt.backends.base import find
        from graphopt.optimize import at_precision
        from graphopt.report.story import modules_of, spellings

        check_mode(mode)
        pipeline = graphopt.Pipeline(mode if passes is None else passes)
        at_precision(pipeline, precision, mode)
        if backend != "auto":
            find(backend)
        if output is not None:
            check_place(output)
        status.expected = len(pipeline.stages) + 4
        status(f"loading {source}")
        model, args, kwargs = load(source, trust)
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
        return
    _print(result.report)
    if output is not None:
        typer.echo(f"saved      {output}")
    for story in stories.values():
        typer.echo(f"\n{story}")


def _print(report: object) -> None:
    """In colours and tables on a terminal, as plain text elsewhere."""
    from rich.console import Console

    if sys.stdout.isatty():
        Console().print(report)
    else:
        typer.echo(str(report))
