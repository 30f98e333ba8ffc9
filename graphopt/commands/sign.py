"""The commands `graphopt sign` and `graphopt verify-signature`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphopt.commands.shared import ARTIFACT, BAD_INPUT, DONE, epilog, one_line

SIGN_EPILOG = epilog(
    """
    graphopt sign build/cpu.gopt --key key.pem
    GRAPHOPT_KEY_PASSWORD=... graphopt sign net.gopt.zip --key key.pem --signature net.sig
    """,
    DONE,
)
VERIFY_EPILOG = epilog(
    """
    graphopt verify-signature build/cpu.gopt --key public.pem
    """,
    {0: "signed by the owner of the key, and unchanged", 1: "not signed, changed, or by another key",
     **BAD_INPUT},
)  # fmt: skip
SIGNATURE = typer.Option(help="By default beside the artifact: NAME.gopt.sig.")
PRIVATE = typer.Option(help="A private key on an elliptic curve, a PEM file.")
PUBLIC = typer.Option(help="The public key, a PEM file.")
PASSWORD = typer.Option(envvar="GRAPHOPT_KEY_PASSWORD", help="Of an encrypted key.")


def sign(
    artifact: Annotated[Path, ARTIFACT],
    key: Annotated[Path, PRIVATE],
    signature: Annotated[Path | None, SIGNATURE] = None,
    password: Annotated[str | None, PASSWORD] = None,
) -> None:
    """Sign an artifact with a key of yours; needs graphopt[sign]."""
    from graphopt.progress import shown

    with shown("loading torch") as status, one_line(str(artifact)):
        from graphopt.signing import sign as run

        status(f"signing {artifact}")
        written = run(artifact, key, signature=signature, password=password)
    typer.echo(f"signed {artifact}: {written}")


def verify_signature(
    artifact: Annotated[Path, ARTIFACT],
    key: Annotated[Path, PUBLIC],
    signature: Annotated[Path | None, SIGNATURE] = None,
) -> None:
    """Check who signed an artifact, and that nothing in it has changed since; needs graphopt[sign]."""
    from graphopt.progress import shown

    with shown("loading torch") as status, one_line(str(artifact)):
        from graphopt.signing import SignatureError, verify_signature as run

        status(f"checking {artifact}")
        try:
            run(artifact, key, signature=signature)
        except SignatureError as error:
            typer.echo(f"graphopt: {error}", err=True)
            raise typer.Exit(1) from None
    typer.echo(f"{artifact}: signed by the owner of {key}, and unchanged")
