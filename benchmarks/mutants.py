"""The mutation table: are wrong rewrites caught, and by which judge?

    python -m benchmarks.mutants --seed 0 --per-rewrite 5 --workers 2

Every shipped rewrite is made wrong in several ways: its source, and that of the laws it reaches, is
changed at one place (a requirement dropped or negated, an operator, a constant, a field, an operand
or a case exchanged or dropped), and compiled in a copy of its module. Three judges see each mutant
alone, in place of the original:

- proof: `prove` finds a pattern whose two sides differ, or on which it raises;
- property: `check` finds a counterexample;
- site: `optimize` rolls it back on one of a few fixed networks.

"dead" is a mutant that never applies any more where the original does. Kinds of change that cannot
change a meaning are not generated: reasons, `describe`, `like=`, assertions, and `only_user`
(without it a value is computed twice). A mutant that no judge caught is listed, with the argument
why it is equivalent if there is one (`EQUIVALENT`), else as a survivor; the program then exits with 1.
"""

from __future__ import annotations

import ast
import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import importlib
import inspect
import itertools
import json
import multiprocessing
import random
import signal
import sys
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import hypothesis
import torch
import typer

import graphopt
from graphopt.ir.driver import DidNotConverge
from graphopt.ir.rewrite import Rewrite
from graphopt.passes.base import available
from graphopt.testing import Counterexample, check, checking, prove
from graphopt.verify.model import relative_error

RESULTS = Path(__file__).parent / "results"
PROVE_SECONDS, CHECK_EXAMPLES, CHECK_PATHS, JUDGE_SECONDS = 5.0, 40, 150, 25.0
JUDGES = ("proof", "property", "site", "together")
AFFINE = "graphopt.ir.affine"
LAW_METHODS = {
    ("graphopt.ir.ops.affine", "Conv"): ("scale_out", "scale_in", "_per_output", "response_kernel"),
    ("graphopt.ir.ops.norm", "BatchNorm"): ("scale_and_shift",),
}

