"""The command `graphopt verify`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.commands import complete
from graphopt.commands.shared import BAD_INPUT, JSON, SOURCE_HELP, TRUST, epilog, one_line

if TYPE_CHECKING:
    from graphopt.sources import Source

EPILOG = epilog(
    """
    graphopt verify torchvision:resnet18 resnet18.gopt
    graphopt verify mine.models:net theirs.pt2 --trust --limit 1e-6 --json
    """,
    {0: "equal", 1: "not equal", **BAD_INPUT},
)
A = typer.Argument(metavar="A", help=SOURCE_HELP, autocompletion=complete.sources)
B = typer.Argument(metavar="B", help="Another one.", autocompletion=complete.sources)


def verify(
    source: Annotated[str, A],
    optimized: Annotated[str, B],
    trust: Annotated[bool, TRUST] = False,
    limit: Annotated[
        float, typer.Option(help="Relative error in float64 of equal models.")
    ] = 1e-10,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Compare any model with any other; exit with 1 if they differ. Inputs are A's, or else B's."""
    from graphopt.progress import shown

    with shown("loading torch") as status:
        import graphopt
        from graphopt.sources import load_source

        loaded: list[Source] = []
        for text in (source, optimized):
            with one_line(text):
                status(f"loading {text}")
                loaded.append(load_source(text, trust=trust))
        status(f"comparing {source} and {optimized}")
        with one_line(f"{source} and {optimized}"):
            (a, args, kwargs), (b, *_) = loaded
            if not args and not kwargs and graphopt.declared_inputs(a) == (None, None):
                _, args, kwargs = loaded[1]
            found = graphopt.verify(a, b, args or None, kwargs or None, limit=limit)
    typer.echo(json.dumps(found.to_dict(), allow_nan=False) if as_json else str(found))
    raise typer.Exit(0 if found.ok else 1)
