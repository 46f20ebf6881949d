"""Engines: they compute log-probs. `records.Engine` is their protocol."""
