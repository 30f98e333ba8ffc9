"""The command `graphopt passes`."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections import Counter
from typing import Annotated, Any

import typer

from graphopt.commands import complete
from graphopt.commands.shared import DONE, epilog, fail

EPILOG = epilog(
    """
    graphopt passes
    graphopt passes fold-batch-norm
    graphopt passes deploy
    """,
    DONE,
)
NAME = typer.Argument(help="A pass, a rewrite or a preset.", autocompletion=complete.passes)


def passes(name: Annotated[str | None, NAME] = None) -> None:
    """List the passes with the state of their proofs, or show one: formula, preconditions, proof.

    Proofs are made on first use and kept under ~/.cache/graphopt.
    """
    from graphopt.passes.base import available
    from graphopt.pipeline import PRESETS

    if name is None:
        width = max(map(len, [*available(), *PRESETS]))
        for key, cls in available().items():
            counts = Counter(map(_status, cls.all_rewrites()))
            proofs = ", ".join(f"{count} {what}" for what, count in counts.items())
            typer.echo(f"{key:<{width}}  {cls.summary()} [{proofs or 'checked per site'}]")
        for key, text in PRESETS.items():
            typer.echo(f"{key:<{width}}  = {text}")
    elif name in PRESETS:
        typer.echo(f"{name} = {PRESETS[name]}")
    elif name in available() or not _show_rewrite(name):
        _show_pass(name)


def _proof(one: Any) -> Any:
    from rich.console import Console

    from graphopt.verify.proof import proof_of

    with Console(stderr=True).status(f"proving {one.name}"):
        return proof_of(one)


def _status(one: Any) -> str:
    if one.unproved:
        return "checked per site"
    return "proved" if _proof(one).proved else "NOT PROVED"


def _show_rewrite(name: str) -> bool:
    """Whether there is a rewrite of this name, then shown."""
    from graphopt.passes.base import available

    for cls in available().values():
        for one in cls.all_rewrites():
            if one.name == name:
                typer.echo(f"{one.name} ({one.contract}), a rewrite of {cls.name}")
                typer.echo(inspect.getdoc(one.function))
                typer.echo(f"not proved: {one.unproved}" if one.unproved else str(_proof(one)))
                return True
    return False


def _show_pass(name: str) -> None:
    from graphopt.passes.base import PassError, find

    try:
        cls = find(name)
    except PassError as error:
        fail(error)
    typer.echo(f"{name}: {inspect.getdoc(cls)}\n")
    module = sys.modules[cls.__module__]
    if module.__doc__:
        typer.echo(module.__doc__.strip() + "\n")
    for field in dataclasses.fields(cls):
        typer.echo(f"option {field.name}: {field.type} = {field.default}")
    for one in cls.all_rewrites():
        typer.echo(f"{one.name} ({one.contract}): {one.summary}")
        lines = [f"not proved: {one.unproved}"]
        if not one.unproved:
            proof = _proof(one)
            lines = str(proof).splitlines()[:1]
            lines += [f"  given {given}" for given in proof.conditions] if proof.proved else [
                f"  residual: {proof.residual}"
            ]  # fmt: skip
        for line in lines:
            typer.echo(f"    {line}")
