"""Batch norms whose statistics follow the data that a model meets."""

from graphopt.adaptation.adapting import adapt_norm as adapt_norm
from graphopt.adaptation.sites import AdaptError as AdaptError, AdaptReport as AdaptReport
