"""Compiles kernels to PTX and machine code without a GPU, and tells what they use.

    python -m graphopt.backends.triton.ptx < units.json

Triton decides when it is imported whether kernels are interpreted; so this runs in a process of its
own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TARGETS = (80, 90)


@dataclasses.dataclass(frozen=True)
class Unit:
    """A kernel with the types of its arguments ("*fp32", "i32") and its blocks."""

    name: str
    source: str
    types: dict[str, str]
    blocks: dict[str, int]
    warps: int = 4

    @property
    def key(self) -> str:
        text = json.dumps([self.source, self.types, self.blocks, self.warps], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a compiled kernel uses: registers and bytes of spilled ones per thread, bytes of shared
    memory; or the first line of the error that stopped it."""

    name: str
    target: int
    registers: int = 0
    spills: int = 0
    shared: int = 0
    ptx_lines: int = 0
    error: str = ""


def compile_all(units: Iterable[Unit], targets: Iterable[int] = TARGETS) -> list[Usage]:
    """Every unit for every target, in one child process.

    Raises:
        RuntimeError: if the process itself fails.
    """
    work = {"units": [dataclasses.asdict(one) for one in units], "targets": list(targets)}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps(work), capture_output=True, text=True,
        env=environment, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"compiling to PTX failed: {done.stderr.strip()[-2000:]}")
    return [Usage(**one) for one in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    work = json.loads(sys.stdin.read())
    found = [
        dataclasses.asdict(_usage(Unit(**unit), target))
        for unit in work["units"] for target in work["targets"]
    ]  # fmt: skip
    print(json.dumps(found))


def _usage(unit: Unit, target: int) -> Usage:
    try:
        compiled = compile_one(unit, target)
    except Exception as error:  # of any kind: it is reported
        text = (str(error).strip().splitlines() or [""])[-1]
        return Usage(unit.name, target, error=f"{type(error).__name__}: {text}"[:500])
    registers, spills = _registers(compiled.asm["cubin"])
    return Usage(
        unit.name, target, registers, spills, compiled.metadata.shared,
        len(compiled.asm["ptx"].splitlines()),
    )  # fmt: skip


def compile_one(unit: Unit, target: int) -> Any:
    """The compiled kernel; `.asm` has "ptx" and "cubin"."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from graphopt.backends.triton.runtime import checks, load

    source = ASTSource(
        fn=load(unit.source, unit.name),
        signature={**unit.types, **dict.fromkeys(unit.blocks, "constexpr")},
        constexprs=unit.blocks,
    )
    return triton.compile(
        source, target=GPUTarget("cuda", target, 32),
        options={"num_warps": unit.warps, **checks(unit.source)},
    )  # fmt: skip


def _registers(cubin: bytes) -> tuple[int, int]:
    """(registers, spilled bytes) per thread, as cuobjdump reads them."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers = re.search(r"REG:(\d+)", told)
    stack = re.search(r"STACK:(\d+)", told)
    return int(registers[1]) if registers else 0, int(stack[1]) if stack else 0


_TYPES = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "bool": "i1",
          "uint8": "u8", "int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64"}  # fmt: skip


def pointer(dtype: Any) -> str:
    """Triton's type of a pointer to elements of a torch dtype."""
    return "*" + _TYPES[str(dtype).removeprefix("torch.")]


if __name__ == "__main__":
    main()
