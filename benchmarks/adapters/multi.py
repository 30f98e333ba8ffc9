"""A batch of 32 rows over 1 to 32 LoRA adapters: ours and PEFT's own mixed batches, side by side.

    python -m benchmarks.adapters.multi

A stack of linear maps and a Llama of one layer, one token and 32 tokens per row. Ours, PEFT's and the base
alone run with the same threads, in turn; medians, and medians of the ratios within a round.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import graphopt
from benchmarks.adapters.llama import TARGETS, Logits, markdown
from benchmarks.adapters.methods import declare_missing_ops
from graphopt.ir.distance import relative_error

RESULTS = Path(__file__).parents[1] / "results"
ROWS, RANK, ROUNDS, LAYERS = 32, 16, 11, 1
SAME = 1e-4  # the largest relative difference of two ways to the same outputs, in float32


def stack() -> nn.Module:
    """Four linear maps of 1024 features, with activations between."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(1024, 1024), nn.Tanh()]
    return nn.Sequential(*layers).requires_grad_(False).eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str], Callable[[int], torch.Tensor]]] = {
    "linear maps": (stack, ["0", "2", "4", "6"], lambda tokens: torch.randn(ROWS, tokens, 1024)),
    "Llama": (
        lambda: Logits(LAYERS),
        TARGETS,
        lambda tokens: torch.randint(0, 2048, (ROWS, tokens)),
    ),
}


def with_adapters(base: nn.Module, targets: list[str], count: int) -> Any:
    """A PEFT model with so many LoRA adapters, none of them zero."""
    declare_missing_ops()
    import peft

    config = peft.LoraConfig(target_modules=targets, r=RANK, lora_alpha=RANK)
    model = peft.get_peft_model(base, config, adapter_name="0")
    for number in range(1, count):
        model.add_adapter(str(number), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05)
    return model.requires_grad_(False).eval()


def views(model: Any, count: int) -> tuple[nn.Module, list[nn.Module]]:
    """The base, and the model with each adapter active; all over the same tensors."""
    tensors = {id(one): one for one in [*model.parameters(), *model.buffers()]}
    found = []
    for number in range(-1, count):
        view = copy.deepcopy(model, dict(tensors)).base_model
        if number < 0:
            view.disable_adapter_layers()
        else:
            view.set_adapter(str(number))
        found.append(view.eval())
    return found[0], found[1:]


def measure(name: str, count: int, tokens: int) -> dict[str, Any]:
    """The row of a model, a number of adapters and of tokens."""
    make, targets, draw = MODELS[name]
    model = with_adapters(make(), targets, count)
    torch.manual_seed(2)
    x = draw(tokens)
    ids = torch.arange(ROWS) % count
    base, adapted = views(model, count)
    start = time.perf_counter()
    fast = graphopt.multi(base, adapted, (x,))
    built = time.perf_counter() - start
    names = [str(int(one)) for one in ids]
    plain = graphopt.optimize(make(), (x,))

    def theirs() -> Any:
        return model(x, adapter_names=names)

    sides = [lambda: fast(x, adapter_ids=ids), theirs, lambda: plain(x)]
    with torch.no_grad():
        error = relative_error([sides[0]()], [theirs()])
        if not error < SAME:
            raise ValueError(f"{name}, {count} adapters: outputs differ by {error:.1e}")
        rounds = [[_seconds(side) for side in sides] for _ in range(ROUNDS)]
    ours, peft, alone = zip(*rounds, strict=True)
    return {
        "model": name, "adapters": count, "tokens per row": tokens,
        "ours ms": 1e3 * statistics.median(ours), "PEFT ms": 1e3 * statistics.median(peft),
        "base alone ms": 1e3 * statistics.median(alone),
        "PEFT/ours": statistics.median(b / a for a, b in zip(ours, peft, strict=True)),
        "ours/base": statistics.median(a / b for a, b in zip(ours, alone, strict=True)),
        "difference": error, "built s": built,
    }  # fmt: skip


def _seconds(side: Callable[[], Any]) -> float:
    start = time.perf_counter()
    side()
    return time.perf_counter() - start


def main(
    out: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS,
    model: Annotated[list[str] | None, typer.Option(help="only this model; repeatable")] = None,
    adapters: Annotated[list[int] | None, typer.Option(help="so many; repeatable")] = None,
) -> None:
    """Measure, keep the rows, and print the table."""
    warnings.simplefilter("ignore")
    rows = []
    about = {"torch": torch.__version__, "peft": importlib.metadata.version("peft"),
             "threads": torch.get_num_threads(), "rows": ROWS, "rank": RANK}  # fmt: skip
    for name in model or MODELS:
        for count in adapters or (1, 2, 8, 32):
            for tokens in (1, 32):
                rows.append(measure(name, count, tokens))
                print(rows[-1], flush=True)
                data = {"about": about, "rows": rows}
                (out / "adapters_multi.json").write_text(json.dumps(data, indent=1) + "\n")
                table = markdown("A batch over several adapters", about, rows)
                (out / "adapters_multi.md").write_text(table)
    print(table)


if __name__ == "__main__":
    typer.run(main)
