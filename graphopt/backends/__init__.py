"""Backends: from a rewritten graph to something that runs. Imported on use."""

if __name__ != "graphopt.backends":
    raise ImportError("import graphopt.backends, not " + __name__)
