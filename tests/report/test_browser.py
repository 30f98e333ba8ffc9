"""The page in a real browser: no script error, nothing overflows, the keyboard reaches everything.

Needs Chromium as Qt WebEngine bundles it (`pip install PyQt6-WebEngine`); QtWebEngine cannot share a process
with the tests, so each run is one of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import graphopt
from graphopt.report import Report
from graphopt.report.story import Listed
from graphopt.sources import load_source
from tests.report.test_html import HOSTILE, model

if not importlib.util.find_spec("PyQt6") or not importlib.util.find_spec("PyQt6.QtWebEngineCore"):
    pytest.skip("no browser: pip install PyQt6-WebEngine", allow_module_level=True)

DRIVER = Path(__file__).parent / "browser.py"
PICTURES = os.environ.get(
    "GRAPHOPT_PICTURES"
)  # a folder that the screenshots of docs/report.md go to
SIZES = [(1280, 900), (390, 844)]
SCHEMES = {"light": 1, "dark": 0}  # Chromium's numbers
OVERFLOW = "document.documentElement.scrollWidth <= window.innerWidth"


def browse(page: Path, steps: list[list[Any]], scheme: str = "light") -> list[Any]:
    """What the scripts among the steps returned. Anything that the page logs is an error."""
    flags = f"--no-sandbox --headless --disable-gpu --blink-settings=preferredColorScheme={SCHEMES[scheme]}"
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(page), json.dumps(steps)], capture_output=True, text=True,
        timeout=120, env={**os.environ, "QTWEBENGINE_CHROMIUM_FLAGS": flags},
    )  # fmt: skip
    if done.returncode and "cannot open shared object" in done.stderr:
        pytest.skip(f"the browser lacks a system library: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["console"] == []
    return found["values"]


@pytest.fixture(scope="module")
def report() -> Report:
    return graphopt.optimize(model(), (torch.randn(1, 3, 8, 8),)).report


@pytest.fixture(scope="module")
def page(report, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    report.save_html(path)
    return path


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_overflows_and_both_schemes_are_painted(page, scheme, tmp_path):
    steps: list[list[Any]] = []
    for width, height in SIZES:
        steps += [["size", width, height], ["run", "window.innerWidth"]]
        steps += [["run", "document.querySelectorAll('details').forEach((one) => one.open = true)"]]
        steps += [["run", OVERFLOW], ["shot", str(tmp_path / f"{width}.png")]]
    steps += [["run", "getComputedStyle(document.body).backgroundColor"]]
    wide, _, fits, narrow, _, narrow_fits, paint = browse(page, steps, scheme)
    assert (wide, narrow) == (1280, 390)
    assert fits and narrow_fits
    light = min(map(int, paint.removeprefix("rgb(").removesuffix(")").split(","))) > 128
    assert light == (scheme == "light")
    assert (tmp_path / "390.png").stat().st_size > 5000


def test_the_whole_page_works_in_a_notebook(report, tmp_path):
    """In a frame without rights, which keeps others out too; the same with rights tells what is inside."""
    framed = report.in_notebook(700)._repr_html_()
    frame = "document.querySelector('iframe')"
    found = []
    for text in (framed, framed.replace('sandbox="allow-scripts"', "")):
        (tmp_path / "cell.html").write_text(f"<!doctype html><meta charset=utf-8>{text}")
        found += browse(tmp_path / "cell.html", [
            ["run", f"[{frame}.clientHeight, {frame}.clientWidth > 1000, {frame}.contentDocument === null]"],
            ["run", f"{frame}.contentDocument?.querySelectorAll('#drawing-before .module').length"],
        ])  # fmt: skip
    closed, _, opened, drawn = found
    assert closed == [700, True, True] and opened == [700, True, False] and drawn > 0


@pytest.mark.skipif(not PICTURES, reason="GRAPHOPT_PICTURES names no folder")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_pictures_of_the_documentation(scheme, tmp_path):
    model, args, _ = load_source("torchvision:resnet18")
    graphopt.optimize(model, args).report.save_html(tmp_path / "report.html")
    for name, (width, height) in zip(("desktop", "phone"), SIZES, strict=True):
        picture = Path(str(PICTURES)) / f"report-{name}-{scheme}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        graph = picture.with_name(f"report-graph-{name}-{scheme}.png")
        (drawn,) = browse(tmp_path / "report.html", [
            ["size", width, height], ["shot", str(picture)],
            ["run", "document.getElementById('graph').scrollIntoView(); "
                    "document.querySelectorAll('#drawing-before .op').length"],
            ["shot", str(graph)],
        ], scheme)  # fmt: skip
        assert drawn > 0
        assert all(5_000 < one.stat().st_size < 250_000 for one in (picture, graph))


def test_the_theme_button_wins_over_the_system(page):
    paint = "getComputedStyle(document.body).backgroundColor"
    press = "document.getElementById('theme').click()"
    system, light, dark = browse(
        page,
        [["run", paint], ["run", press], ["run", paint], ["run", press], ["run", paint]],
        "dark",
    )[::2]
    assert system == dark != light


def test_search_by_keys(page):
    count = "document.getElementById('search-count').textContent"
    focus, told, chosen, mates, panel, list_gone = browse(page, [
        ["key", "Slash"], ["run", "document.activeElement.id"], ["text", "bn2 1."], ["run", count],
        ["key", "Return"], ["run", "document.querySelector('#drawing-before .chosen').ariaLabel"],
        ["run", "[...document.querySelectorAll('#drawing-after .mate')].map((one) => one.ariaLabel)"],
        ["run", "document.getElementById('details').textContent"],
        ["run", "document.getElementById('found').hidden"],
    ])  # fmt: skip
    assert focus == "search"
    assert told.startswith(tuple("123456789"))
    assert chosen == "BatchNorm batch_norm_1 of 1.bn2"
    assert len(mates) == 1 and "1.conv2" in mates[0]
    assert "fold-batch-norm applied at 1.bn2" in panel
    assert list_gone


def test_modules_open_and_close_by_keys_and_keep_the_focus(page):
    expanded = "document.activeElement.getAttribute('aria-expanded')"
    ops = "document.querySelectorAll('#drawing-before .op').length"
    _, _, closed, opened, again = browse(page, [
        ["run", "document.querySelector('[data-do=close]').click(); 1"],
        ["run", "document.querySelector('#drawing-before .module').focus(); 1"],
        ["run", f"[{expanded}, {ops}]"], ["key", "Return"], ["run", f"[{expanded}, {ops}]"],
        ["key", "Space"], ["run", f"[{expanded}, {ops}]"],
    ])  # fmt: skip
    assert closed[0] == "false" and opened[0] == "true" and again == closed
    assert opened[1] > closed[1]


def test_arrows_pan_plus_and_minus_zoom(page):
    view = "document.querySelector('#drawing-before > g').getAttribute('transform')"
    start, right, back, near, far = browse(page, [
        ["run", f"document.getElementById('drawing-before').focus(); {view}"],
        ["key", "Right"], ["run", view], ["key", "Left"], ["run", view],
        ["key", "Plus"], ["run", view], ["key", "Minus"], ["run", view],
    ])  # fmt: skip
    assert start == back != right
    assert near != start and near != far


def test_tab_reaches_the_modules_in_order(page):
    names = "document.activeElement.closest('#drawing-before') ? document.activeElement.ariaLabel : null"
    steps: list[list[Any]] = [["run", "document.getElementById('drawing-before').focus(); 1"]]
    for _ in range(3):
        steps += [["key", "Tab"], ["run", names]]
    _, *reached = browse(page, steps)
    assert all(reached) and len(set(reached)) == 3


def test_the_filter_leaves_what_it_names(page):
    shown = "document.querySelectorAll('tr.filterable:not([hidden])').length"
    everything, _, some, told = browse(page, [
        ["run", shown], ["run", "document.getElementById('filter').focus()"], ["text", "fold 2.bn1"],
        ["run", shown], ["run", "document.getElementById('filter-count').textContent"],
    ])  # fmt: skip
    assert everything > some == 1 and told.startswith("1 of")


def test_hostile_names_are_text(report, tmp_path):
    ops = [Listed(f"a{k}: f32[2] = {HOSTILE}(a{k - 1})", HOSTILE * (k % 2), (HOSTILE,), (f"a{k - 1}",))
           for k in range(4)]  # fmt: skip
    bad = Report(
        HOSTILE, "deploy", "deploy", "eager", report.capture, ops_before=ops, ops_after=ops
    )
    bad.save_html(tmp_path / "bad.html")
    images, drawn = browse(tmp_path / "bad.html", [
        ["run", "document.querySelectorAll('img').length"],
        ["run", "document.querySelectorAll('#drawing-before .op').length"],
    ])  # fmt: skip
    assert images == 0 and drawn > 0


def test_two_thousand_ops_open_in_a_second(report, tmp_path):
    ops = [
        Listed(f"a{k}: f32[2] = Relu(a{k - 1})", f"stage{k // 200}.block{k // 20}.act{k % 20}", ("x",),
               (f"a{k - 1}", f"a{k - 30}"), 1.0, 8)
        for k in range(2000)
    ]  # fmt: skip
    big = Report("Big", "deploy", "deploy", "eager", report.capture, ops_before=ops, ops_after=ops)
    big.save_html(tmp_path / "big.html")
    closed, spent, drawn = browse(tmp_path / "big.html", [
        ["run", "document.querySelectorAll('[data-k]').length"],
        ["run", "(() => { const t = performance.now(); document.querySelector('[data-do=open]').click();"
                "document.body.getBoundingClientRect(); return performance.now() - t; })()"],
        ["run", "document.querySelectorAll('#drawing-before .op').length"],
    ])  # fmt: skip
    assert closed < 100 and drawn == 2000
    assert spent < 5000  # ms, both sides, on a busy machine
