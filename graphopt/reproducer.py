"""One application of a rewrite as a Python file that runs on its own and fails while it is wrong.

The file holds the two sides of the site (the part of the graph above the values that old and new
computation share) as plain torch code in float64. What enters is drawn at random, with the shapes and
about the values found in the model; only if that does not show the fault, or cannot (a stored weight
is one value, not a function of what it was computed from), the values themselves are kept.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import runpy
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from graphopt.ir.graph import Graph, is_overload
from graphopt.ir.interpret import is_getitem, lift_dtype
from graphopt.ir.printer import line
from graphopt.verify.site import cut

LIMIT = 1e-10  # relative, in float64
INLINE = 1 << 14  # bytes of tensors that a file holds itself; more go beside it
SEED = 0


@dataclasses.dataclass(frozen=True)
class Site:
    """Both sides of an application, as the printer writes graphs (`before`, `after`) and as bodies of
    Python functions (`old`, `new`) of `inputs`, which are values in float64. `open` says that the
    new side reads nothing but what the old one does, so that the inputs are arbitrary."""

    before: str
    after: str
    old: str
    new: str
    inputs: dict[str, Any]
    open: bool


def take_site(graph: Graph, old: fx.Node, new: fx.Node, value: Callable[[fx.Node], Any]) -> Site:
    """The site of replacing `old` by `new`, before that is done; `value` gives what they start from."""
    shared, inner = cut(old, new)
    sides = [_side(result, inner) for result in (old, new)]
    reads = [
        set(shared) & {result}.union(*(node.all_input_nodes for node in side))
        for result, side in zip((old, new), sides, strict=True)
    ]
    texts = [
        "\n".join(_printed(graph, node) for node in side) or result.name
        for result, side in zip((old, new), sides, strict=True)
    ]
    bodies = [_body(side, result) for result, side in zip((old, new), sides, strict=True)]
    inputs = {node.name: value(node) for node in sorted(reads[0] | reads[1])}
    return Site(texts[0], texts[1], bodies[0], bodies[1], inputs, reads[1] <= reads[0])


def _side(result: fx.Node, inner: list[fx.Node]) -> list[fx.Node]:
    """The nodes of `inner` that `result` is computed from, in order."""
    known, found, stack = set(inner), set(), [result]
    while stack:
        node = stack.pop()
        if node in known and node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return [node for node in inner if node in found]


def _printed(graph: Graph, node: fx.Node) -> str:
    where = graph.where(node)
    return line(graph, node) + (f"  # {where}" if where else "")


# -- graph to Python ----------------------------------------------------------------------------


def _body(nodes: list[fx.Node], result: fx.Node) -> str:
    lines = [f"{node.name} = {_call(node)}" for node in nodes]
    return "\n".join([*lines, f"return {result.name}"])


def _call(node: fx.Node) -> str:
    target: Any = node.target
    if is_getitem(node):
        return f"{_code(node.args[0])}[{_code(node.args[1])}]"
    if is_overload(target):
        namespace, _, name = target._schema.name.partition("::")
        function = f"torch.ops.{namespace}.{name}.{target._overloadname}"
    else:
        function = f"{target.__module__.lstrip('_')}.{target.__name__}"
    given = [_code(one) for one in node.args]
    given += [f"{key}={_code(value)}" for key, value in node.kwargs.items()]
    return f"{function}({', '.join(given)})"


def _code(value: Any) -> str:
    """An argument as Python; floating dtypes become float64, every device the CPU."""
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(_code, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner},)"
    if isinstance(value, torch.dtype):
        return repr(lift_dtype(value))
    if isinstance(value, torch.device):
        return 'torch.device("cpu")'
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)


# -- the file -----------------------------------------------------------------------------------

_TEMPLATE = '''\
"""{title}: {what}.

Pipeline: {pipeline}
Made by `graphopt bisect`. Exits with 1, and prints the float64 error, while before and after differ.
{remark}
before:
{before}

