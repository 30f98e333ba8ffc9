"""The command `graphopt sweep`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

EPILOG = """Examples: graphopt sweep; graphopt sweep prune.toml --dry-run; graphopt sweep --ray auto

Exit codes: 0 every trial has a result; 2 the configuration cannot be used; 4 trials failed, the table says
which and why; 7 results could not be written. See docs/sweep.md."""

CONFIG = typer.Argument(help="The configuration; see docs/sweep.md.")
RAY = typer.Option(
    metavar="ADDRESS", help="Run on a Ray cluster: its address, auto, or local to start one."
)


def sweep(
    config: Annotated[Path, CONFIG] = Path("sweep.toml"),
    ray: Annotated[str | None, RAY] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run failed trials again.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the configuration, list the trials.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Try models and pipelines: a grid or an Optuna study, in processes or on Ray; goes on where it was."""
    from rich.console import Console

    from graphopt.builds.errors import BuildError, Violated
    from graphopt.progress import shown

    try:
        if dry_run:
            typer.echo(_plan(config, as_json))
            return
        with shown("loading torch") as status:
            from graphopt.fleet.sweeping import sweep as run

            found = run(config, ray=ray, retry=retry, progress=status)
    except BuildError as error:
        if as_json:
            typer.echo(json.dumps({"ok": False, "code": error.code, "error": str(error)}))
        typer.echo(f"graphopt: {error}", err=True)
        raise typer.Exit(error.code) from None
    code = Violated.code if found.failed else 0
    if as_json:
        typer.echo(json.dumps({"ok": not code, "code": code, **found.to_dict()}, allow_nan=False))
    else:
        Console().print(found.table())
        for line in found.reasons():
            typer.echo(line)
        count, failed = len(found.results), len(found.failed)
        typer.echo(f"{count} trials, {found.run} run now, {failed} failed; {found.path / 'table.md'}, "
                   "results.json, pareto.png")  # fmt: skip
    raise typer.Exit(code)


def _plan(config: Path, as_json: bool) -> str:
    """The trials; nothing is run."""
    from graphopt.fleet.sweep_config import read

    file = read(config)
    study, trials = file.config.study, file.sources()
    if study is None:
        trials += file.grid()
    if as_json:
        told = ("key", "model", "pipeline", "passes", "backend", "precision", "options")
        plan = {"trials": [{name: getattr(one, name) for name in told} for one in trials]}
        return json.dumps(plan if study is None else {**plan, "study": study.model_dump()})
    lines = [f"{one.key}  {one}" for one in trials]
    if study is not None:
        models = len(file.config.models)
        lines.append(f"and {study.trials} of a study of each of {models} models, seed {study.seed}")
    return "\n".join(lines)
