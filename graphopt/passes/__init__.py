"""Passes, one file each. They know `graphopt.ir` and nothing above it."""

if __name__ != "graphopt.passes":
    raise ImportError("import graphopt.passes, not " + __name__)
