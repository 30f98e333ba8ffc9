"""The command line: the table of its commands, each in a file of its own.

Exit codes: 0 done (or equal, or good), 2 bad input (one line on stderr says what), 1 a difference was
found, or anything unexpected; `graphopt COMMAND --help` has those of each command.
"""

from __future__ import annotations

import typer

from graphopt.builds import command as builds
from graphopt.commands import (
    bench,
    bisect,
    groups,
    inspect,
    kernels,
    optimize,
    passes,
    sign,
    verify,
)
from graphopt.fleet.command import COMBINE_EPILOG, EPILOG as CHECKPOINT_EPILOG, checkpoint, combine
from graphopt.fleet.sweep_command import EPILOG as SWEEP_EPILOG, sweep

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False,
    help="The optimizing compiler for trained PyTorch models.",
)  # fmt: skip
app.command(epilog=optimize.EPILOG)(optimize.optimize)
app.command(epilog=builds.BUILD_EPILOG)(builds.build)
app.command(epilog=builds.INIT_EPILOG)(builds.init)
app.command(epilog=inspect.EPILOG)(inspect.inspect)
app.command(epilog=verify.EPILOG)(verify.verify)
app.command(epilog=sign.SIGN_EPILOG)(sign.sign)
app.command(epilog=sign.VERIFY_EPILOG)(sign.verify_signature)
app.command(epilog=bench.EPILOG)(bench.bench)
app.command(epilog=bisect.EPILOG)(bisect.bisect)
app.command(epilog=passes.EPILOG)(passes.passes)
app.command(epilog=kernels.EPILOG)(kernels.kernels)
app.command(epilog=groups.EPILOG)(groups.groups)
app.command(epilog=CHECKPOINT_EPILOG)(checkpoint)
app.command(epilog=COMBINE_EPILOG)(combine)
app.command(epilog=SWEEP_EPILOG)(sweep)


def main() -> None:
    app()
