"""Rewriting cost against graph size: a chain of N conv-bn-relu blocks.

    python -m benchmarks.scaling

Prints, per N, seconds of capture, of the passes and of validation, and the passes' milliseconds per
block. The passes must be linear: from N = 100 to 1000 the time per block grows by less than 1.5x.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import torch
from torch import nn

import graphopt

SIZES = (10, 100, 1000)
ROUNDS = 3


def chain(blocks: int) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(blocks):
        conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        nn.init.dirac_(conv.weight)  # near the identity: the signal survives a thousand layers
        conv.weight.data += 0.01 * torch.randn_like(conv.weight)
        layers += [conv, nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*layers).eval()


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(1, 4, 8, 8)
    graphopt.optimize(chain(3), (x,))  # warm-up
    samples: dict[int, list[tuple[float, float, float]]] = {size: [] for size in SIZES}
    for _ in range(ROUNDS):
        for size in SIZES:
            report = graphopt.optimize(chain(size), (x,)).report
            assert report.after is not None
            assert report.after.batch_norms == 0
            passes = sum(seconds for _, seconds in report.passes)
            samples[size].append((report.capture.seconds, passes, report.validation_seconds))
    rows = []
    for size in SIZES:
        capture, passes, validation = (
            statistics.median(one) for one in zip(*samples[size], strict=True)
        )
        rows.append({"blocks": size, "capture s": round(capture, 2), "passes s": round(passes, 3),
                     "validation s": round(validation, 2),
                     "passes ms per block": round(1e3 * passes / size, 3)})  # fmt: skip
        print(rows[-1], flush=True)
    ratio = rows[2]["passes ms per block"] / rows[1]["passes ms per block"]
    print(f"time per block, N = 1000 over N = 100: {ratio:.2f} (must be below 1.5)")
    result = {"torch": torch.__version__, "threads": 1, "rounds": ROUNDS, "rows": rows,
              "growth 100 to 1000": round(ratio, 2)}  # fmt: skip
    path = Path(__file__).parent / "results" / "scaling.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