_SAME_SHAPE = "the replacement must have the shape of the original, so nothing else is left out"
_ANY_TERM = "(x + a) + b = x + (a + b), and the same of factors, also for a value a"
_SIZES = (
    "the shape emitted is that of the value replaced, which several dynamic sizes only make "
    "longer to spell; measured right with two of them"
)
_ONE_PIECE = "a concatenation of one piece has its piece's shape and dtype"
_FEWER = "only refuses more; right where it still applies"
# Mutants that mean the same as the original, or refuse more and are right where they apply:
# (function, change) -> the argument. Changes are spelled as the table prints them.
EQUIVALENT = {
    ("uniform", "return number if number in (0.0, 1.0) else None  ->  "
     "return number if number in (1.0, 1.0) else None"):
        f"a cast of a zero is not recognized any more: {_FEWER}",
    ("uniform", "if isinstance(op, (ops.Reshape, ops.Expand, ops.Permute, ops.Copy, ops.Detach)): "
     "return uniform(op.input)  ->  if False: return uniform(op.input)"):
        f"a view of a number is not recognized any more: {_FEWER}",
    ("uniform", "if state.kind != 'constant' or not 0 < tensor.numel() <= 4096 or "
     "tensor.is_complex():  ->  if state.kind != 'constant' or not 0 < tensor.numel() <= 4097 or "
     "tensor.is_complex():"): "a limit of the work, not of the meaning",
    ("_merge", "isinstance(inner.right, float) and isinstance(inner.left, Value)  ->  "
     "isinstance(inner.left, Value)"): _ANY_TERM,
    ("_merge", "isinstance(inner.right, float) and isinstance(inner.left, Value)  ->  "
     "isinstance(inner.right, float) or isinstance(inner.left, Value)"): _ANY_TERM,
    ("merge_casts", "rw.emit_like(outer, input=inner.input) if source != outer.dtype else "
     "inner.input  ->  rw.emit_like(outer, input=inner.input)"):
        "emits a cast to the dtype that the value has, which is the value",
    ("drop_view", "op.step == 1 and op.start in (0, None)  ->  op.start in (0, None)"): _SAME_SHAPE,
    ("drop_view", "rw.match(op.step == 1 and op.start in (0, None))  ->  "
     "rw.match(op.step == 1 and op.start in (1, None))"):
        f"no slice from 1 has the shape of its input: {_FEWER}",
    ("drop_view", "(0, None)  ->  (None, 0)"): "membership does not depend on the order",
    ("spell_out_shape", "rw.match(rw.root.target in (aten.reshape_as.default, aten.view_as.default"
     ", aten.expand_as.default))  ->  (nothing)"):
        "emits the same op with the same fields, whatever call it was spelled with",
    ("merge_permutes", "if dims == tuple(range(len(dims))): return inner.input  ->  "
     "if False: return inner.input"): "emits the identity permutation, which is the value",
    ("merge_reshapes", "if shape == inner.input.shape: return inner.input  ->  "
     "if False: return inner.input"): "emits a reshape to the shape that the value has",
    ("merge_reshapes", "rw.match(sum((not isinstance(size, int) for size in shape)) <= 1)  ->  "
     "(nothing)"): _SIZES,
    ("merge_reshapes", "rw.match(sum((not isinstance(size, int) for size in shape)) <= 1)  ->  "
     "rw.match(not sum((not isinstance(size, int) for size in shape)) <= 1)"): _SIZES,
    ("merge_reshapes", "sum((not isinstance(size, int) for size in shape)) <= 1  ->  "
     "sum((not isinstance(size, int) for size in shape)) > 1"): _SIZES,
    ("merge_reshapes", "rw.match(sum((not isinstance(size, int) for size in shape)) <= 1)  ->  "
     "rw.match(sum((not isinstance(size, int) for size in shape)) <= 2)"): _SIZES,
    ("merge_reshapes", "not isinstance(size, int)  ->  isinstance(size, int)"): _SIZES,
    ("merge_reshapes", "rw.emit_like(outer, input=inner.input, shape=shape)  ->  "
     "rw.emit_like(outer, input=inner.input)"):
        "the shape that the reshape was called with does too",
    ("drop_single_cat", "_same_type(op.tensors[0], rw, op.out)  ->  op.tensors[0]"): _ONE_PIECE,
    ("drop_single_cat", "rw.match(len(op.tensors) == 1)  ->  (nothing)"): _SAME_SHAPE,
    ("drop_single_cat: _same_type", "value.dtype == out.dtype and value.shape == out.shape  ->  "
     "value.dtype == out.dtype"): _ONE_PIECE,
    ("drop_single_cat: _same_type", "value.dtype == out.dtype and value.shape == out.shape  ->  "
     "value.shape == out.shape"): _ONE_PIECE,
    ("drop_single_cat: _same_type", "value.dtype == out.dtype and value.shape == out.shape  ->  "
     "value.dtype == out.dtype or value.shape == out.shape"): _ONE_PIECE,
    ("drop_single_cat: _same_type", "rw.match(value.dtype == out.dtype and value.shape == "
     "out.shape)  ->  (nothing)"): _ONE_PIECE,
    ("_extract[ops.Copy]", "rw.match(not getattr(op, 'train', False))  ->  "
     "rw.match(not getattr(op, 'train', True))"): f"a copy is refused: {_FEWER}",
    ("_through_pool", "pool.input  ->  pool.out"): "a pool keeps the number of axes, all it is for",
    ("_through_pad", "pad.mode != 'constant' or (by.shift is None and (pad.value is None or "
     "pad.value == 0))  ->  pad.mode != 'constant' and (by.shift is None and (pad.value is None or "
     "pad.value == 0))"): f"both are demanded where one suffices: {_FEWER}",
    ("_absorb[ops.Copy]", "rw.require(not getattr(op, 'train', False), f'{describe(op.out)} drops "
     "at random')  ->  rw.require(not getattr(op, 'train', True), f'{describe(op.out)} drops at "
     "random')"): f"a copy is refused: {_FEWER}",
}  # fmt: skip


