"""What several commands have in common: arguments, errors in one line, loading a source."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from graphopt.commands import complete

if TYPE_CHECKING:
    from graphopt.sources import Source

SOURCE_HELP = (
    "package.module:callable, torchvision:NAME, timm:NAME, a saved graphopt model, or a .pt2 file "
    "(with --trust)."
)
SOURCE = typer.Argument(help=SOURCE_HELP, autocompletion=complete.sources)
ARTIFACT = typer.Argument(
    help="A saved model: a folder or a .zip.", autocompletion=complete.artifacts
)
MODE = typer.Option(help="deploy or tune.", autocompletion=complete.modes)
PASSES = typer.Option(
    help="A pipeline, as in canonicalize,package.module:my_rewrite; default: the mode's.",
    autocompletion=complete.pipelines,
)
PRECISION = typer.Option(
    help="bf16 or int8; measured, see docs/precision.md and docs/int8.md.",
    autocompletion=complete.precisions,
)
TRUST = typer.Option(help="Load a .pt2 file, which can execute code stored in it.")
JSON = typer.Option("--json", help="Print the result as JSON.")


def epilog(examples: str, codes: Mapping[int, str]) -> str:
    """The end of a help page: example calls, one a line of `examples`, and what exit codes mean."""
    calls = "\n".join(f"  {one.strip()}" for one in examples.strip().splitlines())
    meanings = "\n".join(f"  {code}  {meaning}" for code, meaning in codes.items())
    return f"Examples:\n{calls}\n\nExit codes:\n{meanings}"


BAD_INPUT = {2: "bad input; one line on standard error says what"}
DONE = {0: "done", **BAD_INPUT}


def fail(error: Exception | str) -> NoReturn:
    typer.echo(f"graphopt: {error}", err=True)
    raise typer.Exit(2)


@contextmanager
def one_line(source: str) -> Iterator[None]:
    """Whatever is wrong with a user's input ends the command with one line."""
    import graphopt
    from graphopt.backends.base import BackendError
    from graphopt.ir.source import first_line
    from graphopt.sources import SourceError

    try:
        yield
    except typer.Exit:  # a RuntimeError
        raise
    except (graphopt.PassError, graphopt.PipelineError, graphopt.ArtifactError, BackendError,
            graphopt.BisectError, graphopt.VerifyError, graphopt.UnknownModule, SourceError,
            OSError) as error:  # fmt: skip
        fail(error)
    except graphopt.CaptureError as error:  # its reasons are a line each
        fail(f"{source}: {' '.join(str(error).split()):.500}")
    except (RuntimeError, ValueError, TypeError) as error:
        # The model does not run on these inputs: the first line says what torch found.
        fail(f"{source}: {first_line(error)}")
    except (LookupError, AssertionError, AttributeError, ArithmeticError) as error:
        if _ours(error):  # a defect, of which the traceback tells more
            raise
        fail(f"{source}: {first_line(error)}")


def _ours(error: Exception) -> bool:
    """Whether an error was raised by this package, and not by what it calls."""
    (*_, (frame, _)) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).is_relative_to(Path(__file__).parents[1])


def check_mode(mode: str) -> None:
    if mode not in complete.MODES:
        fail(f"unknown mode {mode!r}; expected deploy or tune")


def load(source: str, trust: bool) -> Source:
    """The model and the inputs that it comes with, or else declares."""
    import graphopt
    from graphopt.sources import load_source

    model, args, kwargs = load_source(source, trust=trust)
    if not args and not kwargs and graphopt.declared_inputs(model) == (None, None):
        fail(f"{source} declares no example inputs; let the callable return (model, inputs)")
    return model, args, kwargs


def with_inputs(source: str, trust: bool) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The same, with the inputs that the model declares where it comes with none."""
    import graphopt

    model, args, kwargs = load(source, trust)
    if not args and not kwargs:
        declared, named = graphopt.declared_inputs(model)
        args, kwargs = tuple(declared or ()), dict(named or {})
    return model, args, kwargs
