"""Real architectures through the Triton backend: what becomes a kernel, and whether it is right.

    python -m benchmarks.triton_sweep [--only resnet18 gpt2] [--again] [--failed] [--ptx]

Every model (random weights, small inputs) is optimized, lowered for one batch size, and run at others
in Triton's interpreter, in a process of its own with limits of time and memory. Every kernel's
result is compared with its region's graph of torch ops in float64, and the model's outputs with the
source model in float64. Where a run takes longer than `--run` seconds the kernels are compiled to PTX
instead. What is known is kept: benchmarks/results/triton_sweep.json, shown as triton_sweep.md.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from torch import fx, nn

import graphopt
from benchmarks.zoo.inputs import Inputs, MakeInputs, double, images, run
from benchmarks.zoo.prepare import finish
from graphopt.torchvision_ops import declare_missing_ops

RESULTS = Path(__file__).parent / "results" / "triton_sweep.json"
ROWS = (3, 1)  # batch sizes that are run; the program is built for 2
EPS = torch.finfo(torch.float32).eps

# name: (size of its images, options of its constructor)
TORCHVISION: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (64, {}), "squeezenet1_1": (64, {}), "mobilenet_v2": (64, {}),
    "mobilenet_v3_small": (64, {}), "shufflenet_v2_x0_5": (64, {}), "mnasnet0_5": (64, {}),
    "efficientnet_b0": (64, {}), "regnet_y_400mf": (64, {}), "convnext_tiny": (64, {}),
    "swin_t": (64, {}), "vit_b_16": (32, {"image_size": 32}),
    "googlenet": (64, {"aux_logits": False, "init_weights": False}),
    "inception_v3": (96, {"aux_logits": False, "init_weights": False}),
    "densenet121": (64, {}),
    "maxvit": (64, {"input_size": (64, 64), "stem_channels": 16, "partition_size": 2,
                    "block_channels": [16, 32], "block_layers": [1, 2], "head_dim": 8,
                    "stochastic_depth_prob": 0.0}),
}  # fmt: skip
TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "swinv2_tiny_window8_256": (64, {"img_size": 64, "depths": (1, 2, 2, 1)}),
    "eva02_tiny_patch14_224": (56, {"img_size": 56, "depth": 3}),
    "xcit_nano_12_p16_224": (64, {"img_size": 64, "depth": 3}),
    "cait_xxs24_224": (64, {"img_size": 64, "depth": 3}),
    "poolformer_s12": (64, {}), "edgenext_xx_small": (64, {}), "efficientformer_l1": (224, {}),
    "levit_128s": (224, {}), "tiny_vit_5m_224": (224, {}),
    "hrnet_w18_small": (64, {}), "repvgg_a0": (64, {}), "eca_nfnet_l0": (64, {}),
    "gmlp_ti16_224": (224, {}), "seresnext26t_32x4d": (64, {}),
    "halonet26t": (256, {}), "botnet26t_256": (64, {"img_size": 64}),
    "lambda_resnet26t": (64, {"img_size": 64}), "efficientvit_b0": (64, {}),
    "convit_tiny": (64, {"img_size": 64, "depth": 12}), "mvitv2_tiny": (64, {"img_size": 64}),
    "coat_lite_tiny": (64, {"img_size": 64}), "volo_d1_224": (64, {"img_size": 64}),
    "focalnet_tiny_srf": (64, {}), "fastvit_t8": (64, {}), "mobilenetv4_conv_small_035": (64, {}),
    "crossvit_9_240": (240, {}), "gcvit_xxtiny": (64, {"img_size": 64}),
    "beit_base_patch16_224": (64, {"img_size": 64, "depth": 2, "embed_dim": 192, "num_heads": 3}),
}  # fmt: skip
# Of benchmarks.zoo, and others: (class, options of its config).
TRANSFORMERS = (
    "bert", "gpt2", "llama", "t5", "whisper-encoder", "gemma2", "qwen2", "albert", "opt", "phi",
    "wav2vec2",
)  # fmt: skip
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaModel", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4,
                             "vocab_size": 101, "use_cache": False}),
    "qwen3": ("Qwen3Model", {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                             "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96,
                             "vocab_size": 101, "use_cache": False}),
    "gemma": ("GemmaModel", {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                             "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 96,
                             "vocab_size": 101, "use_cache": False}),
    "modernbert": ("ModernBertModel", {"hidden_size": 64, "num_hidden_layers": 3,
                                       "num_attention_heads": 4, "intermediate_size": 96,
                                       "vocab_size": 101, "pad_token_id": 0, "cls_token_id": 1,
                                       "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}),
}  # fmt: skip


# -- the models ----------------------------------------------------------------------------------


def names() -> list[str]:
    return [*TORCHVISION, *TRANSFORMERS, *OTHERS, *TIMM]


def made(name: str) -> tuple[nn.Module, MakeInputs]:
    """A model of random weights, and what makes its inputs of a batch size."""
    torch.manual_seed(0)
    if name in TORCHVISION:
        from torchvision import models

        size, options = TORCHVISION[name]
        make = models.MaxVit if name == "maxvit" else getattr(models, name)
        return finish(make(**options), images(3, size, size))
    if name in TIMM:
        import timm

        size, options = TIMM[name]
        return finish(timm.create_model(name, **options), images(3, size, size))
    from benchmarks.zoo import transformers_models

    if name in OTHERS:
        transformers_models.TRANSFORMERS[name] = (*OTHERS[name], "text")
    return transformers_models.build(name, None)


# -- one model -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """What is known of a model; nan and 0 where nothing is.

    Attributes:
        status: "agrees", "wrong", "built" (not run), "error" or "timeout".
        ops, inside: pointwise ops and reductions, and how many are in kernels.
        products: kernels around a product of matrices.
        framework: calls of torch's own kernels; `outside` counts them by reason.
        left: why pointwise ops and reductions are in no kernel.
        error, own: the largest differences from the source in float64, over the largest output, of
            the program and of the source in float32.
        kernel_error: the same for the worst kernel on the tensors that it gets.
        optimize_s, build_s, run_s: seconds of processor time to optimize, to lower, and of the longest
            run in the interpreter.
        compiled, failures, spills: kernels compiled to PTX, if any were.
    """

    name: str
    status: str = "error"
    stage: str = ""
    reason: str = ""
    ops: int = 0
    inside: int = 0
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)
    framework: int = 0
    outside: dict[str, int] = dataclasses.field(default_factory=dict)
    left: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    error: float = -1.0
    own: float = -1.0
    kernel_error: float = -1.0
    optimize_s: float = 0.0
    build_s: float = 0.0
    run_s: float = 0.0
    compiled: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)
    spills: int = 0


def measure(row: Row, limit: float, ptx: bool) -> None:
    """Fill in a row, telling every stage."""
    from graphopt.backends.triton.compiled import Compiled

    with staged(row, "building the model"):
        model, make = made(row.name)
        source = copy.deepcopy(model)
    with staged(row, "optimizing"):
        start = time.process_time()
        args, kwargs = make(2)
        fast = graphopt.optimize(model, args, kwargs, validate=False)
        row.optimize_s = round(time.process_time() - start, 1)
        if fast.report.capture.method == "regional":
            raise RuntimeError(f"not captured as a whole: {fast.report.capture.notes[:1]}")
    with staged(row, "lowering"):
        start = time.process_time()
        lowered = Compiled(fast.graph_module)
        program = lowered.program(torch.utils._pytree.tree_leaves((args, kwargs)))
        row.build_s = round(time.process_time() - start, 1)
    counted(row, program)
    row.status = "built"
    done = False
    with staged(row, "running"):
        try:
            (first, *_) = fast.graph_module.graph.find_nodes(op="placeholder")
            dynamic = not str(first.meta["type"]["shape"][0]).isdigit()
            for rows in ROWS if dynamic else (2,):
                compared(row, lowered, source, make(rows), limit)
            done = True
        except Exception as error:
            # Triton's interpreter wraps what is raised in a kernel.
            if "OverLimit" not in f"{type(error)} {error}":
                raise
            row.notes.append(f"a run takes more than {limit:.0f} s in the interpreter")
    row.notes += [*lowered.notes, *([] if dynamic else ["captured for one batch size"])]
    if done and row.status != "wrong":
        row.status = "agrees"
    if ptx or not done:
        with staged(row, "compiling to PTX"):
            compiled(row, program)


def counted(row: Row, program: Any) -> None:
    from graphopt.backends.triton.kinds import fusible

    row.ops, row.inside = program.coverage
    row.kernels = dict(Counter(one.kind for one in program.regions))
    inside = {node for region in program.regions for node in region.nodes}
    graph = program._source[1]
    known = {node.name: node for node in graph.nodes}
    row.outside = dict(Counter(program.outside.values()).most_common())
    row.left = dict(Counter(
        f"{node.target}: {program.outside.get(node.name, 'no reason')}" for node in graph.nodes
        if fusible(node) and node not in inside
    ).most_common())  # fmt: skip
    row.framework = sum(
        known[name].meta["kind"] in ("external", "product") and "getitem" not in name
        for name in program.outside if name in known
    )  # fmt: skip


class OverLimit(Exception):
    """A run takes too long."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises OverLimit after so many seconds of processor time."""

    def stop(*_: Any) -> None:
        raise OverLimit

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@torch.no_grad()
def compared(row: Row, lowered: Any, source: nn.Module, inputs: Inputs, limit: float) -> None:
    """One batch size: every kernel beside its meaning, then the outputs beside the source's."""
    args, kwargs = inputs
    same = run(source, inputs)
    truth = run(copy.deepcopy(source).double(), double(inputs))
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    start = time.process_time()
    with limited(limit):
        program = lowered.program(leaves)
        checked = Checked(program.module, row)
        outputs = [one for one in checked.run(*leaves) if isinstance(one, torch.Tensor)]
        expected = [one for one in truth if isinstance(one, torch.Tensor)]
    row.run_s = max(row.run_s, round(time.process_time() - start - checked.aside, 1))
    for a, b, c in zip(outputs, same, expected, strict=True):
        if a.shape != c.shape or a.dtype != b.dtype:
            raise AssertionError(f"found {a.dtype} {[*a.shape]}, expected {b.dtype} {[*c.shape]}")
        found, own = distance(a, c), distance(b, c)
        row.error, row.own = max(row.error, found), max(row.own, own)
        if not found <= 10 * own + 1e-5:
            row.status = "wrong"
            row.reason = f"the outputs differ by {found:.1e}, the source's own by {own:.1e}"


