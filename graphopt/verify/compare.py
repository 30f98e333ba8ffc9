"""Any module against any other with the same signature, ours or not.

Meaning is compared in float64, as `check_model` does for graphs. Where one side stores weights of
its own (folding rounds them to their dtype once), float64 outputs differ by what that rounding does;
how much that may be, the source tells by its own response to a rounding of its weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from graphopt.ir.distance import relative_error
from graphopt.ir.inputs import telling
from graphopt.ir.interpret import lift
from graphopt.ir.source import first_line
from graphopt.verify.diverge import Divergence, find_divergence
from graphopt.verify.model import NOISE, ModelCheck, nudged
from graphopt.verify.side import Side, VerifyError, find_inputs, own_rounding

# The response to one random rounding of the weights, times this, covers that of another.
ROUNDING = 10


@dataclasses.dataclass(frozen=True)
class Worst:
    """Where two outputs differ most: the output's path and the element's index, its value on both
    sides in float64, and the relative error of that output (2-norm)."""

    output: str
    index: tuple[int, ...]
    source: float
    optimized: float
    error: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `verify` found. Errors are as in `ModelCheck`: `float64_error` is between the modules,
    `source_error` and `error` of each in its own dtype against the source in float64."""

    source: str
    optimized: str
    check: ModelCheck
    worst: Worst | None = None
    divergence: Divergence | None = None
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return self.check.ok

    @property
    def float64_error(self) -> float:
        return self.check.float64_error

    @property
    def source_error(self) -> float:
        return self.check.source_error

    @property
    def error(self) -> float:
        return self.check.error

    @property
    def limit(self) -> float:
        return self.check.limit

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `json.dumps` takes with `allow_nan=False`."""
        data = dataclasses.asdict(self)
        return _plain({"ok": self.ok, **data.pop("check"), **data})  # type: ignore[no-any-return]

    def __str__(self) -> str:
        check, worst = self.check, self.worst
        verdict = "equal" if self.ok else "NOT EQUAL"
        lines = [f"{verdict}: {self.source} and {self.optimized}"]
        lines.append(f"  float64    {check.float64_error:.1e} (relative, limit {check.limit:.0e})")
        lines.append(
            f"  own dtype  source {check.source_error:.1e}, optimized {check.error:.1e} "
            "(relative, against the source in float64)"
        )
        if worst is not None:
            lines.append(
                f"  worst      {worst.output}{list(worst.index)}: source {worst.source:.17g}, "
                f"optimized {worst.optimized:.17g} (float64)"
            )
        if check.reason:
            lines.append(f"  reason     {check.reason}")
        if self.divergence is not None:
            lines.append(f"  parts at   {self.divergence}")
        lines += [f"  note       {note}" for note in self.notes]
        return "\n".join(lines)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# -- comparing ----------------------------------------------------------------------------------


def verify(
    source: nn.Module,
    optimized: nn.Module,
    inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    limit: float = 1e-10,
    locate: bool = True,
) -> Comparison:
    """Whether `optimized` computes what `source` does; neither is changed.

    Args:
        source: any nn.Module; its outputs in float64 are the truth.
        optimized: any nn.Module with the same signature.
        inputs: a tuple of inputs (or one tensor, or a mapping of keyword inputs). None takes those
            that either module declares, or was captured with. Blank ones become normal draws.
        kwargs: keyword inputs.
        limit: the largest relative float64 error (2-norm, over outputs) of equal modules, raised to
            the noise of the source's own outputs.
        locate: find where the modules part, if they do.

    Raises:
        VerifyError: if there are no inputs, if one side does not take them, or if the outputs are
            of different structure or shapes.
        TypeError: if a side is not an nn.Module.
    """
    sides = Side("source", source), Side("optimized", optimized)
    generator = torch.Generator().manual_seed(0)
    found = find_inputs(sides, inputs, kwargs)
    given = pytree.tree_map(lambda one: telling(one, generator), found)
    own = []
    for side in sides:
        try:
            own.append(side.run(given))
        except VerifyError:
            raise
        except Exception as error:
            raise VerifyError(
                f"cannot compare {sides[0].name} with {sides[1].name}: {side.role} does not take "
                f"the inputs: {first_line(error)}"
            ) from error
    paths = _same_structure(sides, own)
    return _compare(sides, own, paths, given, limit, locate)


def _same_structure(sides: tuple[Side, Side], outputs: list[Any]) -> list[str]:
    """The paths of the leaves of both outputs.

    Raises:
        VerifyError: if they differ, in paths or in shapes.
    """
    left, right = (pytree.tree_flatten_with_path(one)[0] for one in outputs)
    paths = [[f"output{pytree.keystr(path)}" for path, _ in side] for side in (left, right)]
    if paths[0] != paths[1]:
        raise VerifyError(
            f"{sides[0].name} returns {', '.join(paths[0]) or 'nothing'}; "
            f"{sides[1].name} returns {', '.join(paths[1]) or 'nothing'}"
        )
    for path, (_, a), (_, b) in zip(paths[0], left, right, strict=True):
        if _kind(a) != _kind(b):
            raise VerifyError(
                f"{path} of {sides[0].name} is {_kind(a)}, of {sides[1].name} {_kind(b)}"
            )
    return paths[0]


def _kind(leaf: Any) -> str:
    is_tensor = isinstance(leaf, torch.Tensor)
    return f"a tensor of shape {list(leaf.shape)}" if is_tensor else f"a {type(leaf).__name__}"


def _compare(
    sides: tuple[Side, Side], own: list[Any], paths: list[str], inputs: Any, limit: float,
    locate: bool,
) -> Comparison:  # fmt: skip
    source, optimized = sides
    names = type(source.module).__name__, type(optimized.module).__name__
    runs = []
    for side in sides:
        try:
            runs.append(side.run_lifted(inputs))
        except Exception as failure:
            reason = f"{side.name} does not run in float64: {first_line(failure)}"
            return Comparison(*names, ModelCheck(limit=limit, reason=reason))
    truth, found = runs
    source_error, error = (relative_error(pytree.tree_leaves(one), truth) for one in own)
    meaning = relative_error(found, truth)
    if not meaning <= limit:
        again = source.run_lifted(pytree.tree_map(nudged, inputs))
        limit = max(limit, NOISE * relative_error(again, truth))
    if not meaning <= limit and (unit := own_rounding(source.module, optimized.module)):
        again = source.run_lifted(inputs, unit)
        limit = max(limit, ROUNDING * relative_error(again, truth))
    reason, divergence = "", None
    notes = [*source.notes.values(), *optimized.notes.values()]
    if not meaning <= limit:
        reason = f"float64 outputs differ by {meaning:.1e} (relative), more than {limit:.0e}"
        if locate:
            try:
                copies = source.copy().double(), optimized.copy().double()
                divergence = find_divergence(*copies, inputs, limit)
            except Exception as failure:
                notes.append(f"where they part could not be found: {first_line(failure)}")
    check = ModelCheck(meaning, source_error, error, limit, reason)
    worst = _worst(paths, truth, found)
    return Comparison(*names, check, worst, divergence, tuple(dict.fromkeys(notes)))


def _worst(paths: list[str], truth: list[Any], found: list[Any]) -> Worst | None:
    """The element that differs most of the output that differs most; None without tensors."""
    worst: Worst | None = None
    for path, a, b in zip(paths, truth, found, strict=True):
        if not isinstance(a, torch.Tensor) or not a.numel():
            continue
        error = relative_error([b], [a])
        if worst is None or error > worst.error:
            a, b = lift(a), lift(b)
            same = (a == b) | (a.isnan() & b.isnan())
            away = torch.where(same, 0.0, (a - b).abs().double()).nan_to_num(math.inf)
            index = tuple(map(int, torch.unravel_index(away.argmax(), a.shape)))
            worst = Worst(path, index, _number(a[index]), _number(b[index]), error)
    return worst


def _number(value: torch.Tensor) -> float:
    return float(value.abs() if value.is_complex() else value)
