"""A page for every pass, from its docstrings, the proofs that come with graphopt, and an example."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from docs.generator.examples import EXAMPLES
from graphopt.ir.capture import capture
from graphopt.ir.driver import Session
from graphopt.ir.rewrite import Rewrite
from graphopt.passes.base import Pass, available
from graphopt.pipeline import PRESETS, Pipeline
from graphopt.verify import SiteValidator
from graphopt.verify.proof.cache import SHIPPED, key

INDEX = """# Passes

A pipeline is a list of these, as text: `canonicalize,fold-batch-norm,materialize`. Each page has what
`graphopt passes NAME` prints, and an example.

| pass | | contract |
|---|---|---|
"""
NO_REWRITES = """## Contract

{contracts}. It is a function on the graph and not a set of rewrites: there is no proof of it for all inputs;
what it does is [checked](../contracts.md) on the model at hand.
"""


def pages() -> dict[str, str]:
    """The pages by path: `passes/index.md` and `passes/NAME.md` for every installed pass."""
    return {"passes/index.md": index(), **{f"passes/{one}.md": page(one) for one in available()}}


def index() -> str:
    """All passes with one line each, and the presets."""
    rows = [
        f"| [{name}]({name}.md) | {cell(summary(cls))} | {', '.join(contracts(name))} |\n"
        for name, cls in available().items()
    ]
    presets = [
        "\n".join([f"`{name}`:", "", "```text", *wrapped(text), "```"])
        for name, text in PRESETS.items()
    ]
    return "\n\n".join([INDEX + "".join(rows), "## Presets", *presets]) + "\n"


def page(name: str) -> str:
    """One pass: formula, options, rewrites with preconditions and proofs, an example."""
    cls = available()[name]
    home = inspect.getdoc(sys.modules[cls.__module__]) or ""
    parts = (
        f"# {name}",
        inspect.getdoc(cls) or "",
        home,
        options(cls),
        rewrites(name),
        example(name),
    )
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


# -- what the code says of itself ---------------------------------------------------------------


def summary(cls: type[Pass]) -> str:
    """The first sentence of a pass's docstring, on however many lines it is written."""
    return " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())


def contracts(name: str) -> list[str]:
    """The contracts of a pass: those of its rewrites, and those under which the example was made."""
    declared = [type(one.contract).__name__ for one in available()[name].all_rewrites()]
    return sorted({*declared, *(shown(name).contracts if name in EXAMPLES else ())})


def options(cls: type[Pass]) -> str:
    fields = dataclasses.fields(cls)
    if not fields:
        return ""
    rows = ["## Options", "", "| | type | default |", "|---|---|---|"]
    for one in fields:
        kind = " or ".join(str(one.type).split(" | "))
        default = "" if one.default is dataclasses.MISSING else f"`{one.default!r}`"
        rows.append(f"| `{one.name}` | {kind} | {default} |")
    return "\n".join(rows)


def rewrites(name: str) -> str:
    found = available()[name].all_rewrites()
    if not found:
        return NO_REWRITES.format(contracts=", ".join(contracts(name)))
    return "\n\n".join(["## Rewrites", *map(rewrite, found)])


def rewrite(one: Rewrite) -> str:
    return f"### {one.name}\n\nContract: {one.contract}.\n\n{described(one)}\n\n{proof(one)}"


def described(one: Rewrite) -> str:
    """The docstring of a rewrite, or, for a variant without, that of the rewrite it is a variant of."""
    named = (
        other for cls in available().values() for other in cls.all_rewrites()
        if other.name == one.name
    )  # fmt: skip
    return next(
        filter(None, (inspect.getdoc(other.function) for other in (one, *named))), one.summary
    )


@lru_cache(maxsize=1)
def proofs() -> dict[str, Any]:
    """The proofs that come with graphopt, under hashes of the sources they rest on."""
    found: dict[str, Any] = json.loads(SHIPPED.read_text())
    return found


def proof(one: Rewrite) -> str:
    """What is known without proving anything: the shipped proof, or the author's reason for none."""
    if one.unproved:
        return f"Checked at every site, not proved: {one.unproved}."
    known = proofs().get(key(one, 1))
    if known is None or not known["proved"]:
        return "No proof comes with this version; it is checked at every site."
    head = f"Proved for all sizes and values ({known['cases']} patterns)."
    declines = [text[5:] for text in known["conditions"] if text.startswith("not: ")]
    given = [text for text in known["conditions"] if not text.startswith("not: ")]
    return "\n\n".join([head, *listed("Given", given), *listed("It declines where", declines)])


def listed(title: str, items: list[str]) -> Iterator[str]:
    """A list that opens when it is clicked, if there is anything in it."""
    if items:
        yield "\n".join([f'??? note "{title}"', "", *(f"    - `{one}`" for one in items)])


# -- examples -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shown:
    """The printouts of a model before and after the pipeline `ran`, and the contracts of what was applied."""

    before: str
    after: str
    ran: str
    contracts: tuple[str, ...]


def example(name: str) -> str:
    """The printouts of a small model before and after the pass."""
    if name not in EXAMPLES:
        return ""
    one = shown(name)
    return (
        f"## Example\n\nBefore:\n\n```text\n{one.before}\n```\n\n"
        f"After `{one.ran}`:\n\n```text\n{one.after}\n```"
    )


@lru_cache(maxsize=64)
def shown(name: str) -> Shown:
    """The example of a pass, run. Every application is checked, as in `graphopt.optimize`."""
    one = EXAMPLES[name]
    model, inputs = one.model()
    graph = capture(model, inputs, {}, None).graph
    session = Session(graph, SiteValidator(graph, list(inputs)))
    if one.before:
        Pipeline(one.before).run(session)
    before, begun = printed(session), len(session.applied)
    stages = Pipeline([one.run or name])
    stages.run(session)
    ran, ended = str(stages), len(session.applied)
    if one.then:
        Pipeline(one.then).run(session)
        ran = f"{ran},{one.then}"
    made = session.applied[begun:ended] or session.applied[ended:]  # what it allows others to do
    return Shown(
        before, printed(session), ran, tuple(one.contract.partition("(")[0] for one in made)
    )  # fmt: skip


def printed(session: Session) -> str:
    """The graph, its symbolic sizes called N, M, ..."""
    text = str(session.graph)
    for name, plain in zip(dict.fromkeys(re.findall(r"\bs\d+\b", text)), "NMKL", strict=False):
        text = re.sub(rf"\b{name}\b", plain, text)
    return text


# -- text ---------------------------------------------------------------------------------------


def cell(text: str) -> str:
    """Text for one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def wrapped(pipeline: str, width: int = 100) -> Iterator[str]:
    """A pipeline in lines of at most `width`."""
    line = ""
    for one in re.findall(r"(?:\[[^]]*\]|[^,\[])+(?:,|$)", pipeline):
        if line and len(line) + len(one) > width:
            yield line
            line = ""
        line += one
    yield line
