"""The command `graphopt inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from graphopt.commands.shared import (
    BAD_INPUT,
    JSON,
    SOURCE,
    TRUST,
    epilog,
    one_line,
    with_inputs,
)

EPILOG = epilog(
    """
    graphopt inspect net.gopt
    graphopt inspect build/cpu.gopt.zip --json
    graphopt inspect torchvision:resnet50 --depth 2
    """,
    {0: "an artifact that is intact, or a source that is captured as one graph",
     1: "a source that is not", **BAD_INPUT},
)  # fmt: skip


def inspect(
    source: Annotated[str, SOURCE],
    depth: Annotated[
        int, typer.Option(min=0, help="Of modules whose cost is shown, for a source.")
    ] = 1,
    trust: Annotated[bool, TRUST] = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Show what is in an artifact, every sha256 checked; of a source, what is captured and what it costs."""
    from graphopt.progress import shown

    code = 0
    with shown("loading torch") as status, one_line(source):
        from graphopt.artifact import is_artifact
        from graphopt.commands import inspecting

        found: dict[str, Any]
        if is_artifact(Path(source)):
            status(f"checking {source}")
            found = inspecting.of_artifact(Path(source))
            lines = inspecting.artifact_lines(found)
        else:
            status(f"loading {source}")
            loaded = with_inputs(source, trust)
            status(f"capturing {source}")
            found = inspecting.of_source(source, *loaded, depth)
            lines = inspecting.source_lines(found)
            code = int(bool(found["left_out"]))
    typer.echo(json.dumps(found, allow_nan=False) if as_json else "\n".join(lines))
    raise typer.Exit(code)
