"""What `graphopt inspect` shows, as plain data and as lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphopt.artifact import manifest_of
from graphopt.artifact_check import report_of
from graphopt.ir.capture import capture
from graphopt.ir.cost import Cost, bytes_of, cost
from graphopt.ir.source import CaptureError, copy_module
from graphopt.optimize import optimize
from graphopt.report import listing
from graphopt.report.plain import plain
from graphopt.report.story import Listed

SHOWN = 24  # kinds of ops, modules


# -- artifacts ----------------------------------------------------------------------------------


def of_artifact(path: Path) -> dict[str, Any]:
    """The manifest in short, of files that were all checked.

    Raises:
        ArtifactError: for an artifact that is not intact.
        ValueError: for a report that is none.
    """
    manifest = manifest_of(path)
    report, build = report_of(manifest.report), manifest.build or {}
    proofs = build.get("proofs")
    return plain({  # type: ignore[no-any-return]
        "artifact": str(path), "format": manifest.format, "intact": True,
        "files": {name: {"bytes": manifest.bytes[name], "sha256": digest}
                  for name, digest in manifest.sha256.items()},
        "seal": manifest.seal, "torch": manifest.torch,
        "model": report.model, "mode": report.mode, "backend": report.backend,
        "pipeline": report.pipeline,
        "contracts": Counter(one.contract for one in report.applied),
        "proofs": Counter(proofs.values()) if isinstance(proofs, dict) else None,
        "refused": len(report.refused), "rolled_back": len(report.rolled_back),
        "check": report.check, "before": report.before, "after": report.after,
        "benchmark": report.backend_table,
        "provenance": {
            "nodes": len(manifest.provenance),
            "modules": len({path for paths in manifest.provenance.values() for path in paths}),
            "merged": sum(len(paths) > 1 for paths in manifest.provenance.values()),
        },
        **{key: build.get(key) for key in ("target", "versions", "sources")},
    })  # fmt: skip


def artifact_lines(found: Mapping[str, Any]) -> Iterator[str]:
    size = sum(one["bytes"] for one in found["files"].values())
    yield f"{found['artifact']}: intact, {len(found['files'])} files, {_bytes(size)}"
    for name, one in found["files"].items():
        yield f"  {name:<20} {_bytes(one['bytes']):>10}  sha256 {one['sha256'][:16]}..."
    yield f"  model        {found['model']}, mode {found['mode']}, backend {found['backend']}"
    yield f"  pipeline     {found['pipeline']}"
    yield f"  written by   torch {found['torch']}, format {found['format']}"
    if found["versions"]:
        yield f"  versions     {_pairs(found['versions'])}"
    for name, digest in (found["sources"] or {}).items():
        yield f"  built from   {name}, sha256 {str(digest)[:16]}..."
    if target := found["target"]:
        given = {key: one for key, one in target.items() if one not in (None, [], {})}
        given["budget"] = {k: v for k, v in (target.get("budget") or {}).items() if v is not None}
        yield f"  target       {_pairs({key: one for key, one in given.items() if one != {}})}"
    yield f"  applied      {_counted(found['contracts']) or 'nothing'}"
    if found["proofs"]:
        yield f"  rewrites     {_counted(found['proofs'])}"
    yield f"  refused      {found['refused']}; rolled back {found['rolled_back']}"
    if check := found["check"]:
        yield (
            f"  errors       float64 {_number(check['float64_error'])} (limit {_number(check['limit'])}); "
            f"own dtype: source {_number(check['source_error'])}, this {_number(check['error'])} (relative)"
        )
    if (before := found["before"]) and (after := found["after"]):
        yield (
            f"  cost         {after['nodes']} nodes ({before['nodes']} in the source), "
            f"{after['parameters']:,} parameters ({before['parameters']:,}), "
            f"{after['flops']:.3g} FLOPs ({before['flops']:.3g})"
        )
    known = found["provenance"]
    yield (
        f"  provenance   {known['nodes']} nodes stand for {known['modules']} modules of the source; "
        f"{known['merged']} for several"
    )
    for row in found["benchmark"]:
        if row.get("ms") is not None:
            star = "*" if row.get("chosen") else " "
            yield f"  measured   {star} {row['backend']:<12} {row['ms']:.3g} ms"


# -- sources ------------------------------------------------------------------------------------


def of_source(
    name: str, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], depth: int
) -> dict[str, Any]:
    """What is captured of a model, and what it costs on its inputs by kind of op and by module."""
    left_out: dict[str, str] = {}
    regions: list[str] = []
    try:
        captured = capture(copy_module(model), args, dict(kwargs))
        inputs = torch.utils._pytree.tree_leaves((args, dict(kwargs)))
        ops = listing(captured.graph, inputs)
        total: Cost | None = cost(captured.graph, inputs)
        method, notes = captured.method, captured.notes
    except CaptureError:
        report = optimize(model, args, dict(kwargs), passes=[], validate=False).report
        ops, total, regions = report.ops_before, report.before, list(report.regions)
        method, notes, left_out = (
            report.capture.method, report.capture.notes, report.capture.left_out
        )  # fmt: skip
    parameters, buffers = list(model.parameters()), list(model.buffers())
    kinds: dict[str, list[Listed]] = {}
    for op in ops:
        kinds.setdefault(op.kind, []).append(op)
    return plain({  # type: ignore[no-any-return]
        "source": name, "model": type(model).__name__, "captured": method, "notes": notes,
        "regions": regions, "left_out": left_out,
        "parameters": {
            "tensors": len(parameters), "elements": sum(one.numel() for one in parameters),
            "bytes": bytes_of(parameters),
            "dtypes": Counter(str(one.dtype).removeprefix("torch.") for one in parameters),
        },
        "buffers": {"tensors": len(buffers), "bytes": bytes_of(buffers)},
        "inputs": [_input(one) for one in torch.utils._pytree.tree_leaves((args, dict(kwargs)))],
        "cost": total,
        "ops": {kind: _sums(among) for kind, among in
                sorted(kinds.items(), key=lambda one: (-len(one[1]), one[0]))},
        "modules": _by_module(ops, depth),
    })  # fmt: skip


def _input(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)[:80]
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _sums(ops: Iterable[Listed]) -> dict[str, float]:
    ops = list(ops)
    return {
        "ops": len(ops),
        "flops": sum(one.flops for one in ops),
        "bytes": sum(one.bytes for one in ops),
    }


def _by_module(ops: Iterable[Listed], depth: int) -> dict[str, dict[str, float]]:
    """In the order of the program; modules further inside count for the one at this depth."""
    found: dict[str, list[Listed]] = {}
    for op in ops:
        parts = op.where.split(".") if op.where else []
        found.setdefault(".".join(parts[:depth]), []).append(op)
    return {path: _sums(among) for path, among in found.items()}


def source_lines(found: Mapping[str, Any]) -> Iterator[str]:
    held, total = found["parameters"], found["cost"]
    yield f"{found['source']}: {found['model']}, captured by {found['captured']}"
    for note in found["notes"]:
        yield f"  note         {note}"
    if found["regions"]:
        yield f"  regions      {', '.join(found['regions'])}; what follows is theirs"
    for path, why in found["left_out"].items():
        yield f"  left eager   {path or '(the whole model)'}: {why:.160}"
    yield f"  inputs       {', '.join(found['inputs'])}"
    yield (
        f"  parameters   {held['elements']:,} in {held['tensors']} tensors, {_bytes(held['bytes'])} "
        f"({_counted(held['dtypes'])}); buffers {_bytes(found['buffers']['bytes'])}"
    )
    if total is not None:
        moved = _bytes(total["bytes"])
        yield f"  a run        {total['nodes']} ops, {total['flops']:.3g} FLOPs, {moved} moved"
    for title, among in (("ops", found["ops"]), ("cost by module", found["modules"])):
        if among:
            yield f"  {title}"
        yield from _rows(among)


def _rows(among: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    everything = sum(one["flops"] for one in among.values()) or 1.0
    shown = list(among.items())[:SHOWN]
    width = max((len(name or "(itself)") for name, _ in shown), default=0)
    for name, one in shown:
        share = 100 * one["flops"] / everything
        yield (
            f"    {name or '(itself)':<{width}}  {one['ops']:>5} ops  {one['flops']:>9.3g} FLOPs "
            f"{share:>5.1f} %  {_bytes(one['bytes']):>10}"
        )
    if len(among) > SHOWN:
        yield f"    ... and {len(among) - SHOWN} more; --json has them"


# -- words --------------------------------------------------------------------------------------


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
