"""The intermediate representation: capture, graph, op views, rewriting.

Knows nothing of passes, backends or the command line.
"""

if __name__ != "graphopt.ir":
    raise ImportError("import graphopt.ir, not " + __name__)
