"""The command `graphopt kernels`."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from graphopt.commands.shared import (
    DONE,
    JSON,
    MODE,
    PASSES,
    SOURCE,
    TRUST,
    check_mode,
    epilog,
    fail,
    load,
    one_line,
)

EPILOG = epilog(
    """
    graphopt kernels mine.models:net
    TRITON_INTERPRET=1 graphopt kernels torchvision:resnet18 --json
    """,
    DONE,
)


def kernels(
    source: Annotated[str, SOURCE],
    mode: Annotated[str, MODE] = "deploy",
    passes: Annotated[str | None, PASSES] = None,
    trust: Annotated[bool, TRUST] = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Print the Triton kernels that a model becomes: what each computes, moves, and its source.

    Without a GPU, set TRITON_INTERPRET=1.
    """
    from graphopt.progress import shown

    with shown("loading torch") as status, one_line(source):
        import graphopt
        from graphopt.backends.base import find

        pipeline = graphopt.Pipeline(mode if passes is None else passes)
        check_mode(mode)
        find("triton")
        status(f"loading {source}")
        model, args, kwargs = load(source, trust)
        result = graphopt.optimize(
            model, args or None, kwargs or None, mode=mode, passes=pipeline, backend="triton",
            progress=status,
        )  # fmt: skip
        if result.report.backend != "triton" and not result.kernels:
            fail(f"{source}: {'; '.join(result.report.backend_notes)}")
        found = result.kernels
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(one) for one in found], allow_nan=False))
        return
    for one in found:
        where = ", ".join(one.origins) or "-"
        typer.echo(f"# {one.name} ({one.kind}): {one.nodes} ops of {where}; "
                   f"{one.bytes} bytes, {one.flops} FLOPs")  # fmt: skip
        typer.echo(f"{one.source}\n")
