"""The mutation table: are wrong rewrites caught, and by which judge?

    python -m benchmarks.mutants --seed 0 --per-rewrite 5 --workers 2

Every shipped rewrite is made wrong in several ways: its source, and that of the laws it reaches, is
changed at one place (a requirement dropped or negated, an operator, a constant, a field, an operand
or a case exchanged or dropped), and compiled in a copy of its module. Three judges see each mutant
alone, in place of the original:

- proof: `prove` finds a pattern whose two sides differ, or on which it raises;
- property: `check` finds a counterexample;
- site: `optimize` rolls it back on one of a few fixed networks.

"dead" is a mutant that never applies any more where the original does. Kinds of change that cannot
change a meaning are not generated: reasons, `describe`, `like=`, assertions, and `only_user`
(without it a value is computed twice). A mutant that no judge caught is listed, with the argument
why it is equivalent if there is one (`EQUIVALENT`), else as a survivor; the program then exits with 1.
"""
