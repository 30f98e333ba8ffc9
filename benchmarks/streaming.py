"""Adapters merged into a checkpoint that is larger than the memory allowed: `python -m benchmarks.streaming`.

    python -m benchmarks.streaming [--gigabytes 8] [--memory 2GB] [--folder DIR] [--no-validate]

Writes a Llama with LoRA on all linear maps of random weights in bfloat16, in shards; merges it in a
process of its own, whose peak memory is read from the system; and compares some layers, bit for bit, with
what `graphopt.optimize` makes of a model of that layer alone in memory, and names with those of the model
without adapters.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WIDE, INNER, VOCABULARY = 3072, 8192, 32000
LAYER = 2 * (4 * WIDE * WIDE + 3 * WIDE * INNER)  # bytes
SHARD = 1 << 30


class Logits(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(input_ids=ids).logits  # type: ignore[no-any-return]


def bare(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=WIDE, intermediate_size=INNER, num_hidden_layers=layers, num_attention_heads=24,
        num_key_value_heads=24, vocab_size=VOCABULARY, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16)


def adapted(layers: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS)
    return Logits(get_peft_model(bare(layers), config).to(torch.bfloat16)).eval()


def empty(layers: int) -> nn.Module:
    """Parameters without values; the one buffer that no file holds is computed."""
    with torch.device("meta"):
        model = adapted(layers)
    for one in list(model.modules()):
        for name, child in list(one.named_children()):
            if "inv_freq" in child._buffers:
                setattr(one, name, type(child)(child.config))
    return model


def ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(0))


def write(folder: Path, layers: int) -> int:
    """The checkpoint; its bytes."""
    draw = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    part: dict[str, Tensor] = {}
    held = total = 0

    def flush() -> None:
        nonlocal part, held
        file = f"part-{len(set(where.values())):05}.safetensors"
        save_file(part, folder / file)
        where.update(dict.fromkeys(part, file))
        part, held = {}, 0

    for name, one in empty(layers).state_dict().items():
        value = torch.randn(one.shape, generator=draw) * one.shape[-1] ** -0.5
        part[name] = value.to(one.dtype)
        held += part[name].nbytes
        total += part[name].nbytes
        if held >= SHARD:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return total


def merge(folder: Path, layers: int, memory: int, validate: bool) -> None:
    """Run in a process of its own; prints what it took."""
    import graphopt

    model, start = empty(layers), time.perf_counter()
    held = peak()
    done = graphopt.rewrite_checkpoint(
        model, ids(), [folder / "source"], folder / "merged", memory=memory, validate=validate,
        write_as=[("base_model[.]model[.]", "")],
        progress=lambda said: print(f"{time.perf_counter() - start:.0f} s: {said}", file=sys.stderr),
    )  # fmt: skip
    print(json.dumps({
        "seconds": time.perf_counter() - start, "computed": done.computed, "copied": done.copied,
        "peak": peak(), "peak before": held,
        "rolled back": len(done.rolled_back),
    }))  # fmt: skip


def peak() -> int:
    """The most bytes that this process has held; Linux. (What getrusage says includes its parent.)"""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def read(folder: Path) -> Any:
    """A reader of single tensors, and their names."""
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]

    def one(name: str) -> Tensor:
        with safe_open(folder / where[name], framework="pt") as file:
            return file.get_tensor(name).clone()  # type: ignore[no-any-return]

    return one, where.keys()


def equal(folder: Path, layer: int) -> tuple[int, int]:
    """How many tensors of a layer are, bit for bit, those of that layer optimized in memory; of how many.
    There, norms of gain 1 leave the weights behind them as they are."""
    import graphopt
    from graphopt.fleet.checkpoint import MERGE

    (source, _), (merged, _) = read(folder / "source"), read(folder / "merged")
    model = empty(1)
    prefix = "body.base_model.model.model.layers."
    states = {}
    for name in model.state_dict():
        found = source(name.replace(f"{prefix}0.", f"{prefix}{layer}."))
        states[name] = torch.ones_like(found) if "norm" in name else found
    model.load_state_dict(states, assign=True)
    fast = graphopt.optimize(model, (ids(),), passes=f"{MERGE},materialize", validate=False)
    same = total = 0
    for name, value in fast.state_dict().items():
        if ".layers.0." in name and name.endswith("_proj.weight"):
            total += 1
            stored = name.replace("base_model.model.", "").replace(
                ".layers.0.", f".layers.{layer}."
            )
            same += torch.equal(merged(stored), value)
    return same, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--memory", default="2GB")
    parser.add_argument("--folder", type=Path, help="for the files; a temporary one by default")
    parser.add_argument("--no-validate", action="store_true")
    parser.add_argument("--merge", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    from graphopt.fleet.command import size
    from graphopt.torchvision_ops import declare_missing_ops

    declare_missing_ops()
    memory = size(options.memory)
    if options.merge:
        return merge(options.folder, options.merge, memory, not options.no_validate)
    layers = max(1, round(options.gigabytes * 1e9 / LAYER))
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        (folder / "source").mkdir()
        total = write(folder / "source", layers)
        print(f"{layers} layers, {total / 1e9:.2f} GB", flush=True)
        command = [sys.executable, "-m", "benchmarks.streaming", "--merge", str(layers),
                   "--folder", str(folder), "--memory", options.memory,
                   *(["--no-validate"] if options.no_validate else [])]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        chosen = sorted(random.Random(0).sample(range(layers), min(3, layers)))
        counts = [equal(folder, layer) for layer in chosen]
        same, of = (sum(column) for column in zip(*counts, strict=True))
        _, names = read(folder / "merged")
        plain = {f"body.{name}" for name in bare_names(layers)}
        found |= {
            "bytes": total, "layers": layers, "limit": memory, "validated": not options.no_validate,
            "layers compared": chosen, "tensors bit-equal": same, "tensors compared": of,
            "names of the plain model": names == plain, "torch": torch.__version__,
            "machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
        }  # fmt: skip
        print(json.dumps(found, indent=1))
        path = RESULTS / "streaming.json"
        rows = json.loads(path.read_text()) if path.exists() else {}
        rows[f"{total / 1e9:.1f} GB{'' if found['validated'] else ', unchecked'}"] = found
        path.write_text(json.dumps(rows, indent=1) + "\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return None


def bare_names(layers: int) -> set[str]:
    with torch.device("meta"):
        return set(bare(layers).state_dict())


if __name__ == "__main__":
    main()
