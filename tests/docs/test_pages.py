"""Every code block of the documentation runs, and prints what the page shows.

Blocks that are not run are few, and say why in their title. `python -m tests.docs docs/start.md` writes into
a page what its blocks print now.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from graphopt.backends import base
from tests.docs.blocks import Block, blocks, run, same, working_in
from tests.docs.setups import scope_of

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
WITH_CODE = [page for page in PAGES if any(one.runs for one in blocks(page.read_text()))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(base, "_REGISTERED", {})  # to which a page adds
    with working_in(tmp_path):
        yield tmp_path


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_every_block_runs(page: Path, folder: Path):
    scope = scope_of(page.name)
    run(page.read_text(), page.name, scope)
    for name, value in scope.items():
        if name.startswith("test_"):
            value()


def test_every_block_has_a_language():
    """What has none could be a command that nobody runs."""
    for page in PAGES:
        for block in blocks(page.read_text()):
            assert block.kind, f"{page.name}:{block.line}"


def test_what_is_not_run_says_why():
    kept = {
        f"{page.name}: {block.title}"
        for page in PAGES
        for block in blocks(page.read_text())
        if block.kind in ("python", "bash") and block.title and not block.is_file
    }
    assert kept == {
        "start.md: not run in the tests: it installs torch",
        "auto.md: not run here: it may measure for a minute",
        "triton.md: generated",  # compared in tests/backends/triton/test_golden.py
    }


# -- the tests of this test ---------------------------------------------------------------------


def test_measurements_may_differ_and_nothing_else():
    assert same("done in 2.1 s, error 1.0e-15", "done in 0.8 s, error 3.1e-16")
    assert same("torch 2.13.0\n  worst site a at b", "torch 2.14.1\n  worst site c at d")
    assert same("a\nb\nc", "a\n...\nc")
    assert not same("159 applied", "158 applied")
    assert not same("error 1.0e-15", "no error")
    assert not same("a\nb", "a")


def test_a_page_that_is_wrong_is_found(folder: Path):
    with pytest.raises(AssertionError, match=r"page:5 shows\n4\n\nprinted was\n3"):
        run("```python\nprint(1 + 2)\n```\n\n```text\n4\n```", "page", {})
    with pytest.raises(AssertionError, match="exit code 3, expected 0"):
        run("```bash\nexit 3\n```", "page", {})
    with pytest.raises(ZeroDivisionError):
        run(
            '```python title="a/b.py"\nx = 0\n```\n```python\nfrom a.b import x\n1 / x\n```',
            "page",
            {},
        )


def test_indented_blocks_are_read_too():
    found = blocks("- item\n\n  ```python\n  if x:\n      y\n  ```\n")
    assert found == [Block("python", "", "if x:\n    y", 3)]
