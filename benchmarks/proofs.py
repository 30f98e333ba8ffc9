"""Prove every rewrite of ours anew and keep the proofs: `python -m benchmarks.proofs`."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing

from graphopt.ir.rewrite import Rewrite
from graphopt.passes.base import available
from graphopt.verify.proof.cache import SHIPPED, key
from graphopt.verify.proof.prove import Proof, prove

DEPTH = 1


def proved(name: str) -> Proof:
    return prove(rewrites()[name], depth=DEPTH, seconds=600.0)


def rewrites() -> dict[str, Rewrite]:
    """Our rewrites that are to be proved, by name."""
    every = [one for cls in available().values() for one in cls.all_rewrites()]
    return {
        one.name: one for one in every
        if not one.unproved and one.function.__module__.startswith("graphopt.")
    }  # fmt: skip


def main() -> None:
    kept = {}
    ours = rewrites()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(mp_context=context) as pool:
        for proof in pool.map(proved, ours):
            print(proof)
            fields = dataclasses.asdict(proof)
            kept[key(ours[proof.rewrite], DEPTH)] = {**fields, "seconds": round(proof.seconds, 1)}
    SHIPPED.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
