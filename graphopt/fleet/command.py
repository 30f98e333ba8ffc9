"""The commands `graphopt checkpoint` and `graphopt combine`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

EPILOG = (
    "Example: graphopt checkpoint mine.models:adapted --weights base/ --weights adapter.safetensors "
    "--read-as '^model=base_model.model.model' -o merged. See docs/fleet.md."
)
COMBINE_EPILOG = "Example: graphopt combine base/ --add tuned/=0.4 --add other/=-0.2 -o merged"
UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
}


def size(text: str) -> int:
    """Bytes, from 2GB or 512MiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in UNITS:
        raise typer.BadParameter(f"expected a size as in 2GB or 512MiB, found {text!r}")
    return int(float(match[1]) * UNITS[match[2].upper()])


def rule(text: str) -> tuple[str, str]:
    """A pattern and its replacement, from PATTERN=REPLACEMENT."""
    pattern, equals, replacement = text.partition("=")
    try:
        re.compile(pattern)
    except re.error as error:
        raise typer.BadParameter(f"{pattern!r} is no pattern: {error}") from error
    if not equals or not pattern:
        raise typer.BadParameter(f"expected PATTERN=REPLACEMENT, found {text!r}")
    return pattern, replacement


def checkpoint(
    source: Annotated[str, typer.Argument(help="package.module:callable that returns (model, inputs), the "
                                               "model without values.")],
    weights: Annotated[list[str], typer.Option(help="A safetensors file, an index, or a folder; may be "
                                                    "repeated.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="A folder for the result.")],
    passes: Annotated[str | None, typer.Option(help="A pipeline; default: adapters are merged.")] = None,
    across: Annotated[bool, typer.Option(help="Weights may go into those of other modules.")] = False,
    read_as: Annotated[list[str] | None, typer.Option(help="PATTERN=REPLACEMENT for names in files.")] = None,
    write_as: Annotated[list[str] | None, typer.Option(help="The same for names of the result.")] = None,
    memory: Annotated[str, typer.Option(help="What the process is to hold at most.")] = "2GB",
    shard: Annotated[str, typer.Option(help="Size of a file of the result.")] = "256MB",
    validate: Annotated[bool, typer.Option(help="Check every site in float64.")] = True,
    ray: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Let a Ray cluster write the files: its "
                                            "address, auto, or local to start one.")] = None,
) -> None:  # fmt: skip
    """Rewrite the weights of a checkpoint that may be larger than memory, tensor by tensor."""
    limits = size(memory), size(shard)
    rules = [[rule(one) for one in some or ()] for some in (read_as, write_as)]
    from graphopt.progress import shown

    with shown("loading torch") as status:
        from graphopt.builds.errors import BuildError
        from graphopt.fleet.checkpoint import MERGE, rewrite_checkpoint
        from graphopt.fleet.mapped import CheckpointError
        from graphopt.ir.source import CaptureError
        from graphopt.passes.base import PassError
        from graphopt.pipeline import PipelineError
        from graphopt.sources import SourceError, load_source

        try:
            status(f"loading {source}")
            model, args, kwargs = load_source(source)
            found = rewrite_checkpoint(
                model, args or kwargs, weights, output, passes=passes or MERGE, across=across,
                read_as=rules[0], write_as=rules[1], memory=limits[0], shard=limits[1],
                validate=validate, progress=status, ray=ray,
            )  # fmt: skip
        except (
            BuildError,
            CheckpointError,
            CaptureError,
            PassError,
            PipelineError,
            SourceError,
            OSError,
        ) as error:
            typer.echo(f"graphopt: {error}", err=True)
            raise typer.Exit(2) from None
    typer.echo(str(found))


def term(text: str) -> tuple[str, float]:
    """A checkpoint and its weight, from PATH=WEIGHT."""
    path, _, weight = text.rpartition("=")
    try:
        found = path, float(weight)
    except ValueError:
        found = "", 0.0
    if not found[0]:
        raise typer.BadParameter(f"expected PATH=WEIGHT as in tuned/=0.4, found {text!r}")
    return found


def combine(
    base: Annotated[str, typer.Argument(help="A safetensors file, an index, or a folder.")],
    add: Annotated[list[str], typer.Option(metavar="PATH=WEIGHT", help="A checkpoint, and the weight of what "
                                           "it has over the base; may be repeated.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="A folder for the result.")],
    memory: Annotated[str, typer.Option(help="What the process is to hold at most.")] = "2GB",
    shard: Annotated[str, typer.Option(help="Size of a file of the result.")] = "256MB",
) -> None:  # fmt: skip
    """Task arithmetic: base + sum of WEIGHT (checkpoint - base), in float64, tensor by tensor."""
    limits, terms = (size(memory), size(shard)), [term(one) for one in add]
    from graphopt.progress import shown

    with shown("loading torch") as status:
        from graphopt.fleet.arithmetic import combine as run
        from graphopt.fleet.mapped import CheckpointError

        try:
            files = run(base, terms, output, memory=limits[0], shard=limits[1], progress=status)
        except (CheckpointError, OSError) as error:
            typer.echo(f"graphopt: {error}", err=True)
            raise typer.Exit(2) from None
    typer.echo(f"{output}: {len(files)} files")
