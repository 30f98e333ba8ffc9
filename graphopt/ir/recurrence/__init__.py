"""Recurrences: loops over time that were unrolled, found again; a step as text; the operator that
repeats it."""

import graphopt.ir.ops  # noqa: F401  # the op of a scan reads steps, which are written in ops: it comes first
