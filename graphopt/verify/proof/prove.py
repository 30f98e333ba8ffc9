"""Proving a rewrite: its own function, run on symbols.

Every pattern the function matches, up to `depth` ops below the root, is built as it looks around
(see `pattern`); what it returns must have the entries of what it replaces, as expressions in index
notation, under the conditions of that run. No sizes, strides, paddings or values are fixed.
"""

from __future__ import annotations

import ctypes
import dataclasses
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from graphopt.ir.rewrite import Declined, Rewrite, rewrite as as_rewrite
from graphopt.ir.value import Value
from graphopt.verify.proof.algebra import sym
from graphopt.verify.proof.choices import Choices, RandomChoices
from graphopt.verify.proof.general import candidates
from graphopt.verify.proof.notation import ShapeError
from graphopt.verify.proof.pattern import Gap, Infeasible, find
from graphopt.verify.proof.symbols import Symbols

DEEPER = 4


@dataclasses.dataclass(frozen=True)
class Proof:
    """What proving a rewrite came to.

    `conditions` are the laws and preconditions used; `residual` is what is left of the difference
    of the two sides (or why there is no proof), empty if proved; `cases` counts the matched
    patterns that were compared.
    """

    rewrite: str
    proved: bool
    conditions: tuple[str, ...] = ()
    residual: str = ""
    pattern: str = ""
    cases: int = 0
    seconds: float = 0.0
    depth: int = 0

    def __bool__(self) -> bool:
        return self.proved

    def __str__(self) -> str:
        head = f"{self.rewrite}: {'proved' if self.proved else 'not proved'}"
        lines = [f"{head} ({self.cases} cases to depth {self.depth}, {self.seconds:.2f} s)"]
        if self.residual:
            lines += [
                f"  in {self.pattern}" if self.pattern else "",
                f"  residual: {self.residual}",
            ]
        lines += [f"  given {one}" for one in self.conditions]
        return "\n".join(line for line in lines if line)


