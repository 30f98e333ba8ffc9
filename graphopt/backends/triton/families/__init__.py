"""Families of kernels that no general generator finds: recurrences, gathered products, and attention
whose order of products is a choice. Each file holds one: the formula, its kernel, and what in a graph
is matched."""
