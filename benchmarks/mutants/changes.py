"""The mistakes: every change of a law that may change its meaning, and a sample of them."""

from __future__ import annotations

import ast
import copy
import functools
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.mutants.executed import Lines
from benchmarks.mutants.mutate import Law, Mutant, reached

OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Pow: ast.Mult, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.LtE: ast.Gt,
    ast.NotIn: ast.In, ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.GtE: ast.Lt, ast.FloorDiv: ast.Mult,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
FIELDS = {
    "left": "right", "right": "left", "scale": "shift", "shift": "scale", "weight": "bias",
    "bias": "weight", "running_mean": "running_var", "running_var": "running_mean",
    "input": "out", "out": "input", "dims": "shape", "rsqrt": "sqrt", "in_channels": "out_channels",
    "out_channels": "in_channels",
}  # fmt: skip
NAMES = {
    "left": "right", "right": "left", "scale": "shift", "shift": "scale", "inner": "outer",
    "outer": "inner", "a": "b", "b": "a", "before": "after", "after": "before",
    "value": "parameter",
    "any": "all", "all": "any", "source": "wide", "wide": "source", "first": "second",
}  # fmt: skip
OPS = {"Neg": "Relu", "Relu": "Neg", "Mul": "Add", "Add": "Mul", "Sub": "Add", "Div": "Mul",
       "Pow": "Mul", "Permute": "Reshape", "Reshape": "Permute"}  # fmt: skip
SAY_NO = {"rw.require", "rw.match"}
SILENT = {"describe", "rw.about", "rw.decline", "isinstance", "rw.only_user"}


def mutants(law: Law) -> Iterator[Mutant]:
    """Every change of a law that may change its meaning."""
    is_rewrite = any("rewrite" in ast.unparse(one) for one in law.node.decorator_list)
    first = law.node.args.args[0] if is_rewrite else None
    if first is not None and isinstance(first.annotation, ast.Attribute):
        yield from _changes(law, first.annotation, functools.partial(setattr, first, "annotation"))
    for index, node in enumerate(law.node.body):
        yield from _changes(law, node, functools.partial(law.node.body.__setitem__, index))


def _changes(law: Law, old: ast.AST, put: Callable[[Any], None]) -> Iterator[Mutant]:
    silent = isinstance(old, ast.Call) and ast.unparse(old.func) in SILENT
    if silent or isinstance(old, (ast.JoinedStr, ast.Assert, ast.arguments)):
        return
    if isinstance(old, ast.keyword) and old.arg in ("like", "strict"):
        return
    for kind, new in _replacements(old):
        if kind != "wrong name" or new.id in _locals(law.node):  # type: ignore[attr-defined]
            yield Mutant(law, kind, put, old, new)
    says_no = isinstance(old, ast.Call) and ast.unparse(old.func) in SAY_NO
    for name, value in ast.iter_fields(old):
        if name == "func" and isinstance(value, ast.Name) and value.id not in ("any", "all"):
            continue
        if isinstance(value, list):
            for at, one in enumerate(value[:1] if says_no else value):
                if isinstance(one, ast.AST):
                    yield from _changes(law, one, functools.partial(value.__setitem__, at))
        elif isinstance(value, ast.AST) and name != "annotation":
            yield from _changes(law, value, functools.partial(setattr, old, name))


def _locals(law: ast.FunctionDef) -> set[str]:
    stored = {one.id for one in ast.walk(law) if isinstance(one, ast.Name)
              and isinstance(one.ctx, ast.Store)}  # fmt: skip
    return stored | {one.arg for one in ast.walk(law) if isinstance(one, ast.arg)} | {"any", "all"}


def _only_user(node: ast.AST) -> bool:
    return "only_user" in ast.unparse(node)


def _with(node: ast.AST, **changes: Any) -> Any:
    new = copy.copy(node)
    for name, value in changes.items():
        setattr(new, name, value)
    return new


