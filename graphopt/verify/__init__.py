"""Checking that rewrites keep their contracts, on the very model, in float64."""

from graphopt.verify.model import ModelCheck as ModelCheck, check_model as check_model
from graphopt.verify.site import SiteValidator as SiteValidator