# -- mutants ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Law:
    """A function whose source may be changed: a rewrite, or a law (of class `owner`) it reaches."""

    home: str
    owner: str
    tree: ast.Module
    node: ast.FunctionDef

    @property
    def name(self) -> str:
        """Its name; a case of a `singledispatch` table is named after its op."""
        if self.node.name != "_":
            return self.node.name
        first = self.node.decorator_list[0]
        case = first.args[0] if isinstance(first, ast.Call) else self.node.args.args[0].annotation
        return f"{ast.unparse(first).partition('.')[0]}[{ast.unparse(case or first)}]"


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change of one law: `put(new)` makes it in the source tree, `put(old)` takes it back."""

    law: Law
    kind: str
    put: Callable[[ast.AST], None]
    old: ast.AST
    new: ast.AST

    @property
    def change(self) -> str:
        before, after = (" ".join(ast.unparse(one).split()) for one in (self.old, self.new))
        if isinstance(self.old, ast.Constant):  # says nothing without its line
            lines = (
                text.splitlines()
                for text in (ast.unparse(self.law.node), self.source(self.law.node))
            )
            changed = (pair for pair in zip(*lines, strict=True) if pair[0] != pair[1])
            before, after = (line.strip() for line in next(changed))
        return f"{before}  ->  {'(nothing)' if isinstance(self.new, ast.Pass) else after}"

    def argument(self, rewrite: str) -> str:
        """Why the rewrite means the same with this change; empty if no argument is known."""
        places = self.law.name, f"{rewrite}: {self.law.name}"
        return "".join(EQUIVALENT.get((place, self.change), "") for place in places)

    def source(self, of: ast.AST) -> str:
        self.put(self.new)
        try:
            return ast.unparse(of)
        finally:
            self.put(self.old)

    @contextlib.contextmanager
    def active(self, rewrite: str, home: str) -> Iterator[Any]:
        """The mutated rewrite called `rewrite` of the module `home`, in a copy of its module."""
        law = self.law
        with contextlib.ExitStack() as stack:
            if law.owner:
                module = importlib.import_module(law.home)
                scope = dict(vars(module))
                exec(self.source(law.node), scope)
                method, cls = scope[law.node.name], getattr(module, law.owner)
                stack.enter_context(mock.patch.object(cls, law.node.name, method))
                module = importlib.import_module(home)
            else:
                module = _executed(law.home, self.source(law.tree))
                if law.home != home:
                    replaced = stack.enter_context(mock.patch.dict(sys.modules))
                    replaced[law.home] = module
                    module = _executed(home, inspect.getsource(importlib.import_module(home)))
            yield vars(module)[rewrite]


def _executed(name: str, source: str) -> types.ModuleType:
    module = types.ModuleType(name)
    exec(source, vars(module))
    return module


@functools.lru_cache
def _laws(home: str) -> list[Law]:
    tree = ast.parse(inspect.getsource(importlib.import_module(home)))
    found = []
    for top in tree.body:
        methods = LAW_METHODS.get((home, getattr(top, "name", "")))
        for node in top.body if methods and isinstance(top, ast.ClassDef) else [top]:
            if isinstance(node, ast.FunctionDef) and (not methods or node.name in methods):
                owner = top.name if methods else ""  # type: ignore[attr-defined]
                found.append(Law(home, owner, tree, node))
    return [law for law in found if law.owner or ".ops." not in home]


def reached(home: str, name: str) -> list[Law]:
    """The function called `name`, and the laws that it reaches by name."""
    homes = [home] if "canonicalize" in home else [home, AFFINE, *(key[0] for key in LAW_METHODS)]
    left = [law for one in homes for law in _laws(one)]
    found, waiting = [], [name]
    while waiting:
        wanted = waiting.pop()
        for law in [one for one in left if one.name.partition("[")[0] == wanted]:
            left.remove(law)
            found.append(law)
            for node in ast.walk(law.node):
                waiting += [getattr(node, "id", None) or getattr(node, "attr", None) or ""]
    return found


# -- changes ------------------------------------------------------------------------------------

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
    first = law.node.args.args[0]
    is_rewrite = any("rewrite" in ast.unparse(one) for one in law.node.decorator_list)
    if is_rewrite and isinstance(first.annotation, ast.Attribute):
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


def sample(home: str, name: str, seed: int, count: int) -> list[Mutant]:
    """`count` mutants of a rewrite and the equivalent ones met on the way: kinds of change in
    turns, of its own body and of the laws it reaches."""
    rng = random.Random(f"{seed} {name}")
    kinds: dict[tuple[str, bool], list[Mutant]] = {}
    texts: set[str] = set()
    for law in reached(home, name):
        for one in mutants(law):
            if (text := one.source(law.node)) not in texts:
                texts.add(text)
                kinds.setdefault((one.kind, law.node.name == name), []).append(one)
    turns = [rng.sample(kind, len(kind)) for kind in kinds.values()]
    rng.shuffle(turns)
    found: list[Mutant] = []
    for turn in itertools.zip_longest(*turns):
        for one in filter(None, turn):
            if sum(not other.argument(name) for other in found) < count:
                found.append(one)
    return found


# -- networks for site validation ---------------------------------------------------------------

# Per rewrite, places where it applies and places where it must not: functions of `x` [2, 4, 6, 6],
# `s` [4] (a parameter) and `c` (a convolution), or the modules of a Sequential.
_FOLDS = """conv(), norm(); conv(groups=2, bias=False), norm(); up(groups=2), norm()
    conv(), nn.AvgPool2d(2), norm(); conv(), norm(), norm(); conv(), nn.ZeroPad2d(1), norm()
    conv(), nn.ReLU(), norm(); conv(), nn.Unflatten(1, (2, 2)), nn.Flatten(1, 2), norm()"""
NETWORKS = {
    "drop_times_one": """x * 1; 1.0 * x; x / 1; x * 2 + x * 0; 1 / x; x * torch.tensor([1.0])
        x[:, :1, :1, :1] * torch.ones(4)""",
    "drop_plus_zero": """x + 0; 0.0 + x; x - 0; x + 1; torch.zeros(6).double() - x
        x[:, :1, :1, :1] + torch.zeros(4)""",
    "drop_power_one": "x**1; x**2; x**0; x * x; (x * 9).long() ** 1.0",
    "drop_double_negation": "-(-x); -(-(-x)); -x.relu(); (-x).relu(); -x",
    "drop_repeated_relu": "x.relu().relu(); (-x).relu(); -x.relu(); x.relu() * 2; x.exp().relu()",
    "merge_factors": """x * 2.0 * 3.0; x * 2.0 + 3.0; (x + 2.0) * 3.0; (x * s[0]) * x.sum()
        (x.float() * 2.0).double() * 3.0; x[..., :4] * s * 3.0""",
    "merge_terms": """x + 2.0 + 3.0; x * 2.0 + 3.0; (x + 2.0) * 3.0; (x[..., :4] + s) + 3.0
        (x.float() + 2.0).double() + 3.0""",
    "drop_dropout": "F.dropout(-x, 0.5, False); F.dropout(x, 0.5, True); (-x).relu(); c(x).relu()",
    "drop_cast": "x.to(torch.float64); x.float(); (-x).relu()",
    "merge_casts": """x.float().double().float(); x.long().double()
        x.float().relu().double(); x.bfloat16().float().half()
        ((x * 1e17).long() | 1).double().long() % 64
        x.float().double().long().double()""",
    "drop_copy": """x.clone(); (-x).clone() * 2; (-x).relu()
        x[:, :1].expand(-1, 4, 6, 6).clone().as_strided((9,), (2,))""",
    "drop_view": """x.reshape(x.shape); x.permute(0, 1, 2, 3); x.permute(0, 1, 3, 2); x[:, :, ::2]
        F.pad(x, (0, 0)); F.pad(x, (1, -1)); F.pad(x, (0, 0, 1, -1)); x[:, :, 1:]; x[:, :, 0:6]
        x.reshape(-1, 4, 36); x.repeat(1, 1, 1, 1); x.expand(-1, 4, 6, 6); x.permute(0, 2, 3, 1)""",
    "spell_out_shape": """x.flatten(1).reshape_as(x); s.expand_as(x[..., :4]); x[:1].expand_as(x)
        x.flatten(1).view_as(x); x[:, :1].expand_as(x); x.reshape(-1, 6)""",
    "merge_permutes": """x.permute(0, 2, 3, 1).permute(0, 2, 3, 1); x.mT.permute(0, 2, 1, 3)
        x.permute(0, 2, 3, 1).permute(0, 3, 1, 2); x.permute(0, 2, 1, 3).reshape(-1, 4, 36)""",
    "merge_reshapes": """x.reshape(-1, 4, 36).reshape(-1, 144); x.reshape(-1, 36)
        x.reshape(-1, 36).reshape(-1, 4, 6, 6); x.permute(0, 1, 3, 2).reshape(-1, 4, 36)""",
    "drop_single_cat": "torch.cat([x]); torch.cat([x, -x], 1); torch.cat([-x, x, x], 2)",
    "fold_batch_norm": _FOLDS,
    "fold_batch_norm_into_linear": """norm(), nn.Flatten(), nn.Linear(144, 3)
        norm(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        norm(), nn.Flatten(2), nn.Linear(36, 3)
        norm(), nn.ZeroPad2d(1), nn.Flatten(), nn.Linear(256, 3)
        norm(), nn.Flatten(), nn.Linear(144, 3, bias=False)
        norm(False), nn.Flatten(), nn.Linear(144, 3)
        norm(), nn.AvgPool2d(3, padding=1), nn.Flatten(), nn.Linear(16, 3)""",
    "fold_batch_norm_into_conv": """norm(), conv(); norm(), conv(padding=1); norm(), up(padding=2)
        norm(), conv(groups=2, bias=False); norm(), nn.Dropout(), conv(); norm(), up(groups=2)
        norm(), nn.ZeroPad2d(1), conv(); norm(), conv(padding=1, stride=2)
        norm(), nn.AvgPool2d(2), conv()""",
    "fold_scale_shift": """c(x) * s.reshape(4, 1, 1); c(x) - s.reshape(4, 1, 1); c(x) * s
        c(x) / s.reshape(4, 1, 1); s.reshape(4, 1, 1) - c(x); s.reshape(4, 1, 1) + c(x)
        s.reshape(4, 1, 1) / c(x); c(x) * s.reshape(4, 1) * 2; c(x) * s[:1] + s.sum()""",
}  # fmt: skip


class Net(torch.nn.Module):
    """The network that a text of `NETWORKS` stands for; its output is never its input."""

    def __init__(self, text: str) -> None:
        super().__init__()
        nn = torch.nn
        self.c, self.s = nn.Conv2d(4, 4, 3), nn.Parameter(torch.tensor([0.5, -2.0, 1.5, 3.0]))
        scope = {"nn": nn, "F": nn.functional, "torch": torch, "norm": _norm, "conv":
                 functools.partial(nn.Conv2d, 4, 4, 3), "up":
                 functools.partial(nn.ConvTranspose2d, 4, 4, 3)}  # fmt: skip
        chain = "norm(" in text
        self.text = text
        self.f = eval(f"nn.Sequential({text})" if chain else f"lambda x, s, c: {text}", scope)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.f(x) if isinstance(self.f, torch.nn.Module) else self.f(x, self.s, self.c)
        return y.sin()


def _norm(affine: bool = True) -> torch.nn.Module:
    norm = torch.nn.BatchNorm2d(4, eps=0.1, affine=affine)
    for one in (*norm.parameters(), norm.running_mean, norm.running_var):
        one.data.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return norm


def networks(name: str) -> list[torch.nn.Module]:
    texts = [one for line in NETWORKS[name].splitlines() for one in line.split(";")]
    return [Net(one.strip()).double().eval() for one in texts]


# -- judges -------------------------------------------------------------------------------------


class Late(BaseException):
    """A judge took too long. Not an `Exception`: nothing on the way may take it for a failure."""


def _late(signum: int, frame: Any) -> None:
    raise Late


def by_proof(one: Rewrite) -> tuple[str, str]:
    if one.unproved:
        return "n/a", "declared unproved"
    found = prove(one, depth=2, seconds=PROVE_SECONDS)
    if found.pattern:
        return "caught", f"residual {found.residual} in {found.pattern}"
    never = found.residual.startswith("never matched")
    return "dead" if never else "survived", found.residual or f"proved to depth {found.depth}"


def by_property(one: Rewrite) -> tuple[str, str]:
    if one.unproved:
        return "n/a", "its pattern is not seen in index notation"
    plain = checking.settings

    def unshrunk(**options: Any) -> Any:
        return plain(**{**options, "phases": [hypothesis.Phase.generate]})

    try:
        with mock.patch.object(checking, "settings", unshrunk):
            count = check(one, max_examples=CHECK_EXAMPLES, paths=CHECK_PATHS)
    except (Counterexample, DidNotConverge, hypothesis.errors.Flaky) as found:
        return "caught", str(found)
    except AssertionError as found:
        return "dead", str(found)
    return "survived", f"applied {count} times"


def by_site(one: Rewrite) -> tuple[str, str]:
    torch.manual_seed(0)
    applied, wrong, x = 0, "", torch.randn(2, 4, 6, 6, dtype=torch.float64)
    for model in networks(one.function.__name__):
        try:
            result = graphopt.optimize(model, (x,), passes=[one])
        except DidNotConverge as error:
            return "caught", f"{model.text}: the termination guard: {error}"
        report = result.report
        reason = report.check.reason if report.check and not report.check.ok else ""
        if report.rolled_back or reason:
            reason = reason or report.rolled_back[0].reason
            return "caught", f"rolled back in {model.text}: {reason}"
        applied += len(report.applied)
        with torch.no_grad():
            if "0.5, True" not in model.text and relative_error(result(x), model(x)) > 1e-9:
                wrong = f"{model.text} is wrong and was not rolled back"
    verdict = "MISSED" if wrong else "survived" if applied else "dead"
    return verdict, wrong or f"applied {applied} times"


def rewrites() -> dict[str, str]:
    """The module of every shipped rewrite, by the name of its function."""
    shipped = [one for cls in available().values() for one in cls.all_rewrites()]
    return {one.function.__name__: one.function.__module__ for one in shipped}


def judged(name: str, seed: int, count: int, number: int) -> dict[str, Any]:
    """What the three judges say about mutant `number` of the rewrite called `name`."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _late)
    home = rewrites()[name]
    mutant = sample(home, name, seed, count)[number]
    row: dict[str, Any] = {"rewrite": name, "function": mutant.law.name, "kind": mutant.kind,
                           "change": mutant.change, "argument": mutant.argument(name)}  # fmt: skip
    with mutant.active(name, home) as one:
        for judge, run in zip(JUDGES, (by_proof, by_property, by_site), strict=False):
            start = time.perf_counter()
            signal.setitimer(signal.ITIMER_REAL, JUDGE_SECONDS)
            try:
                row[judge], row[f"{judge} says"] = run(one)
            except Late:
                row[judge], row[f"{judge} says"] = "survived", "took too long"
            except Exception as error:
                row[judge], row[f"{judge} says"] = "CRASHED", f"{type(error).__name__}: {error}"
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            row[f"{judge} s"] = round(time.perf_counter() - start, 2)
    said = [row[judge] for judge in JUDGES[:3]]
    row["together"] = next((one for one in ("caught", "dead") if one in said), "survived")
    return row


# -- the table ----------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Per rewrite, and for all: caught / total by each judge; equivalent mutants do not count."""
    lines = []
    for name in [*dict.fromkeys(row["rewrite"] for row in rows), "all"]:
        own = [row for row in rows if name in (row["rewrite"], "all")]
        counted = [row for row in own if not row["argument"]]
        line = {"rewrite": name, "mutants": str(len(counted))}
        for judge in JUDGES:
            said = Counter(row[judge] for row in counted if row[judge] != "n/a")
            dead = f" + {said['dead']} dead" if said["dead"] else ""
            line[judge] = f"{said['caught']}{dead} / {said.total()}" if said else "-"
        line["equivalent"] = str(len(own) - len(counted))
        lines.append(line)
    return lines


def markdown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    lines = table(rows)
    text = [
        "# Mutants of the shipped rewrites", "",
        ", ".join(f"{key} {value}" for key, value in about.items()) + ".", "",
        "caught / total of the mutants that are not equivalent. dead: never applies any more.", "",
        "| " + " | ".join(lines[0]) + " |", "|" + " --- |" * len(lines[0]),
        *("| " + " | ".join(line.values()) + " |" for line in lines), "",
    ]  # fmt: skip
    quiet = [row for row in rows if row["together"] == "survived" or row["argument"]]
    text += ["## No judge objected, or none should", ""]
    for row in sorted(quiet, key=lambda one: bool(one["argument"])):
        why = f"equivalent: {row['argument']}" if row["argument"] else "SURVIVOR"
        odd = f" (but {row['together']})" if row["together"] != "survived" else ""
        text.append(f"- {_spelled(row)}: {why}{odd}")
    text += ["", "## A judge crashed, or let a wrong network through", ""]
    text += [f"- {_spelled(row)}: {one}: {_short(row[f'{one} says'])}"
             for row in rows for one in JUDGES if row[one] in ("MISSED", "CRASHED")]  # fmt: skip
    text += ["", "## One caught mutant per rewrite", ""]
    best: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: -sum(row[one] == "caught" for one in JUDGES)):
        best.setdefault(row["rewrite"], row)
    for row in best.values():
        text += [f"- {_spelled(row)}", *(f"  - {one}: {row[one]}: {_short(row[f'{one} says'])}"
                                         for one in JUDGES[:3])]  # fmt: skip
    return "\n".join(text) + "\n"


