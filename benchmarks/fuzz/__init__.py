"""Random models through the whole pipelines: is what comes out right?

    python -m benchmarks.fuzz --models 1000 --seed 0

Every model of `graphopt.testing.strategies.graphs()` is optimized in mode deploy or tune, and its
result compared with it in float64. None of the checks trusts the report or shares code with
graphopt's own:

- outputs: structure, dtypes, values; relative error <= 1e-9, or what the source itself answers to a
  change of its inputs and weights by 1e-15 (relative). Models that round to float32: 1e-5;
- what a call does besides: writes to inputs and buffers as the source's; outputs share memory with
  nothing that the source's do not share it with;
- again on fresh inputs of another batch size, wherever an axis is dynamic;
- tune: the gradients of a random functional, of all parameters and inputs;
- the source is as it was: values, modes, inputs.

A wrong model is shrunk by hypothesis to a minimal one, which is printed. Sites that were rolled
back are no wrong results, but findings: a rewrite was wrong there, or the check is too strict.
"""
