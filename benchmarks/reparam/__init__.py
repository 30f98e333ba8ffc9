"""Models that train with branches: what is left of them, and how fast.

    python -m benchmarks.reparam --no-latency             # ops and errors, minutes
    python -m benchmarks.reparam --backend inductor       # and latency, an hour

Every model is traced in its training form, with random norms, and optimized with no call to a method
of its own. "published" is its own deploy form (timm's `reparameterize_model`, or the one convolution
of a block's paper), reduced to what it computes by `canonicalize` alone. Latencies are medians of
interleaved runs, the same backend for all; ratios below 1 mean that ours is faster.
"""