def _spelled(row: dict[str, Any]) -> str:
    change = row["change"] if len(row["change"]) < 200 else row["change"][:200] + " ..."
    return f"{row['rewrite']}, {row['kind']} in `{row['function']}`: `{change}`"


def _short(text: str) -> str:
    return " ".join(text.split())[:240]


def main(
    seed: Annotated[int, typer.Option(help="other seeds choose other mutants")] = 0,
    per_rewrite: Annotated[int, typer.Option(help="mutants of each rewrite")] = 5,
    rewrite: Annotated[list[str] | None, typer.Option(help="only these, by function name")] = None,
    workers: Annotated[int, typer.Option(help="processes, each with one thread")] = 1,
    out: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS,
) -> None:
    """Judge mutants of every shipped rewrite; exits with 1 if one survives without an argument."""
    shipped = rewrites()
    names = [one.replace("-", "_") for one in rewrite or shipped]
    if unknown := set(names) - set(shipped):
        raise typer.BadParameter(f"unknown {sorted(unknown)}; expected of {', '.join(shipped)}")
    start = time.perf_counter()
    jobs = [(name, seed, per_rewrite, number) for name in names
            for number in range(len(sample(shipped[name], name, seed, per_rewrite)))]  # fmt: skip
    rows = []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        for row in pool.map(judged, *zip(*jobs, strict=True)):
            rows.append(row)
            said = ", ".join(f"{one} {row[one]}" for one in JUDGES)
            print(f"{time.perf_counter() - start:5.0f} s  {row['rewrite']}: {said}  "
                  f"({_spelled(row)})", flush=True)  # fmt: skip
    about = {"torch": torch.__version__, "hypothesis": hypothesis.__version__, "seed": seed,
             "mutants": len(rows), "workers": workers,
             "seconds": round(time.perf_counter() - start)}  # fmt: skip
    text = markdown(rows, about)
    out.mkdir(parents=True, exist_ok=True)
    (out / "mutants.md").write_text(text)
    data = {"about": about, "table": table(rows), "mutants": rows}
    (out / "mutants.json").write_text(json.dumps(data, indent=1) + "\n")
    print(text.partition("\n## One caught")[0])
    raise typer.Exit(any(row["together"] == "survived" and not row["argument"] for row in rows))


if __name__ == "__main__":
    typer.run(main)