def prove(rewrite: Any, *, depth: int = 3, seconds: float = 10.0) -> Proof:
    """Prove that a rewrite replaces values by equal ones. Never raises on a false rule.

    Patterns grow op by op: those that look at `n` ops below the root are all proved before those
    that look at more, and `Proof.depth` says how far it got in the time.

    Args:
        rewrite: a `Rewrite`, or a function that `graphopt.rewrite` would take.
        depth: how many ops below the root may be looked at, at most; if it takes more to match at
            all, as many as that.
        seconds: after which no deeper patterns are begun, and those begun are left.
    """
    start = time.perf_counter()
    one = rewrite if isinstance(rewrite, Rewrite) else as_rewrite(rewrite)
    done = Proof(one.name, False, residual=_unknown_root(one))
    for level in range(0 if done.residual else depth + DEEPER + 1):
        if level > depth and done.cases:
            break
        try:
            with interrupted_after(start + seconds + 1 - time.perf_counter()):
                proof, late = _prove_level(one, level, start + seconds)
        except TimeoutError:
            proof, late = Proof(one.name, False, residual="gave up: no end in sight"), True
        if late and done.proved and done.depth > 0:
            break
        done = proof
        if late or proof.pattern:
            break
    return dataclasses.replace(done, seconds=time.perf_counter() - start)


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """TimeoutError in this thread once the time is up: a size has no number, so a loop over one
    would not end."""
    thread = ctypes.c_ulong(threading.get_ident())

    def interrupt() -> None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(TimeoutError))

    timer = threading.Timer(max(seconds, 0.1), interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _unknown_root(rewrite: Rewrite) -> str:
    if any(map(candidates, rewrite.roots)):
        return ""
    return f"no general form of {', '.join(root.__name__ for root in rewrite.roots)} is known"


def _prove_level(rewrite: Rewrite, depth: int, until: float) -> tuple[Proof, bool]:
    """The proof for all patterns up to one depth, and whether the time ran out."""
    conditions: dict[str, None] = {}
    declined: dict[str, None] = {}
    missing: set[str] = set()
    residual, found, cases, paths = "", "", 0, 0
    for paths, visit in enumerate(explore(rewrite, depth), 1):
        pattern = visit.pattern
        missing |= pattern.missing
        if visit.declined is not None:
            declined[visit.declined] = None
        elif visit.error:
            residual, found = visit.error, show(pattern)
            break
        elif visit.result is not None:
            try:
                pairs = [(visit.root.out, visit.result), *pattern.others]
                residual = next(filter(None, (compare(pattern, *pair) for pair in pairs)), "")
            except (Infeasible, ShapeError):
                continue
            except TimeoutError:
                raise
            except Gap as gap:
                residual, found = f"cannot look at {gap}", show(pattern)
                break
            except Exception as error:
                residual = f"could not be compared: {type(error).__name__}: {error}"
                found = show(pattern)
                break
            cases += 1
            if residual:
                found = show(pattern)
                break
            conditions |= dict.fromkeys(pattern.space.laws)
            conditions |= {f"not: {reason}": None for reason in pattern.requirements}
        if time.perf_counter() > until:
            residual = f"gave up after {paths} paths, {cases} cases proved"
            break
    late = residual.startswith("gave up") and not found
    if cases == 0 and not residual:
        residual = f"never matched ({'; '.join(list(declined)[:4])})"
        if missing:
            residual += f"; no general form of {', '.join(sorted(missing))} is known"
    proof = Proof(rewrite.name, not residual, tuple(conditions), residual, found, cases, 0.0, depth)
    return proof, late


@dataclasses.dataclass(frozen=True)
class Visit:
    """One run of a rewrite on a pattern: what it returned, or why it declined, or what it raised."""

    pattern: Symbols
    root: Any
    result: Value | None = None
    declined: str | None = None
    near: bool = False
    error: str = ""


def explore(rewrite: Rewrite, depth: int, seed: int | None = None) -> Iterator[Visit]:
    """All patterns that a rewrite tells apart, looking at most `depth` ops below the root.

    With a seed, patterns at random, without end.
    """
    roots = list(dict.fromkeys(cls for root in rewrite.roots for cls in candidates(root)))
    if seed is not None:
        roots = random.Random(seed).sample(roots, 1)
    for root in roots:
        choices = Choices() if seed is None else RandomChoices(seed)
        while True:
            pattern = Symbols(choices)
            pattern.max_depth = depth
            visit = _visit(rewrite, pattern, root)
            if visit is not None:
                yield visit
            if not choices.next():
                break


def _visit(rewrite: Rewrite, pattern: Symbols, root: Any) -> Visit | None:
    op = None
    try:
        op = pattern.begin(root)
        result = rewrite(op, pattern)
    except (Infeasible, ShapeError):
        return None
    except Declined as declined:
        return Visit(pattern, op, declined=declined.reason, near=declined.near)
    except TimeoutError:
        raise
    except Gap as gap:
        return Visit(pattern, op, error=f"cannot look at patterns with {gap}")
    except Exception as error:
        text = f"could not be run on symbols: {type(error).__name__}: {error}"
        return Visit(pattern, op, error=text)
    if not isinstance(result, Value):
        return Visit(pattern, op, error=f"returned {result!r}; expected a value")
    if find(result.node) is find(op.out.node):
        return Visit(pattern, op, error="returned its own root; expected another value")
    return Visit(pattern, op, result)


def compare(pattern: Symbols, old: Value, new: Value) -> str:
    """The difference of two values at a general index; empty if they are equal."""
    if len(old.shape) != len(new.shape):
        return f"shape [{_text(old.shape)}] became [{_text(new.shape)}]"
    for a, b in zip(old.shape, new.shape, strict=True):
        if pattern.space.resolve(sym(a) - sym(b)) != 0:
            return f"shape [{_text(old.shape)}] became [{_text(new.shape)}]"
    at = tuple(
        pattern.space.named(name, size)
        for name, size in zip("ijklmpqrs", map(sym, old.shape), strict=False)
    )
    for opaque in (_kept(pattern, new) - {find(old.node)}, set()):
        pattern.opaque = opaque
        residual = str(pattern.space.difference(pattern.entry(old, at), pattern.entry(new, at)))
        if residual == "0" or not opaque:
            break
    return "" if residual == "0" else residual


def _kept(pattern: Symbols, new: Value) -> set[Any]:
    """The computed nodes of the pattern that a result is made of. What holds whatever they are
    holds for what they compute."""
    made, stack, kept = set(pattern.made), [find(new.node)], set()
    while stack:
        node = stack.pop()
        if node in made:
            stack += node.all_input_nodes
        elif node.computed:
            kept.add(node)
    return kept


def _text(shape: Any) -> str:
    return ", ".join(map(str, shape))


def show(pattern: Symbols) -> str:
    """The pattern that was matched, as an expression."""

    def text(value: Any) -> str:
        if isinstance(value, Value):
            node = find(value.node)
            if not node.computed:
                return str(node.name)
            fields = [
                (field.name, getattr(node.view, field.name))
                for field in dataclasses.fields(node.view) if field.name != "out"
            ]  # fmt: skip
            inside = ", ".join(
                text(item) if isinstance(item, Value) else f"{name}={text(item)}"
                for name, item in fields if item is not None
            )  # fmt: skip
            return f"{type(node.view).__name__}({inside})"
        if isinstance(value, (tuple, list)):
            return f"[{', '.join(map(text, value))}]"
        return str(value)

    root = getattr(pattern, "root", None)
    if root is None:
        return ""
    conditions = ", ".join(pattern.conditions)
    return text(Value(root, pattern)) + (f" where {conditions}" if conditions else "")
