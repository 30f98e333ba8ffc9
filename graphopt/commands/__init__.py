"""The commands of `graphopt`, one file each; `graphopt.cli` puts them together.

Nothing here imports torch at the top: help and completion have to be there at once.
"""
