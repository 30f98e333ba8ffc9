"""The command `graphopt bench`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from graphopt.commands import complete
from graphopt.commands.shared import (
    BAD_INPUT,
    JSON,
    MODE,
    PASSES,
    PRECISION,
    SOURCE,
    TRUST,
    check_mode,
    epilog,
    one_line,
    with_inputs,
)

EPILOG = epilog(
    """
    graphopt bench torchvision:resnet50
    graphopt bench mine.models:net --backend openvino --backend onnxruntime --seconds 60
    graphopt bench net.gopt --threads 1 --json
    """,
    {0: "measured", 1: "a backend that was asked for by name fails or is wrong; the table says so",
     **BAD_INPUT},
)  # fmt: skip
BACKENDS = typer.Option(
    help="Measure this one; may be repeated. All that are installed by default.",
    autocompletion=complete.backends,
)


def bench(
    source: Annotated[str, SOURCE],
    backend: Annotated[list[str] | None, BACKENDS] = None,
    seconds: Annotated[float, typer.Option(min=0, help="For measuring; building adds to it.")] = 20,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of torch and of the backends.")
    ] = None,
    mode: Annotated[str, MODE] = "deploy",
    passes: Annotated[str | None, PASSES] = None,
    precision: Annotated[str | None, PRECISION] = None,
    trust: Annotated[bool, TRUST] = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Time a model as it is, and optimized on each backend, beside one another on its example inputs."""
    from graphopt.progress import shown

    with shown("loading torch") as status, one_line(source):
        import torch

        import graphopt
        from graphopt.backends.base import find
        from graphopt.commands import benching
        from graphopt.optimize import at_precision

        check_mode(mode)
        pipeline = at_precision(
            graphopt.Pipeline(mode if passes is None else passes), precision, mode
        )
        backends = [find(name) for name in dict.fromkeys(backend or ())]
        if threads is not None:
            torch.set_num_threads(threads)
        status(f"loading {source}")
        loaded = with_inputs(source, trust)
        found = benching.measured(*loaded, mode, pipeline, backends, seconds, status)
    if as_json:
        typer.echo(json.dumps({"source": source, **found}, allow_nan=False))
    else:
        typer.echo("\n".join(benching.lines(source, found)))
    bad = backend and any(row["ms"] is None for row in found["table"])
    raise typer.Exit(int(bool(bad)))
