"""Optimize every model of a zoo and check each against its source in float64.

    python -m benchmarks.zoo torchvision|timm|transformers

Models have random weights, batch norms that no rewrite gets right by luck, and nothing left at a
constant initial value that could hide an error. The checks share no code with graphopt's own:

- meaning: the model in float64 against its optimized self, relative error <= 1e-10;
- numerics: float32 error against the float64 truth, optimized <= 2x source;
- both again on fresh inputs of batch size 3;
- every batch norm still there has a refusal with a reason.
"""
