"""What two plain functions say before they are traced: wildcards, names, examples, and errors."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from graphopt.ir.pattern.match import MISFITS
from graphopt.ir.pattern.terms import Apply, Fact, Formula, Number, Tensor, Term, walk
from graphopt.ir.rewrite import RewriteError

Names = tuple[str, str]
Wildcards = Mapping[str, type | None]
KINDS: dict[Any, type | None] = {
    inspect.Parameter.empty: None, torch.Tensor: None, "torch.Tensor": None, "Tensor": None,
    float: float, "float": float, int: int, "int": int,
}  # fmt: skip


def parameters(function: Callable[..., Any], name: str) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError:
        raise RewriteError(
            f"{name} is built in and does not say what it takes; expected a function in Python: "
            f"lambda x: {name}(x)"
        ) from None


def wildcards_of(pattern: Callable[..., Any], name: str) -> dict[str, type | None]:
    """The parameters of a pattern: float or int for numbers, None for tensors."""
    found: dict[str, type | None] = {}
    for one in parameters(pattern, name):
        if one.kind not in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY):
            raise RewriteError(f"{name} takes {one}; expected parameters with names")
        if one.default is not one.empty:
            raise RewriteError(
                f"{name} has a default for {one.name}; expected none: a parameter stands for "
                "whatever is found there"
            )
        if one.annotation not in KINDS:
            raise RewriteError(
                f"{name} has a parameter {one}; expected a tensor (no annotation), a float or an "
                "int"
            )
        found[one.name] = KINDS[one.annotation]
    return found


def check_known(function: Callable[..., Any], name: str, wildcards: Any, pattern: str) -> None:
    for one in parameters(function, name):
        if one.name not in wildcards:
            raise RewriteError(
                f"{name} takes {one.name}, which {pattern} does not; expected some of "
                f"{', '.join(wildcards)}"
            )


def some(values: Mapping[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    return {name: values[name] for name in inspect.signature(function).parameters}


def called(function: Callable[..., Any], role: str) -> str:
    """What errors and reports call a function: its name, unless it has none."""
    name = getattr(function, "__name__", "")
    return name if name.isidentifier() else role


def spelled(term: Term, result: Term) -> str:
    """A name made of ops, for a pattern that is called `pattern`."""
    before, after = (
        "-".join(one.cls.__name__.lower() for one in walk(side) if isinstance(one, Apply))
        for side in (term, result)
    )
    return f"{before}-to-{after}" if after else f"drop-{before}"


def check_pair(term: Term, result: Term, names: Names, wildcards: Wildcards) -> Apply:
    """Refuse pairs that can never be matched, or would match what they make."""
    if not isinstance(term, Apply):
        raise RewriteError(f"{names[0]} returns {term} as it is; expected an op on it")
    bound = {str(one) for one in _bound(term)}
    for one in wildcards:
        if one not in bound:
            inside = [str(part) for part in walk(term) if isinstance(part, (Formula, Fact))]
            found = f"only within {inside[0]}" if inside else "nowhere"
            raise RewriteError(
                f"{names[0]} reads its parameter {one} {found}; expected it as an operand or an "
                "option of an op, so that a match says what it is"
            )
    if term in walk(result):
        raise RewriteError(
            f"{names[1]} computes {result}, in which {names[0]} occurs again; expected something "
            "that it does not match"
        )
    return term


def _bound(term: Term) -> Iterator[Term]:
    """The wildcards whose value a match tells: all but those within formulas and facts."""
    if isinstance(term, (Tensor, Number)):
        yield term
    elif not isinstance(term, (Formula, Fact)):
        for part in term.parts:
            yield from _bound(part)


def examples_for(
    pattern: Callable[..., Any], replacement: Callable[..., Any], names: Names,
    wildcards: Wildcards, inputs: Sequence[Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """A tensor or number for each wildcard on which both functions run."""
    reason = ""
    given = None if inputs is None else _given(names[0], wildcards, inputs)
    for one in _guesses(wildcards) if given is None else (_widened(given),):
        try:
            with torch.no_grad():
                pair = pattern(**one), replacement(**some(one, replacement))
        except MISFITS as error:
            reason = reason or f": {str(error).partition(chr(10))[0]}"
            continue
        for name, result in zip(names, pair, strict=True):
            if not isinstance(result, torch.Tensor):
                raise RewriteError(f"{name} returns a {type(result).__name__}; expected one tensor")
        if pair[0].shape == pair[1].shape:
            return one
    if given is not None:
        return given
    raise RewriteError(
        f"{names[0]} and {names[1]} do not run alike on matrices, vectors and images of sizes 4; "
        f"expected example tensors, inputs=({', '.join(wildcards)}){reason}"
    )


def _given(name: str, wildcards: Wildcards, inputs: Sequence[Any]) -> dict[str, Any]:
    if len(inputs) != len(wildcards):
        raise RewriteError(f"{name} takes {', '.join(wildcards)}; found {len(inputs)} inputs")
    for (wildcard, kind), one in zip(wildcards.items(), inputs, strict=True):
        expected = kind or torch.Tensor
        if not isinstance(one, expected):
            raise RewriteError(
                f"{name}: the example of {wildcard} is of type {type(one).__name__}; expected "
                f"{expected.__name__}"
            )
    return dict(zip(wildcards, inputs, strict=True))


def _widened(given: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of 1 made 2: tracing takes a 1 for a size that must be 1."""
    return {
        name: one.repeat([2 if size == 1 else 1 for size in one.shape])
        if isinstance(one, torch.Tensor) else one
        for name, one in given.items()
    }  # fmt: skip


def _guesses(wildcards: Wildcards) -> Iterator[dict[str, Any]]:
    numbers: dict[str, Any] = {}
    for index, (name, kind) in enumerate(wildcards.items()):
        if kind is not None:
            numbers[name] = 1.37174 + index / 7 if kind is float else 13 + 4 * index
    tensors = [name for name in wildcards if name not in numbers]
    for rank in (2, 4, 3):
        for ranks in itertools.product((rank, 1), repeat=len(tensors)):
            shapes = zip(tensors, ranks, strict=True)
            found = {name: torch.rand((4,) * ndim) + 0.5 for name, ndim in shapes}
            yield {name: {**found, **numbers}[name] for name in wildcards}
