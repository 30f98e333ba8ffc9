"""Merge times and latencies on a Llama of 27M parameters with an adapter on every linear map.

    python -m benchmarks.adapters.llama
    python -m benchmarks.adapters.llama --method LoRA --method OFT

"merge" is what both have to do: from the parameters of the adapter to the weights of a plain model
(`materialize` with us, `merge_and_unload` with PEFT, which writes over the weights it was given). Ours
leaves the model as it was; "PEFT copy" is what PEFT has to add for that, `copy.deepcopy`. "all" is ours
with capture, analysis and checks.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
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
from benchmarks.adapters.methods import METHODS, adapted, ops_of
from graphopt.ir.distance import relative_error

RESULTS = Path(__file__).parents[1] / "results"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TIMED = ["LoRA", "DoRA", "OFT", "LoHa", "FourierFT", "C3A", "IA3", "VeRA", "RoAd", "HRA", "MiSS",
         "LoKr"]  # fmt: skip
ROUNDS = 5


class Logits(nn.Module):
    """A language model from token ids to logits, without a cache."""

    def __init__(self, layers: int = 8) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        config = LlamaConfig(
            hidden_size=512, intermediate_size=1376, num_hidden_layers=layers, num_attention_heads=8,
            num_key_value_heads=8, vocab_size=2048, max_position_embeddings=256,
        )  # fmt: skip
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(config)
        self.requires_grad_(False).eval()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


def measure(method: str) -> dict[str, Any]:
    """The row of a method."""
    model = adapted(Logits(), TARGETS, method)
    ids = torch.randint(0, 2048, (2, 128))
    row: dict[str, Any] = {"method": method}
    start = time.perf_counter()
    fast = graphopt.optimize(model, (ids,), passes="deploy")
    row["all s"] = time.perf_counter() - start
    row["merge ms"] = 1e3 * dict(fast.report.passes)["materialize"]
    copying: list[float] = []
    merging: list[float] = []
    for _ in range(5):
        start = time.perf_counter()
        other = copy.deepcopy(model)
        copying.append(time.perf_counter() - start)
        start = time.perf_counter()
        other = other.merge_and_unload(progressbar=False)
        merging.append(time.perf_counter() - start)
    row["PEFT merge ms"] = 1e3 * statistics.median(merging)
    row["PEFT copy ms"] = 1e3 * statistics.median(copying)
    plain = graphopt.optimize(Logits(), (ids,), passes="deploy")
    row["ops"], row["base ops"] = len(ops_of(fast)), len(ops_of(plain))
    with torch.no_grad():
        row["error"] = relative_error(fast(ids), model(ids))
        for name, x in (("prefill 128", ids), ("one token", ids[:, :1])):
            if x.shape != ids.shape:  # captured anew: the number of tokens is static
                fast = graphopt.optimize(model, (x,), passes="deploy")
                plain = graphopt.optimize(Logits(), (x,), passes="deploy")
            times = in_turn([fast, plain, model], x)
            row[f"{name}: merged/base"] = statistics.median(a / b for a, b, *_ in times)
            row[f"{name}: unmerged/merged"] = statistics.median(one[2] / one[0] for one in times)
    return row


def in_turn(sides: list[Callable[..., Any]], x: torch.Tensor) -> list[tuple[float, ...]]:
    """Seconds of every side, round by round, each as often first as the others."""
    for side in sides:
        side(x)
    rounds = []
    for number in range(4 * ROUNDS):
        seconds = [0.0] * len(sides)
        for step in range(len(sides)):
            turn = (number + step) % len(sides)
            start = time.perf_counter()
            sides[turn](x)
            seconds[turn] = time.perf_counter() - start
        rounds.append(tuple(seconds))
    return rounds


def main(
    method: Annotated[list[str] | None, typer.Option(help="only this method; repeatable")] = None,
    out: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS,
) -> None:
    """Measure methods, keep their rows, and print the table."""
    if unknown := set(method or ()) - set(METHODS):
        raise typer.BadParameter(f"unknown {sorted(unknown)}; expected of {', '.join(METHODS)}")
    warnings.simplefilter("ignore")
    path = out / "adapters_llama.json"
    rows = (
        {one["method"]: one for one in json.loads(path.read_text())["rows"]}
        if path.exists()
        else {}
    )
    about = {"torch": torch.__version__, "peft": importlib.metadata.version("peft"),
             "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1)}  # fmt: skip
    for name in method or TIMED:
        rows[name] = measure(name)
        print(rows[name], flush=True)
        path.write_text(json.dumps({"about": about, "rows": list(rows.values())}, indent=1) + "\n")
        title = "Adapters on a Llama of 27M parameters"
        (out / "adapters_llama.md").write_text(markdown(title, about, list(rows.values())))
    print((out / "adapters_llama.md").read_text())


def markdown(title: str, about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """A table of rows, under what they were measured with."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"# {title}", "",
             ", ".join(f"{key} {value}" for key, value in about.items()) + ".", "",
             "| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]  # fmt: skip
    for row in rows:
        lines.append("| " + " | ".join(_text(row.get(head, "")) for head in heads) + " |")
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1e}" if value < 1e-3 else f"{value:.3g}"


if __name__ == "__main__":
    typer.run(main)
