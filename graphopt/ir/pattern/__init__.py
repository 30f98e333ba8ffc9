"""A pattern and a replacement, both plain PyTorch functions, as a rewrite."""

from graphopt.ir.pattern.pair import rewrite_from as rewrite_from
