"""Spiking networks: what is folded, whether spikes stay what they are, and what that is worth."""
