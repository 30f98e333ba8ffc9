"""Prove every rewrite of ours anew and keep the proofs: `python -m benchmarks.proofs`."""

from __future__ import annotations

import dataclasses
import json

from graphopt.passes.base import available
from graphopt.verify.proof.cache import SHIPPED, key
from graphopt.verify.proof.prove import prove

DEPTH = 1


def main() -> None:
    kept = {}
    for cls in available().values():
        for one in cls.all_rewrites():
            if not one.unproved and one.function.__module__.startswith("graphopt."):
                proof = prove(one, depth=DEPTH, seconds=600.0)
                print(proof)
                fields = dataclasses.asdict(proof)
                kept[key(one, DEPTH)] = {**fields, "seconds": round(proof.seconds, 1)}
    SHIPPED.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
