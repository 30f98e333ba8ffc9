"""The site: every page is in the navigation, every link leads somewhere, every pass has an example.

`make docs` builds it, and fails on what is missed here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.generator import passes
from docs.generator.examples import EXAMPLES
from docs.generator.passes import index, page
from graphopt.passes.base import available
from graphopt.pipeline import PRESETS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
OURS = {name: cls for name, cls in available().items() if cls.__module__.startswith("graphopt.")}


def paths(nav: Any) -> list[str]:
    """The pages of a navigation, however deep."""
    if isinstance(nav, str):
        return [nav]
    return [path for one in (nav.values() if isinstance(nav, dict) else nav) for path in paths(one)]


def test_every_page_is_in_the_navigation():
    nav = paths(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(nav) == sorted({"passes/index.md", *(one.name for one in DOCS.glob("*.md"))})


@pytest.mark.parametrize(
    "source", [*sorted(DOCS.glob("*.md")), *sorted(ROOT.glob("*.md"))], ids=lambda path: path.name
)
def test_every_link_leads_somewhere(source: Path):
    text = re.sub(r"```.*?```", "", source.read_text(), flags=re.DOTALL)
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", text):
        target = (source.parent / link).resolve() if link else source
        if target.parent == DOCS / "passes":
            assert f"passes/{target.name}" in {
                "passes/index.md",
                *(f"passes/{one}.md" for one in OURS),
            }
            continue
        assert target.exists(), link
        assert not anchor or anchor[1:] in anchors(target), f"{link}{anchor}"


def anchors(target: Path) -> set[str]:
    headings = re.findall(r"(?m)^#+ (.*)$", target.read_text())
    return {re.sub(r"[^\w -]", "", one).strip().lower().replace(" ", "-") for one in headings}


# -- pages of passes ----------------------------------------------------------------------------


def test_every_pass_has_an_example():
    assert set(EXAMPLES) == set(OURS), "docs/generator/examples.py has a small model for every pass"


@pytest.mark.parametrize("name", OURS)
def test_a_page_says_what_is_promised_and_shows_what_the_pass_does(name: str):
    text = page(name)
    assert text.startswith(f"# {name}\n\n{OURS[name].summary()}")
    assert re.search(r"Exact|Algebraic|Masked|Calibrated", text)
    before, after = re.findall(r"```text\n(graph\(.*?)\n```", text, re.DOTALL)
    assert after != before


def test_a_page_has_formula_options_contract_and_reasons():
    text = page("fold-batch-norm")
    assert "y = s * (W x + b) + t" in text
    assert "### fold-batch-norm-into-conv\n\nContract: Algebraic." in text
    assert "| `ratio` | float or None | `None` |" in page("prune")
    assert "Masked" in page("prune")
    assert "not proved: it moves data alone" in page("batch-siblings")


def test_a_proof_is_shown_with_what_it_rests_on(monkeypatch: pytest.MonkeyPatch):
    """The shipped one, of these very sources; nothing is proved while pages are made."""
    one = OURS["fold-batch-norm"].all_rewrites()[0]
    known = {"proved": True, "cases": 3, "conditions": ["var + eps > 0", "not: it trains"]}
    monkeypatch.setattr(passes, "key", lambda rewrite, depth: rewrite.name)
    monkeypatch.setattr(passes, "proofs", lambda: {one.name: known})
    assert passes.proof(one) == (
        "Proved for all sizes and values (3 patterns).\n\n"
        '??? note "Given"\n\n    - `var + eps > 0`\n\n'
        '??? note "It declines where"\n\n    - `it trains`'
    )
    for stale in ({}, {one.name: {**known, "proved": False}}):
        monkeypatch.setattr(passes, "proofs", lambda stale=stale: stale)
        assert passes.proof(one).startswith("No proof comes with this version")


def test_the_list_has_every_pass_and_preset():
    text = index()
    for name in OURS:
        assert f"\n| [{name}]({name}.md) | " in text
    assert "within a budget. | Calibrated |" in text
    for name, pipeline in PRESETS.items():
        assert f"`{name}`:" in text
        (shown,) = re.findall(rf"`{name}`:\n\n```text\n(.*?)```", text, re.DOTALL)
        assert shown.replace("\n", "") == pipeline