class Checked(fx.Interpreter):
    """Runs a program, and every kernel's region in float64 beside it."""

    def __init__(self, module: fx.GraphModule, row: Row) -> None:
        super().__init__(module)
        self.row = row
        self.aside = 0.0

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if "region" in n.meta:
            start = time.process_time()
            self._compare(n.meta["region"], self.fetch_args_kwargs_from_env(n)[0], found)
            self.aside += time.process_time() - start
        return found

    def _compare(self, region: Any, args: Any, found: Any) -> None:
        same = region.reference(*args)
        truth = region.reference(*(
            one.double() if isinstance(one, torch.Tensor) and one.is_floating_point() else one
            for one in args
        ))  # fmt: skip
        for a, b, c in zip(found, same, truth, strict=True):
            if a.shape != b.shape or a.dtype != b.dtype:
                raise AssertionError(f"kernel {region.name}: {a.dtype} {[*a.shape]}, expected "
                                     f"{b.dtype} {[*b.shape]}")  # fmt: skip
            error, own = distance(a, c), distance(b, c)
            self.row.kernel_error = max(self.row.kernel_error, error)
            if not error <= 4 * own + 64 * EPS and self.row.status != "wrong":
                self.row.status = "wrong"
                self.row.reason = f"kernel {region.name}: {error:.1e}, torch's own {own:.1e}"


