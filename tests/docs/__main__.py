"""Write into pages what their blocks print now: `python -m tests.docs docs/start.md ...`.

A block that shows the same but for measurements stays as it is, and so does one with `...`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.docs.blocks import outputs, same, working_in
from tests.docs.setups import scope_of


def main() -> None:
    for path in [Path(one).resolve() for one in sys.argv[1:]]:
        lines = path.read_text().splitlines()
        with tempfile.TemporaryDirectory() as folder, working_in(Path(folder)):
            made = list(outputs(path.read_text(), path.name, scope_of(path.name)))
        for block, printed in reversed(made):
            if not same(printed, block.text):
                print(f"{path.name}:{block.line}", "left" if "..." in block.text else "written")
                if "..." not in block.text:
                    end = block.line + len(block.text.splitlines())
                    lines[block.line : end] = printed.rstrip().splitlines()
        path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
