"""The commands `graphopt build` and `graphopt init`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from graphopt.commands.shared import SOURCE, epilog

BUILD_EPILOG = epilog(
    """
    graphopt build
    graphopt build deploy.toml --dry-run
    graphopt build --locked --target cpu --json
    """,
    {0: "built and verified", 2: "the configuration or a file it names cannot be used",
     3: "the model is not captured", 4: "a contract is violated", 5: "over a budget",
     6: "not what the lock file says", 7: "not written"},
)  # fmt: skip
INIT_EPILOG = epilog(
    """
    graphopt init torchvision:resnet50
    graphopt init mine.models:net -o deploy.toml
    """,
    {0: "written", 2: "the source cannot be loaded, or the file exists"},
)

CONFIG = typer.Argument(help="The configuration; see docs/build.md.")


def build(
    config: Annotated[Path, CONFIG] = Path("graphopt.toml"),
    target: Annotated[
        list[str] | None, typer.Option(help="Only this target; may be repeated.")
    ] = None,
    locked: Annotated[
        bool, typer.Option("--locked", help="Refuse what differs from the lock file.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the configuration, print the plan.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Build the artifacts that a configuration describes, verified, each in its place at once."""
    from graphopt.builds.errors import BuildError
    from graphopt.progress import shown

    try:
        if dry_run:
            typer.echo(_plan(config, target, as_json))
            return
        with shown("loading torch") as status:
            from graphopt.builds.building import build as run

            found = run(config, locked=locked, targets=target, progress=status)
    except BuildError as error:
        if as_json:
            typer.echo(json.dumps({"ok": False, "code": error.code, "error": str(error)}))
        typer.echo(f"graphopt: {error}", err=True)
        raise typer.Exit(error.code) from None
    if as_json:
        typer.echo(
            json.dumps(
                {"ok": True, "code": 0, "built": [one.to_dict() for one in found]}, allow_nan=False
            )
        )
        return
    for one in found:
        typer.echo(f"{one.name}: built and verified in {one.seconds:.1f} s")
        typer.echo(f"  {one.path}  {one.bytes / 2**20:.1f} MiB  sha256 {one.sha256[:16]}...")
        typer.echo(
            f"  float64 {one.float64_error:.1e}; own dtype against float64: source {one.source_error:.1e}, "
            f"built {one.error:.1e} (relative)"
        )
        for name in one.exports:
            typer.echo(f"  exported {name}")


def _plan(config: Path, only: list[str] | None, as_json: bool) -> str:
    """What a build would do; nothing is loaded, built or written."""
    from graphopt.builds.building import plan
    from graphopt.builds.config import read
    from graphopt.builds.lock import versions

    file = read(config)
    chosen = plan(file, only)
    found = file.config
    if as_json:
        data = found.model_dump()
        data["targets"] = [
            {**target.model_dump(), "passes": pipeline.text} for target, pipeline in chosen
        ]
        return json.dumps({"plan": data, "versions": versions(found)}, indent=1)
    lines = [f"model      {found.model.source}"]
    if found.model.weights:
        lines.append(f"weights    {found.model.weights}")
    for name, one in found.inputs.items():
        lines.append(f"input      {name}: {one.dtype} [{', '.join(map(str, one.shape))}]")
    for name, size in found.dimensions.items():
        lines.append(
            f"dimension  {name}: {size.min} to {size.max or 'any'}, captured with {size.example}"
        )
    for target, pipeline in chosen:
        suffix = ".gopt.zip" if found.build.archive else ".gopt"
        lines.append(f"target     {target.name} -> {found.build.output}/{target.name}{suffix}")
        lines.append(f"  passes   {pipeline.text}")
        lines.append(
            f"  backend  {target.backend}{f', {target.precision}' if target.precision else ''}"
        )
        if target.export:
            lines.append(f"  export   {', '.join(target.export)}")
        limits = {name: value for name, value in target.budget if value is not None}
        if limits:
            lines.append(
                f"  budget   {', '.join(f'{name} {value:g}' for name, value in limits.items())}"
            )
    return "\n".join(lines)


def init(
    source: Annotated[str, SOURCE],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Write the configuration here.")
    ] = Path("graphopt.toml"),
    trust: Annotated[bool, typer.Option(help="Load a .pt2 file, which can execute code.")] = False,
) -> None:
    """Write a commented configuration that builds a model."""
    if output.exists():
        typer.echo(f"graphopt: {output} exists; not overwriting it", err=True)
        raise typer.Exit(2)
    from graphopt.progress import shown

    with shown("loading torch") as status:
        from graphopt.builds.starter import starter
        from graphopt.sources import SourceError, load_source

        try:
            status(f"loading {source}")
            text = starter(source, load_source(source, trust=trust))
            output.write_text(text)
        except (SourceError, OSError) as error:
            typer.echo(f"graphopt: {error}", err=True)
            raise typer.Exit(2) from None
    typer.echo(
        f"wrote {output}; now: graphopt build {'' if output.name == 'graphopt.toml' else output}".rstrip()
    )
