"""`graphopt build` killed at random moments: what is there afterwards, and whether a rerun completes.

    python -m benchmarks.faults [--kills 50] [--seed 0]

Two versions of a network are built into one place in turn. Each build runs in a process of its own, forked
from one that has torch imported, and is killed by SIGKILL: every other one at a moment that is uniform over
a whole build, the others at one that is uniform over its last part, in which files are written. After each
kill the artifact has to be the version before or the new one, byte for byte; it has to load and compute what
its version does; and the same build, run again, has to end with the new one and with nothing left over.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import graphopt
from graphopt.builds import building, lock

CONFIG = """\
model.source = "benchmarks.faults:version{version}"
build.output = "build"
build.lock = "build.lock"
inputs.input.shape = ["batch", 3, 16, 16]
"""


class Net(nn.Module):
    """Convolutions with norms, and enough weights that writing them takes a while."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 20_000)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.conv(input))).mean((2, 3)))


def version(number: int) -> nn.Module:
    torch.manual_seed(number)
    model = Net()
    with torch.no_grad():
        model.norm.running_var.uniform_(0.5, 2)
        model.norm.weight.normal_()
    return model.eval()


def version0() -> nn.Module:
    return version(0)


def version1() -> nn.Module:
    return version(1)


def contents(folder: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in folder.iterdir()}


def forked(action: Callable[[], object]) -> int:
    """The id of a child process that does something, silently."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        action()
        code = 0
    finally:
        os._exit(code)


def completed(config: Path) -> tuple[float, float]:
    """Build in a child to the end; seconds in all, and from the first written file on."""
    read, write = os.pipe()
    start = time.perf_counter()
    child = forked(lambda: building.build(config, progress=telling(write)))
    os.close(write)
    os.read(read, 1)
    storing = time.perf_counter()
    os.close(read)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"a build of {config} does not complete")
    end = time.perf_counter()
    return end - start, end - storing


def telling(pipe: int) -> Callable[[str], None]:
    """Progress that writes a byte when files begin to be written."""

    def say(what: str) -> None:
        if what.endswith(": storing"):
            os.write(pipe, b"x")

    return say


def killed(config: Path, seconds: float, from_storing: bool) -> bool:
    """Build in a child that is killed after `seconds`; whether it was still running."""
    read, write = os.pipe()
    child = forked(lambda: building.build(config, progress=telling(write)))
    os.close(write)
    if from_storing:
        os.read(read, 1)
    time.sleep(seconds)
    running = os.waitpid(child, os.WNOHANG)[0] == 0
    if running:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    os.close(read)
    return running


class Broken(AssertionError):
    """Something that is neither the version before nor the new one."""


def run(folder: Path, kills: int, seed: int = 0, every: int = 1) -> Counter[str]:
    """Kill so many builds in a folder, and rerun every so manieth; counts of what was there afterwards.

    Raises:
        Broken: at the first artifact, lock or rerun that is not whole.
    """
    torch.set_num_threads(1)
    draw = random.Random(seed)
    configs = [folder / f"version{number}.toml" for number in (0, 1)]
    for number, config in enumerate(configs):
        config.write_text(CONFIG.format(version=number))
    place = folder / "build" / "model.gopt"
    whole, expected, spent = [], [], (0.0, 0.0)
    given = torch.randn(3, 3, 16, 16)
    building.build(configs[1])  # what it imports is there for every child
    for number, config in enumerate(configs):
        spent = completed(config)
        whole.append(contents(place))
        expected.append(version(number)(given))
    if whole[0] == whole[1]:
        raise Broken("both versions are the same")
    found: Counter[str] = Counter()
    for turn in range(kills):
        new = 1 - whole.index(contents(place))
        late = turn % 4 >= 2
        if not killed(configs[new], draw.uniform(0, spent[late]), late):
            found["ended before"] += 1
        now = contents(place)
        if now not in whole:
            raise Broken(f"kill {turn}: the artifact is neither the old nor the new one")
        is_new = now == whole[new]
        found["the new artifact" if is_new else "the old artifact"] += 1
        model = graphopt.load(place)
        if not torch.allclose(model(given), expected[whole.index(now)], rtol=1e-3, atol=1e-4):
            raise Broken(f"kill {turn}: the artifact computes something else")
        lock.read(folder / "build.lock")
        if leftovers(folder):
            found["with leftovers"] += 1
        if (turn + 1) % every:
            continue
        completed(configs[new])
        if contents(place) != whole[new]:
            raise Broken(f"kill {turn}: the rerun built something else")
        if left := leftovers(folder):
            raise Broken(f"kill {turn}: the rerun left {', '.join(left)}")
    return found


def leftovers(folder: Path) -> list[str]:
    return [str(one.relative_to(folder)) for one in folder.rglob(".*")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder), options.kills, options.seed)
    print(f"{options.kills} builds killed, {time.perf_counter() - start:.0f} s: every artifact loads and is "
          "whole, every rerun completes")  # fmt: skip
    for what, count in sorted(found.items()):
        print(f"  {count:3} {what}")


if __name__ == "__main__":
    main()
