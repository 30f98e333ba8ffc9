"""Deployment builds: `graphopt build graphopt.toml`; see docs/build.md."""
