"""What mkdocs does not do by itself: pages of passes, and links to files beside `docs/`.

A page may link to any file of the repository, as `../benchmarks/results/norms.md`, so that it reads well
where it is stored; in the site such a file is a page or a file of its own.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
BESIDE = {path.name for path in ROOT.iterdir()} - {"docs"}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)[\w./-]+")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Every pass is in the navigation."""
    sys.path.insert(0, str(ROOT))
    from graphopt.passes.base import available

    for section in config.nav or ():
        if "Passes" in section:
            section["Passes"] += [{name: f"passes/{name}.md"} for name in available()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of passes, and whatever the pages link to outside of `docs/`."""
    from docs.generator.passes import pages

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    for page in list(files.documentation_pages()):
        _follow(page.src_uri, page.content_string, files, config)
    return files


def _follow(page: str, text: str, files: Files, config: MkDocsConfig) -> None:
    """Add the files that a page links to, and those that these link to."""
    for link in LINK.findall(text):
        path = target(page, link)
        if files.get_file_from_path(path) is None and (ROOT / path).is_file():
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
            if path.endswith(".md"):
                _follow(path, (ROOT / path).read_text(), files, config)


def target(page: str, link: str) -> str:
    """Where in the site a link leads: `docs/` is its root, other files keep their path in the repository."""
    stored = page if page.partition("/")[0] in BESIDE else f"docs/{page}"
    found = posixpath.normpath(posixpath.join(posixpath.dirname(stored), link))
    return found.removeprefix("docs/")


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """The links of a page, as they are in the site."""
    here, folder = page.file.src_uri, posixpath.dirname(page.file.src_uri) or "."
    return LINK.sub(lambda match: posixpath.relpath(target(here, match[0]), folder), markdown)
