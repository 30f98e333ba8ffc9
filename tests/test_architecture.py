"""The direction of imports: ir <- passes, backends <- verify, report, pipeline <- the top."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "graphopt"
ABOVE_IR = {"passes", "backends", "verify", "report", "testing"}
TOP = {"optimize", "regional", "cli", "module", "artifact", "sources", "pipeline", "bisect",
       "reproducer", "dynamo", "export", "filecheck", "pruned", "training", "adaptation",
       "builds", "fleet", "laws", "commands", "face", "signing",
       "artifact_check", "artifact_data", "artifact_zip"}  # fmt: skip
FORBIDDEN = {
    "ir": ABOVE_IR | TOP,
    "passes": {"backends", "verify", "report", "testing"} | TOP,
    "backends": {"passes", "verify", "report", "testing"} | TOP,
    "verify": {"passes", "backends", "report", "testing"} | TOP,
    "report": {"passes", "backends", "testing"} | TOP,
}
LIBRARIES = {"torchvision", "timm", "transformers", "peft", "spikingjelly"}


def imports(path: Path) -> set[str]:
    """Everything a file imports anywhere, as dotted names; inside TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = sorted(path for layer in FORBIDDEN for path in (ROOT / layer).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path):
    layer = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "graphopt" and len(parts) > 1:
            assert parts[1] not in FORBIDDEN[layer], f"{path.name} imports {name}"
        if layer in ("ir", "passes"):
            assert parts[0] not in LIBRARIES, f"{path.name} knows {parts[0]}"


def test_the_walk_sees_every_layer():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(FORBIDDEN)


@pytest.mark.parametrize("name", ["ir", "passes", "backends"])
def test_root_links_point_into_the_package(name: str):
    link = ROOT.parent / name
    assert link.is_symlink()
    assert link.resolve() == (ROOT / name).resolve()
    assert not link.readlink().is_absolute()
