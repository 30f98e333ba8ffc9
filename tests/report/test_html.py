"""The report as one HTML page: valid, complete, closed to the outside, safe, of moderate size."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
from base64 import b64encode
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from typer.testing import CliRunner

import graphopt
from graphopt.cli import app
from graphopt.ir import ops
from graphopt.report import Law, Report
from graphopt.report.html.data import THROUGH
from graphopt.report.html.layers import Layers, layers
from graphopt.report.html.tree import ENTRY, EXIT, Inner, Module, tree
from graphopt.report.story import Listed
from graphopt.sources import load_source
from tests.helpers import randomize_norms

VOID = {"meta", "link", "br", "input", "hr", "img", "rect"}  # rect: written <rect/>
HOSTILE = "</script><img src=x onerror=alert(1)>{{7*7}}&\"'"


class Page(HTMLParser):
    """A page taken apart; wrong nesting is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}  # of scripts and styles, by type
        self.shown: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> has an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, text):
        if self.open and self.open[-1] in ("script", "style"):
            kind = self.elements[-1][1].get("type") or self.open[-1]
            self.texts[kind] = self.texts.get(kind, "") + text
        else:
            self.shown.append(text)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.shown).split())

    @property
    def data(self) -> dict:
        return json.loads(self.texts["application/json"])


