"""Small pieces of source: index expressions, conditions, and formulas for docstrings."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping

import sympy

from graphopt.backends.triton import loops, scalars
from graphopt.backends.triton.index import Quotient, Remainder

_DIVISIONS = {"FloorDiv": "//", "CleanDiv": "//", "Mod": "%", "PythonMod": "%",
              "Quotient": "//", "Remainder": "%"}  # fmt: skip


def index_text(e: sympy.Expr, names: Mapping[str, str] | None = None) -> str:
    """An index expression as Triton source; sizes under their names in the kernel."""
    names = names or {}

    def factor(one: sympy.Expr) -> str:
        text = show(one)
        return f"({text})" if one.is_Add or (one.is_Integer and one < 0) else text

    def term(one: sympy.Expr) -> str:
        coefficient, rest = one.as_coeff_Mul()
        parts = [factor(part) for part in sympy.Mul.make_args(rest)] if rest != 1 else []
        # A division binds no closer than a product: it goes into parentheses, or last.
        parts = [f"({part})" if "//" in part or "%" in part else part for part in parts]
        if coefficient != 1 or not parts:
            parts.insert(0, str(coefficient))
        return " * ".join(parts)

    def show(one: sympy.Expr) -> str:
        if one.is_Symbol:
            return names.get(one.name, one.name)
        if one.is_Integer:
            return str(one)
        if one.is_Add:
            ordered = sorted(one.args, key=lambda part: (part.is_number, str(part)))
            text = show(ordered[0])
            for part in ordered[1:]:
                negative = part.as_coeff_Mul()[0] < 0
                text += f" - {_one(-part)}" if negative else f" + {_one(part)}"
            return text
        if one.is_Pow and one.exp.is_Integer and one.exp > 0:
            return " * ".join([factor(one.base)] * int(one.exp))
        if one.is_Mul:
            return term(one)
        kind = type(one).__name__
        if kind in _DIVISIONS:
            a, b = one.args
            left = factor(a) if not a.is_Mul else f"({show(a)})"
            right = factor(b) if not b.is_Mul else f"({show(b)})"
            if isinstance(a, Remainder) or (isinstance(a, Quotient) and kind == "Quotient"):
                left = f"({left})"
            return f"{left} {_DIVISIONS[kind]} {right}"
        raise NotImplementedError(f"no text for the index {one}")

    def _one(part: sympy.Expr) -> str:
        text = show(part)
        return f"({text})" if part.is_Add else text

    return show(e)


def shape_text(buffer: loops.Buffer, names: Mapping[str, str]) -> str:
    """float32[n, 64]"""
    sizes = ", ".join(index_text(size, names) for size in buffer.shape)
    return f"{str(buffer.dtype).removeprefix('torch.')}[{sizes}]"


# -- formulas ----------------------------------------------------------------------------------

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "eq": "==", "ne": "!=", "lt": "<",
          "le": "<=", "gt": ">", "ge": ">=", "bitwise_and": "&", "bitwise_or": "|",
          "logical_and": "&", "logical_or": "|"}  # fmt: skip
LONGEST = 90


def formulas(kernel: loops.Kernel | loops.Product) -> Iterator[str]:
    """What the kernel computes, in the ops' own names: a line per value that is used twice, per
    reduction and per output."""
    uses: dict[loops.Expr, int] = {}
    for one in kernel.expressions():
        for operand in one.operands:
            uses[operand] = uses.get(operand, 0) + 1
    texts: dict[loops.Expr, str] = {}
    atomic: set[loops.Expr] = set()
    for one in kernel.expressions():
        text, simple = _formula(one, texts, atomic)
        label = getattr(one, "label", "")
        again = uses.get(one, 0) > 1 and isinstance(one, loops.Call)
        if label and (isinstance(one, loops.Reduce) or again or len(text) > LONGEST):
            yield f"{label} = {text}"
            text, simple = label, True
        texts[one] = text
        if simple:
            atomic.add(one)
    for store in kernel.stores:
        if texts[store.value] != store.buffer.name.removesuffix("_out"):
            yield f"{store.buffer.name} = {texts[store.value]}"


def _formula(
    one: loops.Expr, texts: dict[loops.Expr, str], atomic: set[loops.Expr]
) -> tuple[str, bool]:
    """The text of an expression over its operands' texts, and whether it binds by itself."""
    if isinstance(one, loops.Load):
        places = ", ".join(texts[position] for _, position in one.at)
        return f"{one.buffer.name}[{places}]" if places else one.buffer.name, True
    if isinstance(one, loops.Position):
        return texts[one.value], True
    if isinstance(one, loops.Constant):
        return scalars.literal(one.value, one.dtype), True
    if isinstance(one, loops.Iota):
        return str(one.value), one.value.is_Symbol
    if isinstance(one, loops.Cast):
        inner = texts[one.value]
        if one.through is None:
            return inner, one.value in atomic
        return f"{str(one.through).removeprefix('torch.')}({inner})", True
    if isinstance(one, loops.Choose):
        inside = " and ".join(f"{index} >= 0" for index in one.conditions)
        return f"({texts[one.then]} if {inside} else {texts[one.other]})", True
    if isinstance(one, loops.Reduce):
        return f"{one.kind}({texts[one.body]})", True
    if isinstance(one, loops.Accumulated):
        return f"{one.kind}({texts[one.left]}, {texts[one.right]})", True
    assert isinstance(one, loops.Call)
    name = one.target._schema.name.removeprefix("aten::")
    parts = [texts[arg] for arg in one.args]
    alpha = one.options.get("alpha", 1)
    if name in _INFIX and len(parts) == 2 and alpha == 1:
        bound = [t if a in atomic else f"({t})" for t, a in zip(parts, one.args, strict=True)]
        return f"{bound[0]} {_INFIX[name]} {bound[1]}", False
    return f"{name}({', '.join(parts + _given(one))})", True


def _given(one: loops.Call) -> list[str]:
    """Arguments that are neither operands nor left at their default."""
    defaults = {each.name: each.default_value for each in one.target._schema.arguments}
    return [
        f"{key}={value}" for key, value in one.options.items()
        if key in defaults and value != defaults[key]
    ]  # fmt: skip


def docstring(title: str, lines: list[str]) -> list[str]:
    """The lines of a docstring, none longer than the page."""
    wrapped = [
        part for line in lines
        for part in (textwrap.wrap(line, LONGEST, subsequent_indent="    ") or [""])
    ]  # fmt: skip
    first = textwrap.wrap(title, LONGEST)
    return ['"""' + first[0], *first[1:], "", *wrapped, '"""']
