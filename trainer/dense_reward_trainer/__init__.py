"""Demonstrations -> checkpoints -> improved policy. Jobs meet through checkpoints on disk and never import each other."""
