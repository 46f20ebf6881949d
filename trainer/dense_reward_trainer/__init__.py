"""Demonstrations -> checkpoints -> improved policy. Jobs exchange checkpoints and never import each other."""
