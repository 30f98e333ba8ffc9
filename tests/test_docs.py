"""The code in the documentation runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parent.parent / "docs"


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", ["writing-passes.md"])
def test_every_block_runs(page: str, capsys: pytest.CaptureFixture[str]):
    scope: dict[str, Any] = {"__name__": page}
    blocks = python_blocks(page)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), scope)
    for name, test in list(scope.items()):
        if name.startswith("test_"):
            test()
    applied = [one.rewrite for one in scope["fast"].report.applied]
    assert applied[:2] == ["take-in-bias", "pull-out-factor"]  # the rest are ours
    assert scope["wrong"].residual in capsys.readouterr().out
