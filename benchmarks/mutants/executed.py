"""What a rewrite runs: only changes there are changes of the rewrite."""

from __future__ import annotations

import functools
import importlib
import sys
from types import FrameType
from typing import Any
from unittest import mock

import torch

import graphopt
from benchmarks.mutants.mutate import LAW_METHODS, LAWS
from benchmarks.mutants.networks import networks
from graphopt.ir.rewrite import Rewrite
from graphopt.passes.base import available

Lines = dict[str, set[int]]


def rewrites() -> dict[str, str]:
    """The module of every shipped rewrite, by the name of its function."""
    shipped = [one for cls in available().values() for one in cls.all_rewrites()]
    return {one.function.__name__: one.function.__module__ for one in shipped}


@functools.lru_cache
def executed(name: str) -> Lines:
    """The lines that a rewrite runs on its networks, by module: its own, and those of the laws."""
    home = rewrites()[name]
    modules = (home, *LAWS, *(module for module, _ in LAW_METHODS))
    files = {importlib.import_module(one).__file__: one for one in modules}
    found: Lines = {one: set() for one in modules}

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        found[files[frame.f_code.co_filename]].add(frame.f_lineno)
        return line

    def call(frame: FrameType, event: str, argument: Any) -> Any:
        return line if frame.f_code.co_filename in files else None

    def traced(one: Rewrite, op: Any, rw: Any) -> Any:
        sys.settrace(call)
        try:
            return one.function(op, rw)
        finally:
            sys.settrace(None)

    one = vars(importlib.import_module(home))[name]
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    with mock.patch.object(Rewrite, "__call__", traced):
        for model in networks(name):
            graphopt.optimize(model, (x,), passes=[one], validate=False)
    return found