after:
{after}
"""

import {imports}

import torch
from torch.utils._pytree import tree_leaves

PIPELINE = {pipeline!r}
SEED = {seed}
LIMIT = {limit!r}  # relative, 2-norm


def before({names}):
{old}


def after({names}):
{new}


{makers}


def inputs():
{inputs}


def error():
    given = inputs()
    old, new = (
        torch.cat([one.flatten().to(torch.{wide}) for one in tree_leaves(run(**given))])
        for run in (before, after)
    )
    return float((new - old).norm() / old.norm().clamp(min=1e-300))


if __name__ == "__main__":
    found = error()
    print(f"float64 error {{found:.1e}} (relative, limit {{LIMIT:.0e}})")
    sys.exit(not found <= LIMIT)
'''

_DRAW = '''\
def draw(generator, shape, mean, deviation, least, greatest):
    """Normal draws within the range found in the model."""
    found = mean + deviation * torch.randn(shape, generator=generator, dtype=torch.float64)
    return found.clamp(least, greatest)


def pick(generator, shape, least, greatest, dtype):
    """Integers within the range found in the model."""
    return torch.randint(least, greatest + 1, shape, generator=generator).to(dtype)'''

_INLINE = '''\
def stored(text, dtype, shape):
    """A tensor of the model."""
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=dtype).reshape(shape)'''

_BESIDE = '''\
def stored(name):
    """A tensor of the model, from the file beside this one."""
    return load_file(Path(__file__).with_suffix(".safetensors"))[name]'''


@dataclasses.dataclass(frozen=True)
class Reproducer:
    """The text of the file, the tensors that belong beside it, and the float64 error it finds (nan
    if it does not run)."""

    text: str
    tensors: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    error: float = math.nan

    def save(self, path: Path) -> None:
        path.write_text(self.text)
        if self.tensors:
            from safetensors.torch import save_file

            save_file(self.tensors, path.with_suffix(".safetensors"))

    @property
    def fails(self) -> bool:
        return self.error > LIMIT


def reproduce(site: Site, title: str, what: str, pipeline: str) -> Reproducer:
    """The smallest file that shows the fault of a site; one that says so if none does."""

    def make(stored: bool, remark: str = "") -> Reproducer:
        return _checked(_render(site, title, what, pipeline, stored, remark))

    drawn = make(stored=False)
    if site.open and drawn.fails:
        return drawn
    kept = make(stored=True)
    if kept.fails:
        return kept
    error = "do not run in float64" if math.isnan(drawn.error) else "agree in float64"
    return make(False, f"The two {error} by themselves: the fault shows in the whole model only.\n")


def _checked(made: Reproducer) -> Reproducer:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "reproducer.py")
        made.save(path)
        try:
            with torch.no_grad():
                error = runpy.run_path(str(path))["error"]()
        except Exception:  # whatever torch raises for ops that do not run on such values
            error = math.nan
    return dataclasses.replace(made, error=error)


def _render(
    site: Site, title: str, what: str, pipeline: str, stored: bool, remark: str
) -> Reproducer:
    leaves = [one for one in pytree.tree_leaves(site.inputs) if isinstance(one, torch.Tensor)]
    tensors: dict[str, torch.Tensor] = {}
    spell: Callable[[torch.Tensor], str]
    if not stored:
        makers, spell = _DRAW, _drawn
    elif sum(one.nbytes for one in leaves) <= INLINE:
        makers, spell = _INLINE, _inline
    else:
        makers, spell = _BESIDE, _beside(tensors)
    given = [f'"{name}": {_spelled(value, spell)},' for name, value in site.inputs.items()]
    opening = ["return {"]
    if not stored:
        opening.insert(0, "generator = torch.Generator().manual_seed(SEED)")
    body = [*opening, *(f"    {one}" for one in given), "}"]
    code = site.old + site.new
    names = {"base64": makers is _INLINE, "math": "math." in code, "operator": "operator." in code}
    imports = "\nimport ".join(sorted(["sys", *(name for name, used in names.items() if used)]))
    if makers is _BESIDE:
        imports += "\nfrom pathlib import Path\n\nfrom safetensors.torch import load_file"
    text = _TEMPLATE.format(
        title=title, what=what, pipeline=pipeline, remark=remark, imports=imports, seed=SEED,
        limit=LIMIT, names=", ".join(site.inputs), makers=makers,
        before=textwrap.indent(site.before, "  "), after=textwrap.indent(site.after, "  "),
        old=textwrap.indent(site.old, "    "), new=textwrap.indent(site.new, "    "),
        inputs=textwrap.indent("\n".join(body), "    "),
        wide="complex128" if any(one.is_complex() for one in leaves) else "float64",
    )  # fmt: skip
    return Reproducer(text, tensors)


def _spelled(value: Any, spell: Callable[[torch.Tensor], str]) -> str:
    if isinstance(value, torch.Tensor):
        return spell(value)
    if isinstance(value, (list, tuple)):
        return f"({''.join(f'{_spelled(one, spell)}, ' for one in value).rstrip()})"
    return _code(value)


def _drawn(value: torch.Tensor) -> str:
    shape = tuple(value.shape)
    if value.is_complex():
        return f"torch.complex({', '.join(_drawn(one) for one in (value.real, value.imag))})"
    if not value.numel():
        return f"torch.empty({shape}, dtype={value.dtype})"
    if not value.is_floating_point():
        least, greatest = (int(one) for one in value.long().aminmax())
        return f"pick(generator, {shape}, {least}, {greatest}, {value.dtype})"
    finite = value[value.isfinite()]
    finite = finite if finite.numel() else torch.zeros(1)
    numbers = finite.mean(), finite.std(correction=0), *finite.aminmax()
    return f"draw(generator, {shape}, {', '.join(f'{float(one):.6g}' for one in numbers)})"


def _inline(value: torch.Tensor) -> str:
    raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f'stored("{base64.b64encode(raw).decode()}", {value.dtype}, {tuple(value.shape)})'


def _beside(tensors: dict[str, torch.Tensor]) -> Callable[[torch.Tensor], str]:
    def spell(value: torch.Tensor) -> str:
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return f'stored("{name}")'

    return spell
