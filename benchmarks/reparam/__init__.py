"""Models that train with branches: what is left of them, and how fast.

    python -m benchmarks.reparam --no-latency             # ops and errors, minutes
    python -m benchmarks.reparam                          # and latency, hours on two cores
    python -m benchmarks.reparam --model repvgg_a0        # one row again

Every model is traced in its training form, with random norms, and optimized with no call to a method
of its own. "published" is the deploy form of its authors (`models.py`), reduced to what it computes
at run time. Ours, the training form and the published form are compiled by the same backend.
"""
