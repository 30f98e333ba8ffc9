"""Recurrences: loops over time that were unrolled, found again; a step as text; the operator that
repeats it."""
