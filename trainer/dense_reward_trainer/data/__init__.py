"""Demonstrations: sources, splits, generators, corruption, tokenised examples."""
