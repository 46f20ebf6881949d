"""Demonstrations: sources, splits, generators, corruption, tokenised rows."""
