"""The command `graphopt groups`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.commands.shared import DONE, JSON, SOURCE, TRUST, epilog, one_line, with_inputs

if TYPE_CHECKING:
    from graphopt.ir.channels import Groups

EPILOG = epilog(
    """
    graphopt groups torchvision:resnet18
    graphopt groups mine.models:net --free outputs --json
    """,
    DONE,
)
FREE = typer.Option(
    help="inputs or outputs, whose channels are otherwise fixed; may be repeated.",
    autocompletion=lambda incomplete: [
        one for one in ("inputs", "outputs") if one.startswith(incomplete)
    ],
)


def groups(
    source: Annotated[str, SOURCE],
    free: Annotated[list[str] | None, FREE] = None,
    trust: Annotated[bool, TRUST] = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Show which channels can only be removed together, what each costs, and which are fixed and why."""
    from graphopt.progress import shown

    with shown("loading torch") as status, one_line(source):
        import graphopt

        status(f"loading {source}")
        model, args, kwargs = with_inputs(source, trust)
        status(f"tracing the channels of {source}")
        found = told(graphopt.channel_groups(model, args, kwargs, free=free or ()))
    typer.echo(json.dumps(found, allow_nan=False) if as_json else "\n".join(_lines(source, found)))


def told(found: Groups) -> dict[str, Any]:
    """Families of groups, the largest first, and what is fixed, as plain data. `size` is the number of
    groups of a family, `parameters` and `flops` what one of them is; `entries` how many of an axis."""
    blocks = found.blocks
    families: list[dict[str, Any]] = [
        {
            "size": len(family),
            "parameters": family[0].parameters,
            "flops": family[0].flops,
            "blocks": family[0].label in blocks,
            "members": [
                {"name": one.name, "axis": one.axis, "entries": len(one.entries)}
                for one in family[0].members
            ],
        }
        for family in found.families()
    ]
    families.sort(key=lambda one: -one["size"] * one["parameters"])
    fixed = [
        {"name": name, "axis": axis, "reason": reason}
        for (name, axis), reason in found.fixed().items()
    ]
    return {"families": families, "fixed": fixed}


def _lines(source: str, found: dict[str, Any]) -> Iterator[str]:
    families, fixed = found["families"], found["fixed"]
    count = sum(one["size"] for one in families)
    yield f"{source}: {count} groups of channels in {len(families)} families; {len(fixed)} axes are fixed"
    for number, one in enumerate(families):
        what = "heads or blocks" if one["blocks"] else "channels"
        yield (
            f"  {number}: {one['size']} {what}, each {one['parameters']:,} parameters and "
            f"{one['flops']:.3g} FLOPs"
        )
        for member in one["members"]:
            times = f" x {member['entries']}" if member["entries"] > 1 else ""
            yield f"      {member['name']}[{member['axis']}]{times}"
    reasons = Counter(one["reason"] for one in fixed)
    for reason in reasons:
        yield f"  fixed: {reason}"
        for one in fixed:
            if one["reason"] == reason:
                yield f"      {one['name']}[{one['axis']}]"
