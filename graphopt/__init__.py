"""graphopt: the optimizing compiler for trained PyTorch models.

fast = graphopt.optimize(model, (x,))

The public names are those of `graphopt.face`. They are imported with the first use of one of them: torch
takes seconds to load, and neither `graphopt --help` nor the completion of a shell needs it.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.face import *  # noqa: F403

__version__ = "0.1.0"


class _Package(ModuleType):
    """Functions win over submodules of the same name, such as `graphopt.optimize`, whichever came first:
    the import system's binding of a submodule is left out, and names are looked up in the face first."""

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(value, "__name__", "") != f"{self.__name__}.{name}":
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            face = importlib.import_module(f"{self.__name__}.face")
            for among, key in ((vars(face), name), (sys.modules, f"{self.__name__}.{name}")):
                if key in among:
                    return among[key]
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        face = importlib.import_module(f"{self.__name__}.face")
        return sorted({*super().__dir__(), *(name for name in vars(face) if name[0] != "_")})


sys.modules[__name__].__class__ = _Package