def distance(found: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest difference over the largest value; infinite where nan or inf are elsewhere."""
    if not truth.numel():
        return 0.0
    a, b = found.double(), truth.double()
    scale = max(float(b.abs().nan_to_num(0.0, 0.0, 0.0).max()), 1e-3)
    away = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
    return float(away.nan_to_num(float("inf")).max()) / scale


def compiled(row: Row, program: Any) -> None:
    """Every kernel for sm_90."""
    from graphopt.backends.triton.ptx import compile_all

    units = {one.key: one for region in program.regions for one in region.units()}
    found = compile_all(units.values(), targets=(90,))
    row.compiled = len(found)
    row.failures = [f"{one.name}: {one.error}" for one in found if one.error]
    row.spills = sum(one.spills > 0 for one in found)
    if row.failures:
        row.status, row.reason = "wrong", f"not PTX: {row.failures[0]}"


# -- processes and results -----------------------------------------------------------------------


@contextmanager
def staged(row: Row, stage: str) -> Iterator[None]:
    row.stage = stage
    print(json.dumps(dataclasses.asdict(row)), flush=True)
    yield
    row.stage = ""


def child(name: str, limit: float, ptx: bool) -> None:
    import resource

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30,) * 2)
    declare_missing_ops()
    row = Row(name)
    try:
        measure(row, limit, ptx)
    except Exception as error:
        import traceback

        traceback.print_exc()
        said = (str(error).strip().splitlines() or [""])[0]
        row.status, row.reason = "error", f"{type(error).__name__}: {said}"[:300]
    print(json.dumps(dataclasses.asdict(row)), flush=True)


def in_subprocess(name: str, options: argparse.Namespace) -> Row:
    place = [sys.executable, "-m", "benchmarks.triton_sweep", "--child", name]
    place += ["--run", str(options.run), *(["--ptx"] if options.ptx else [])]
    process = subprocess.Popen(
        place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    ended = ""
    try:
        out, told = process.communicate(timeout=options.limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # what it started too
        out, told = process.communicate()
        ended = "timeout"
    lines = [one for one in out.splitlines() if one.startswith("{")]
    row = Row(**json.loads(lines[-1])) if lines else Row(name)
    if ended:
        row.status, row.reason = ended, f"{options.limit:.0f} s, at: {row.stage}"
    elif process.returncode:
        row.reason = f"the process ended with {process.returncode}"
    if row.status == "error":
        print(told[-3000:], file=sys.stderr)
    return row


def read() -> dict[str, Row]:
    if not RESULTS.exists():
        return {}
    return {one["name"]: Row(**one) for one in json.loads(RESULTS.read_text())["rows"]}


def keep(rows: dict[str, Row]) -> None:
    ordered = [rows[name] for name in names() if name in rows]
    about = {"torch": torch.__version__}
    data = {"about": about, "rows": [dataclasses.asdict(one) for one in ordered]}
    RESULTS.write_text(json.dumps(data, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(markdown(about, ordered))


def markdown(about: dict[str, Any], rows: list[Row]) -> str:
    counts = ", ".join(
        f"{n} {status}" for status, n in Counter(r.status for r in rows).most_common()
    )
    ops, inside = sum(one.ops for one in rows), sum(one.inside for one in rows)
    lines = [
        "# Architectures through the Triton backend", "",
        ", ".join(f"{key} {value}" for key, value in about.items()) + ".", "",
        "Random weights, small inputs, optimized and lowered for a batch of 2, run in the interpreter "
        f"at {' and '.join(map(str, ROWS))} rows. Ops are pointwise ops and reductions after "
        "normalization into primitives. Errors are the largest difference from float64 over the "
        "largest output: of the program, of the source in float32, and of the worst kernel against "
        "its own region. *built*: a run takes too long there; the kernels were compiled to PTX.", "",
        f"{len(rows)} models: {counts}; {inside} of {ops} ops are in kernels.", "",
        "| model | status | ops | in kernels | kernels (with a product) | framework's | error | own | "
        "kernels' | PTX | build s | run s |", "|" + " --- |" * 12, *map(_line, rows), "",
    ]  # fmt: skip
    for title, field in (("What stays outside", "outside"), ("Ops in no kernel", "left")):
        total: Counter[str] = Counter()
        for one in rows:
            total.update(getattr(one, field))
        lines += [f"## {title}", "", *(f"- {n} x {why}" for why, n in total.most_common(40)), ""]
    lines += ["## Notes", ""]
    for one in rows:
        said = [*([one.reason] if one.reason else []), *one.notes]
        lines += [f"- {one.name}: {text}" for text in dict.fromkeys(said)]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    def shown(value: float) -> str:
        return f"{value:.0e}" if value >= 0 else "-"

    kernels = f"{sum(row.kernels.values())} ({row.kernels.get('product', 0)})"
    ptx = "-" if not row.compiled else f"{row.compiled}"
    if row.failures or row.spills:
        ptx += f", {len(row.failures)} fail, {row.spills} spill"
    cells = [row.name, row.status, row.ops, row.inside, kernels, row.framework, shown(row.error),
             shown(row.own), shown(row.kernel_error), ptx, row.build_s, row.run_s]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="these models")
    parser.add_argument("--again", action="store_true", help="also what is known")
    parser.add_argument("--failed", action="store_true", help="also what did not agree")
    parser.add_argument("--ptx", action="store_true", help="compile every kernel to PTX")
    parser.add_argument("--run", type=float, default=60, help="seconds of processor time for a run")
    parser.add_argument("--limit", type=float, default=400, help="seconds for a model")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.run, options.ptx)
        return
    if unknown := set(options.only) - set(names()):
        parser.error(f"unknown models {sorted(unknown)}; expected of {', '.join(names())}")
    for name in options.only or names():
        known = read().get(name)
        if known and not options.again and (known.status == "agrees" or not options.failed):
            continue
        row = in_subprocess(name, options)
        keep({**read(), name: row})
        print(f"{name:28} {row.status:8} ops {row.inside}/{row.ops} kernels {row.kernels} error "
              f"{row.error:.0e} ({row.own:.0e}) kernel {row.kernel_error:.0e} optimize {row.optimize_s} "
              f"build {row.build_s} run {row.run_s}  {row.reason} {row.notes[:2]}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
