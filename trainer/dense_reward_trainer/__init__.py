"""Demonstrations -> checkpoints -> improved policy. Jobs meet through checkpoints and never import each other."""
