"""Adapters of PEFT: is what we merge right, and PEFT's own merge; how long does a merge take.

    python -m benchmarks.adapters                       # every method on every kind of layer
    python -m benchmarks.adapters --method DoRA         # one method again
    python -m benchmarks.adapters.llama                 # merge times and latencies on a Llama of 27M

Every adapter is perturbed, and compared with the unmerged model in float64 and float32. "bf16" is the
error of a merged bfloat16 weight over the smallest one there is, that of the exact weight rounded once.
"""
