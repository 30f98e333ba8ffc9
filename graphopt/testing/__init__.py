"""What graphopt's own tests use and yours can: generators of networks.

    from hypothesis import given
    from graphopt.testing import strategies

    @given(strategies.networks())
    def test_my_rewrite(network):
        fast = graphopt.optimize(network.module, network.inputs, passes=[my_rewrite])
        ...

`strategies` needs hypothesis, which is imported only when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.testing import strategies as strategies

__all__ = ["strategies"]


def __getattr__(name: str) -> Any:
    if name == "strategies":
        return importlib.import_module("graphopt.testing.strategies")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