class Block(nn.Module):
    """A residual block that calls one activation twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(x + self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))


def model() -> nn.Module:
    torch.manual_seed(0)
    return randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), Block(), Block())).eval()


@pytest.fixture(scope="module")
def fast():
    return graphopt.optimize(model(), (torch.randn(1, 3, 8, 8),))


@pytest.fixture(scope="module")
def report(fast) -> Report:
    refused = [
        dataclasses.replace(
            fast.report.applied[0], where=f"layer{k}", reason=f"reason {k}", index=-1
        )
        for k in range(30)
    ]
    table = [
        {"backend": "eager", "build s": 0.0, "ms": 2.0, "spread": 0.01, "error": 1e-7, "speed-up": 1.0,
         "chosen": False, "note": ""},
        {"backend": "prepacked", "build s": 0.1, "ms": 1.0, "spread": 0.01, "error": None, "speed-up": 2.0,
         "chosen": True, "note": ""},
        {"backend": "inductor", "build s": None, "ms": None, "spread": None, "error": None,
         "speed-up": None, "chosen": False, "note": "not tried"},
    ]  # fmt: skip
    return dataclasses.replace(
        fast.report, refused=refused, rolled_back=refused[:2], backend_table=table
    )


@pytest.fixture(scope="module")
def resnet() -> Report:
    source, args, kwargs = load_source("torchvision:resnet18")
    passes = "fold-batch-norm,canonicalize,materialize"
    return graphopt.optimize(source.eval(), args or None, kwargs or None, passes=passes).report


# -- the page as a document ---------------------------------------------------------------------


def test_the_page_is_balanced_and_ids_are_unique(report):
    page = Page(report.to_html())
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert page.elements[0][0] == "html" and page.elements[0][1]["lang"] == "en"


def test_every_reference_resolves(report):
    page = Page(report.to_html())
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    found = 0
    for _, attributes in page.elements:
        for name in ("for", "aria-labelledby", "aria-controls", "aria-describedby"):
            for one in (attributes.get(name) or "").split():
                assert one in ids, f"{name}={one}"
                found += 1
        if (attributes.get("href") or "").startswith("#"):
            assert attributes["href"][1:] in ids
            found += 1
    assert found > 10


def test_everything_that_is_used_has_a_name(report):
    page = Page(report.to_html())
    labelled = {attributes.get("for") for tag, attributes in page.elements if tag == "label"}
    for tag, attributes in page.elements:
        if tag in ("input", "select"):
            assert attributes["id"] in labelled
        if attributes.get("role") in ("region", "group"):
            assert "aria-label" in attributes or "aria-labelledby" in attributes


def test_nothing_is_loaded(report):
    text = report.to_html()
    page = Page(text)
    for tag, attributes in page.elements:
        assert "src" not in attributes, tag
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{tag} {name}"
            assert name != "style", "the content security policy allows no style attribute"
            if name in ("href", "xlink:href", "action", "data"):
                assert value is not None and (value.startswith("#") or value == "data:,")
    assert not re.search(r"url\(|@import|@font-face", page.texts["style"])
    assert "://" not in page.texts["style"]
    assert set(re.findall(r"\w+://[^\"']*", page.texts["script"])) == {"http://www.w3.org/2000/svg"}


def test_only_this_script_may_run(report):
    page = Page(report.to_html())
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv"))
    for kind in ("script", "style"):
        digest = b64encode(hashlib.sha256(page.texts[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.search(r"\beval\b|Function\(|innerHTML|outerHTML|insertAdjacent|document\.write|setTimeout",
                         page.texts["script"])  # fmt: skip


# -- hostile input ------------------------------------------------------------------------------


def test_names_reasons_and_texts_are_escaped(report):
    def worse(records):
        return [
            dataclasses.replace(one, rewrite=HOSTILE, where=HOSTILE, reason=HOSTILE, node=HOSTILE,
                                contract=HOSTILE, stage="x" + HOSTILE, origins=(HOSTILE,))
            for one in records[:2]
        ]  # fmt: skip

    listed = [Listed(f"a{k}: f32[2] = {HOSTILE}(a{k - 1})", HOSTILE, (HOSTILE, "b"), (f"a{k - 1}",))
           for k in range(3)]  # fmt: skip
    hostile = dataclasses.replace(
        report, model=HOSTILE, mode=HOSTILE, pipeline=HOSTILE, backend=HOSTILE,
        applied=worse(report.applied), refused=worse(report.refused),
        rolled_back=worse(report.rolled_back), ops_before=listed, ops_after=listed,
        laws={HOSTILE: Law(HOSTILE, HOSTILE)}, backend_notes=[HOSTILE], passes=[(HOSTILE, 1.0)],
        capture=dataclasses.replace(report.capture, notes=[HOSTILE], left_out={HOSTILE: HOSTILE}),
        backend_table=[{"backend": HOSTILE, "ms": 1.0, "note": HOSTILE, "chosen": True}],
        check=dataclasses.replace(report.check, reason=HOSTILE), regions={HOSTILE: report},
    )  # fmt: skip
    plain, attacked = Page(report.to_html()), Page(hostile.to_html())
    assert "img" not in {tag for tag, _ in attacked.elements}
    scripts = [tag for tag, _ in attacked.elements if tag == "script"]
    assert scripts == ["script", "script"] and attacked.texts["script"] == plain.texts["script"]
    assert attacked.text.count(HOSTILE) > 20
    assert attacked.data["before"]["ops"][0][0] == listed[0].text
    assert "<" not in attacked.texts["application/json"]
    assert "img" not in {tag for tag, _ in Page(hostile._repr_html_()).elements}


# -- what it says -------------------------------------------------------------------------------


def test_every_refusal_and_rollback_is_there_with_reason_and_help(report):
    page = Page(report.to_html())
    for one in report.refused:
        assert one.where in page.text and one.reason in page.text
    articles = [a for tag, a in page.elements if tag == "article"]
    assert len(articles) == len(report.refused) + len(report.rolled_back)
    assert page.text.count("graphopt passes") == 30  # what would help, where nothing is known
    assert page.text.count("graphopt bisect") == 2


@pytest.mark.parametrize(
    ("reason", "help"),
    [
        ("it normalizes with batch statistics (training mode); call model.eval() before", "model.eval()"),
        ("the output of Conv (a) is used elsewhere too", "another reader"),
        ("it would take 9490 us instead of 4393 (estimated for eager cpu)", "slower"),
        ("it is in a part of the model that was not captured", "left eager"),
    ],
)  # fmt: skip
def test_known_reasons_have_their_own_help(report, reason, help):
    refused = [dataclasses.replace(report.refused[0], reason=reason)]
    text = Page(dataclasses.replace(report, refused=refused).to_html()).text
    assert help in text.partition("Refusals")[2] and "lists all of them" not in text


def test_every_application_is_there_with_its_law_and_proof(report):
    page = Page(report.to_html())
    for one in report.applied:
        assert one.node in page.text
    assert "proved" in page.text and "checked at each site" in page.text
    assert report.laws["fold-batch-norm"].text.partition("\n")[0] in page.text


def test_a_rewrite_of_ones_own_is_told_but_not_said_to_be_proved():
    @graphopt.rewrite
    def relu_once(r: ops.Relu, rw):
        """relu(relu(x)) = relu(x), in words of its author."""
        return rw.producer(r.input, ops.Relu).out

    source = nn.Sequential(nn.ReLU(), nn.ReLU()).eval()
    found = graphopt.optimize(source, (torch.randn(2, 3),), passes=[relu_once]).report
    text = Page(found.to_html()).text
    assert "in words of its author" in text and "no proof; checked at each site" in text


def test_a_failed_check_is_not_called_verified(report):
    bad = dataclasses.replace(
        report, check=dataclasses.replace(report.check, reason="outputs differ")
    )
    text = Page(bad.to_html()).text
    assert "Failed" in text and "outputs differ" in text and "Verified" not in text


def test_without_a_check_nothing_is_promised(report):
    assert "Verified" not in Page(dataclasses.replace(report, check=None).to_html()).text


def test_costs_of_ops_add_up_to_those_of_the_model(report):
    for found, cost in ((report.ops_before, report.before), (report.ops_after, report.after)):
        assert sum(one.flops for one in found) == cost.flops > 0
        assert sum(one.bytes for one in found) == cost.bytes
        assert len(found) == cost.nodes


def test_the_notebook_has_a_summary_without_scripts(report):
    text = report._repr_html_()
    page = Page(text)
    assert {"script", "style", "iframe"}.isdisjoint(tag for tag, _ in page.elements)
    assert len(text) < 5000 and "fold-batch-norm" in page.text


# -- data ---------------------------------------------------------------------------------------


def test_the_data_survives_a_round_trip(report):
    again = Report.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False)))
    assert again.ops_before == report.ops_before and again.laws == report.laws
    assert again.to_html() == report.to_html()


def test_a_report_of_an_older_artifact_is_shown(report):
    old = copy.deepcopy(report.to_dict())
    del old["laws"]
    for side in ("ops_before", "ops_after"):
        for one in old[side]:
            del one["reads"], one["flops"], one["bytes"]
    loaded = Report.from_dict(json.loads(json.dumps(old)))
    page = Page(loaded.to_html())
    assert len(page.data["before"]["ops"]) == len(report.ops_before)
    assert loaded.ops_before[0].kind == "Conv"
    root = page.data["before"]["modules"][0]
    assert len(root["rows"]) == 3, "without edges, ops stand in the order of the program"


def test_reports_are_written_in_one_step(report, tmp_path: Path):
    (tmp_path / "report.html").write_text("old")
    report.save_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == report.to_html()
    assert [one.name for one in tmp_path.iterdir()] == ["report.html"]


def test_the_command_line_writes_the_page(tmp_path: Path, monkeypatch):
    (tmp_path / "small.py").write_text(
        "import torch\n"
        "def model():\n"
        "    return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()).eval(), (torch.ones(1, 2),)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    result = CliRunner().invoke(app, ["optimize", "small:model", "--html", "report.html"])
    assert result.exit_code == 0, result.output
    Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_the_page_of_a_real_model_is_small(resnet):
    text = resnet.to_html()
    page = Page(text)
    assert len(text.encode()) < 200_000
    assert len(page.data["before"]["ops"]) == 69
    paths = page.data["paths"]
    assert {"layer1", "layer4"} <= {paths[one["path"]] for one in page.data["before"]["modules"]}


# -- the drawing --------------------------------------------------------------------------------


def ops_of(*ops: tuple[str, str, tuple[str, ...]]) -> list[Listed]:
    return [Listed(f"{name}: f32[2] = Op()", where, (where,), reads) for name, where, reads in ops]


def test_modules_are_nested_as_their_paths():
    found = ops_of(
        ("a", "x.y", ("in",)), ("b", "x.y", ("a",)), ("c", "x.z", ("b",)), ("d", "", ("c",))
    )
    modules = tree(found)
    assert {path: one.children for path, one in modules.items()} == {
        "": ["x", 3],
        "x": ["x.y", 2],
        "x.y": [0, 1],
    }
    assert set(modules["x"].edges) == {(ENTRY, "x.y"), ("x.y", 2), (2, EXIT)}


def test_one_module_in_another_is_written_as_one():
    modules = tree(ops_of(("a", "x.y.z", ()), ("b", "x.y.z", ("a",)), ("c", "w", ("b",))))
    assert modules[""].children == ["x.y.z", 2] and modules["x.y.z"].label == "x.y.z"


def test_an_activation_that_is_called_in_between_is_its_ops():
    found = ops_of(
        ("a", "conv1", ()), ("b", "act", ("a",)), ("c", "conv2", ("b",)), ("d", "act", ("c",))
    )
    modules = tree(found)
    assert modules[""].children == [0, 1, 2, 3] and set(modules) == {""}


def test_names_of_one_region_are_not_those_of_another():
    found = ops_of(("a", "r1", ()), ("b", "r1", ("a",)), ("a", "r2", ()), ("c", "r2", ("a",)))
    assert set(tree(found)["r2"].edges) == {(2, 3), (3, EXIT)}


def arrivals(drawn: Layers) -> set[tuple[Inner, Inner]]:
    """The edges that lead from a place to another, through free places."""
    reached: dict[tuple[int, int], set[Inner]] = {
        (r, k): {one}
        for r, row in enumerate(drawn.rows) for k, one in enumerate(row) if one is not None
    }  # fmt: skip
    found = set()
    for r, pairs in enumerate(drawn.links):
        for a, b in pairs:
            target = drawn.rows[r + 1][b]
            if target is None:
                reached.setdefault((r + 1, b), set()).update(reached[r, a])
            else:
                found |= {(source, target) for source in reached[r, a]}
    return found


def check_drawing(module: Module) -> None:
    """Every child has one place, edges run from a row to the next, and none is lost or made up."""
    drawn = layers(module)
    places = [one for row in drawn.rows for one in row if one is not None]
    assert len(places) == len(set(places)) and set(module.children) <= set(places)
    assert not arrivals(drawn) & set(drawn.back)
    assert arrivals(drawn) | set(drawn.back) == set(module.edges)


def test_drawings_of_a_real_model_lose_no_edge(resnet):
    for found in (resnet.ops_before, resnet.ops_after):
        for module in tree(found).values():
            check_drawing(module)
            assert not layers(module).back


@st.composite
def programs(draw) -> list[Listed]:
    """Ops of nested modules, called in any order, that read any ops before them."""
    paths = st.sampled_from(["", "a", "a.b", "a.c", "a.b.d", "e", "e.f.g"])
    found = []
    for k in range(draw(st.integers(1, 14))):
        names = [f"n{one}" for one in range(k)] + ["in"]
        reads = draw(st.lists(st.sampled_from(names), max_size=3, unique=True))
        found.append(Listed(f"n{k}: f32[2] = Op()", draw(paths), (), tuple(reads)))
    return found


@settings(max_examples=150, deadline=None)
@given(programs())
def test_drawings_of_any_program_lose_no_edge(found):
    modules = tree(found)
    inside = [child for one in modules.values() for child in one.children]
    assert sorted(one for one in inside if isinstance(one, int)) == list(range(len(found)))
    assert sorted(one for one in inside if isinstance(one, str)) == sorted(set(modules) - {""})
    for module in modules.values():
        check_drawing(module)


def test_a_skip_connection_has_a_lane_of_its_own():
    found = ops_of(("a", "", ("in",)), ("b", "", ("a",)), ("c", "", ("b",)), ("d", "", ("a", "c")))
    drawn = layers(tree(found)[""])
    assert [len(row) for row in drawn.rows] == [1, 1, 2, 2, 1, 1]
    assert THROUGH < 0 and sum(one is None for row in drawn.rows for one in row) == 2


def test_sizes_draw_no_edges():
    found = [
        Listed("n: int = sym_size(x, 0)", "", (), ("x",)),
        *ops_of(("a", "", ("x",)), ("b", "", ("a", "n"))),
    ]
    assert set(tree(found)[""].edges) == {(ENTRY, 0), (ENTRY, 1), (1, 2), (2, EXIT)}
