"""Code blocks of a page, run as a reader would: from top to bottom, in one folder, in one scope.

| block | |
|---|---|
| `python` | runs |
| `bash` | every line runs as a command; `# exits with 1` behind it says that it does |
| any, with `title="NAME.EXT"` | is written to that file instead |
| any, with another title | is not run; the title says why |
| `text` right behind a block that ran | is what it printed |

Printed text is compared but for measurements: see `same`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FENCE = re.compile(r"^(?P<indent> *)```(?P<kind>\w*)(?: title=\"(?P<title>[^\"]*)\")?(?P<rest>.*)$")
EXIT = re.compile(r"\s+# exits with (\d)\b.*$")
RUN = ("python", "bash")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language, title, text and line; `behind` is the line of the block before it, if
    only blank lines are between, else 0."""

    kind: str
    title: str
    text: str
    line: int
    behind: int = 0

    @property
    def is_file(self) -> bool:
        return bool(re.fullmatch(r"[\w./-]+\.\w+", self.title))

    @property
    def runs(self) -> bool:
        return self.kind in RUN and not self.title


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page in order."""
    found: list[Block] = []
    lines = iter(enumerate(text.splitlines(), 1))
    near = 0
    for number, line in lines:
        start = FENCE.match(line)
        if start is None:
            near = near if not line.strip() else 0
            continue
        assert not start["rest"], f'line {number}: {line!r}; expected ```language title="..."'
        inside = []
        for _, other in lines:
            if other.strip() == "```":
                break
            inside.append(other.removeprefix(start["indent"]))
        found.append(Block(start["kind"], start["title"] or "", "\n".join(inside), number, near))
        near = number
    return found


def normal(text: str) -> str:
    """What a block printed, without what is measured.

    A number with a fraction or an exponent is a measurement (seconds, errors, versions), and so is the place
    where an error is the largest (`worst ...`); integers are not.
    """
    text = re.sub(r"\b\d+(\.\d+)+(e[+-]?\d+)?|\b\d+e[+-]?\d+", "#", text)
    text = re.sub(r"(?m)^(\s*worst ).*", r"\1#", text)
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def same(printed: str, shown: str) -> bool:
    """Whether a page shows what was printed; a line `...` stands for any lines."""
    parts = re.split(r"(?m)^ *\.\.\.$", normal(shown))
    return bool(re.fullmatch(".*".join(map(re.escape, parts)), normal(printed), re.DOTALL))


def in_process(command: str) -> tuple[str, int]:
    """A `graphopt` command, without the seconds that a new process takes; any other in a shell."""
    name, *arguments = shlex.split(command, comments=True)
    if name != "graphopt":
        return in_shell(command)
    from typer.testing import CliRunner

    from graphopt.cli import app

    done = CliRunner().invoke(app, arguments)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output, done.exit_code


def in_shell(command: str) -> tuple[str, int]:
    """A command as it stands; `graphopt` and `python` are those of the running interpreter."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    return done.stdout + (done.stderr if done.returncode else ""), done.returncode


def run(text: str, name: str, scope: dict[str, Any]) -> None:
    """Run the blocks of a page in the working directory and compare what they print.

    Raises:
        AssertionError: naming the line of the block, what it shows and what was printed.
    """
    for block, found in outputs(text, name, scope):
        where = f"{name}:{block.line}"
        assert same(found, block.text), f"{where} shows\n{block.text}\n\nprinted was\n{found}"


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """A working directory, from which modules can be imported as they can where a user works."""
    before, here = set(sys.modules), Path.cwd()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        os.chdir(here)
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            known = vars(sys.modules[name])
            places = [known.get("__file__"), *(known.get("__path__") or ())]
            if any(Path(one).is_relative_to(folder) for one in places if one):
                del sys.modules[name]


def outputs(text: str, name: str, scope: dict[str, Any]) -> Iterator[tuple[Block, str]]:
    """Run the blocks of a page; yields the blocks of text behind them, with what was printed."""
    printed: dict[int, str] = {}
    for block in blocks(text):
        where = f"{name}:{block.line}"
        if block.is_file:
            path = Path(block.title)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text + "\n")
        elif block.runs and block.kind == "python":
            printed[block.line] = _python(block, where, scope)
        elif block.runs:
            printed[block.line] = "".join(_commands(block, where))
        elif block.kind == "text" and not block.title and block.behind in printed:
            yield block, printed[block.behind]


def _python(block: Block, where: str, scope: dict[str, Any]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile("\n" * block.line + block.text, where, "exec"), scope)
    return out.getvalue()


def _commands(block: Block, where: str) -> Iterator[str]:
    for line in filter(None, block.text.replace("\\\n", " ").splitlines()):
        exits = EXIT.search(line)
        out, code = in_process(EXIT.sub("", line))
        expected = int(exits[1]) if exits else 0
        assert code == expected, f"{where}: {line}: exit code {code}, expected {expected}\n{out}"
        yield out
