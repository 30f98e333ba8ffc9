"""Many models, and models that are larger than memory; see docs/fleet.md."""
