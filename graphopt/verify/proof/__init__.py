"""Proofs of rewrites in index notation. See `graphopt.verify.proof.prove`."""

from graphopt.verify.proof.prove import Proof as Proof, prove as prove
