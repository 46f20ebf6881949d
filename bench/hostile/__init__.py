"""Attacks by a single caller, signal or file on a real service: `python -m bench.hostile`."""
