"""Opens a page in Chromium (Qt WebEngine) and does what it is told: `browser.py PAGE STEPS`.

STEPS is a JSON list: ["size", width, height], ["theme", "dark"], ["run", script], ["key", name],
["text", "typed"], ["shot", file]. Prints a JSON object: `values` of the scripts in order, `console` with all
that the page logged.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
os.environ.setdefault("QT_QUICK_BACKEND", "software")
os.environ.setdefault("QTWEBENGINE_DISABLE_SANDBOX", "1")
os.environ.setdefault("QTWEBENGINE_CHROMIUM_FLAGS", "--no-sandbox --headless --disable-gpu")

from PyQt6.QtCore import QEventLoop, Qt, QTimer, QUrl
from PyQt6.QtTest import QTest
from PyQt6.QtWebEngineCore import QWebEnginePage
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication

SETTLE = 250  # ms


class Page(QWebEnginePage):
    """A page that keeps what it logs."""

    def __init__(self) -> None:
        super().__init__()
        self.console: list[str] = []

    def javaScriptConsoleMessage(self, level: Any, message: str, line: int, source: str) -> None:
        self.console.append(f"{level.name}: {message} (line {line})")


def wait(milliseconds: int) -> None:
    loop = QEventLoop()
    QTimer.singleShot(milliseconds, loop.quit)
    loop.exec()


def run(page: Page, script: str) -> Any:
    found: list[Any] = []
    loop = QEventLoop()
    page.runJavaScript(script, lambda value: (found.append(value), loop.quit()))
    QTimer.singleShot(20_000, loop.quit)
    loop.exec()
    return found[0] if found else None


def main(path: str, steps: list[list[Any]]) -> dict[str, Any]:
    app = QApplication(sys.argv[:1])
    page, view = Page(), QWebEngineView()
    view.setPage(page)
    view.resize(1280, 900)
    view.show()
    loop = QEventLoop()
    page.loadFinished.connect(loop.quit)
    page.load(QUrl.fromLocalFile(str(Path(path).resolve())))
    loop.exec()
    wait(2 * SETTLE)
    values = []
    for what, *rest in steps:
        if what == "size":
            view.resize(*rest)
        elif what == "theme":
            app.styleHints().setColorScheme(
                {"dark": Qt.ColorScheme.Dark, "light": Qt.ColorScheme.Light}[rest[0]]
            )
        elif what == "key":
            QTest.keyClick(view.focusProxy(), getattr(Qt.Key, f"Key_{rest[0]}"))
        elif what == "text":
            QTest.keyClicks(view.focusProxy(), rest[0])
        elif what == "run":
            values.append(run(page, rest[0]))
            continue
        wait(SETTLE)
        if what == "shot":
            view.grab().save(rest[0])
    view.setPage(None)  # type: ignore[arg-type]
    return {"values": values, "console": page.console}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))), flush=True)
    os._exit(0)  # Chromium's threads outlive the application
