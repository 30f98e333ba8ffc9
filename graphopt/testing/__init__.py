"""What graphopt's own tests use and yours can.

    from graphopt.testing import check, prove, strategies

    assert prove(my_rewrite).proved  # for all shapes and values
    check(my_rewrite)  # the implementation, on graphs made from its own requirements


    @given(strategies.graphs())
    def test_my_pass(network): ...

`check` and `strategies` need hypothesis; everything is imported only when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.testing import strategies as strategies
    from graphopt.testing.checking import Counterexample as Counterexample, check as check
    from graphopt.verify.proof import Proof as Proof, prove as prove

_HOMES = {
    "Counterexample": "graphopt.testing.checking",
    "Proof": "graphopt.verify.proof",
    "check": "graphopt.testing.checking",
    "prove": "graphopt.verify.proof",
}
__all__ = ["Counterexample", "Proof", "check", "prove", "strategies"]


def __getattr__(name: str) -> Any:
    if name == "strategies":
        return importlib.import_module("graphopt.testing.strategies")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
