"""What the rewrites that a report names say of themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

Prover = Callable[[Collection[str]], Collection[str]]


@dataclasses.dataclass(frozen=True)
class Law:
    """The docstring of a rewrite (or of a pass that is none), with its formula; `unproved` has the
    reason why there is no proof of it for all inputs, if its author gives one."""

    text: str
    unproved: str = ""


_provers: list[Prover] = []


def ask(prover: Prover) -> None:
    """Let `proved` ask this function; the report itself knows no rewrites, and no proofs of them."""
    _provers.append(prover)


def proved(names: Collection[str]) -> set[str]:
    """Those of the rewrites of these names that are known to be proved for all inputs."""
    return {name for prover in _provers for name in prover(names)}
