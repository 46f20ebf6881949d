"""Correctness and speed of the engine on a GPU, stage by stage."""
