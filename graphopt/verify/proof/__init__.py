"""Proofs of rewrites in index notation. See `graphopt.verify.proof.prove`."""

from graphopt.verify.proof.cache import proof_of as proof_of
from graphopt.verify.proof.prove import Proof as Proof, prove as prove