def _replacements(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What may stand in place of a node, and what kind of mistake that is."""
    match node:
        case ast.Expr(value=ast.Call(func=func, args=[condition, *_]) as call):
            if ast.unparse(func) in SAY_NO and not _only_user(condition):
                yield "requirement dropped", ast.Pass()
                negated = ast.UnaryOp(ast.Not(), condition)
                yield "requirement negated", ast.Expr(_with(call, args=[negated, *call.args[1:]]))
            elif ast.unparse(func) == "rw.decline":
                yield "requirement dropped", ast.Pass()
        case ast.If(test=test) if not isinstance(test, ast.Constant):
            yield "case dropped", _with(node, test=ast.Constant(False))
        case ast.IfExp(body=body, orelse=orelse):
            yield "case dropped", body
            yield "case dropped", orelse
        case ast.BoolOp(op=op, values=values):
            yield "and, or", _with(node, op=OPERATORS[type(op)]())
            for i, one in enumerate(values):
                if not _only_user(one):
                    kept = values[:i] + values[i + 1 :]
                    yield (
                        "condition dropped",
                        kept[0] if len(kept) == 1 else _with(node, values=kept),
                    )
        case ast.Compare(ops=[op], left=left, comparators=[right]):
            if type(op) in OPERATORS:
                yield "comparison inverted", ast.Compare(left, [OPERATORS[type(op)]()], [right])
        case ast.BinOp(left=left, op=op, right=right) if not isinstance(op, ast.BitOr):
            if type(op) in OPERATORS:
                yield "wrong operator", ast.BinOp(left, OPERATORS[type(op)](), right)
            yield "operand dropped", left
            if isinstance(op, (ast.Sub, ast.Pow, ast.FloorDiv)):
                yield "operands swapped", ast.BinOp(right, op, left)
        case ast.UnaryOp(op=op, operand=operand):
            yield ("wrong sign" if isinstance(op, ast.USub) else "condition negated"), operand
        case ast.Constant(value=bool() as value):
            yield "wrong constant", ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield "off by one", ast.Constant(value + 1)
        case ast.Attribute(value=ast.Name(id="ops") as module, attr=name):
            yield "another op", ast.Attribute(module, OPS.get(name, "Relu"), ast.Load())
        case ast.Attribute(value=of, attr=name):
            if name in FIELDS:
                yield "wrong field", ast.Attribute(of, FIELDS[name], ast.Load())
        case ast.Name(id=name, ctx=ast.Load()) if name in NAMES:
            yield "wrong name", ast.Name(NAMES[name], ast.Load())
        case ast.Return(value=ast.Attribute(value=of, attr="input")):
            deeper = ast.Attribute(ast.Attribute(node.value, "op", ast.Load()), "input", ast.Load())
            yield "one level too deep", ast.Return(deeper)
        case ast.Tuple(elts=[a, b], ctx=ast.Load()):
            yield "swapped", ast.Tuple([b, a], ast.Load())
        case ast.Call():
            yield from _calls(node)


def _calls(call: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    name = ast.unparse(call.func)
    if name == "rw.producer":
        yield "requirement dropped", ast.Attribute(call.args[0], "op", ast.Load())
    if name in ("times", "plus", "_same_type", "widen", "_as", "combine", "_passed"):
        at = 2 if name == "_passed" else 0
        yield "call dropped", call.args[at]
    if name in ("Affine", "_sum", "sum") and len(call.args) >= 3:
        for i in (1, 2):
            if not isinstance(call.args[i], ast.Constant):
                args = [*call.args[:i], ast.Constant(None), *call.args[i + 1 :]]
                yield "term dropped", _with(call, args=args)
        yield "swapped", _with(call, args=[call.args[0], call.args[2], call.args[1]])
    if name.endswith((".spread", ".at", ".part")) and isinstance(call.func, ast.Attribute):
        yield "call dropped", call.func.value
    for i, one in enumerate(call.keywords):
        kept = call.keywords[:i] + call.keywords[i + 1 :]
        if one.arg not in ("like", "strict"):
            yield "argument dropped", _with(call, keywords=kept)
        if one.arg == "bias":
            none = ast.keyword("bias", ast.Constant(None))
            yield "bias dropped", _with(call, keywords=[*kept, none])


def sample(home: str, name: str, seed: int, count: int, lines: Lines) -> list[Mutant]:
    """`count` mutants of a rewrite and the equivalent ones met on the way: kinds of change in
    turns, of its own body and of the laws it reaches, where it runs `lines`."""
    rng = random.Random(f"{seed} {name}")
    kinds: dict[tuple[str, bool], list[Mutant]] = {}
    for law in reached(home, name):
        texts = {ast.unparse(law.node)}
        for one in mutants(law):
            if not lines[law.home].intersection(one.lines):
                continue
            if (text := one.source(law.node)) not in texts:
                texts.add(text)
                kinds.setdefault((one.kind, law.node.name == name), []).append(one)
    turns = [rng.sample(kind, len(kind)) for kind in kinds.values()]
    rng.shuffle(turns)
    found: list[Mutant] = []
    drawn = (one for turn in itertools.zip_longest(*turns) for one in filter(None, turn))
    for one in itertools.chain(drawn, _negated(home, name)):
        if sum(not other.argument(name) for other in found) < count:
            found.append(one)
    return found


def _negated(home: str, name: str) -> Iterator[Mutant]:
    """The rewrite with the sign of its result changed, for those too short for other mistakes."""
    law = next(one for one in reached(home, name) if one.name == name)
    for node in law.node.body:
        if isinstance(node, ast.Return) and node.value is not None:
            put = functools.partial(setattr, node, "value")
            yield Mutant(law, "wrong sign", put, node.value, ast.UnaryOp(ast.USub(), node.value))
