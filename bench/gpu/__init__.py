"""An hour with a GPU: correctness and speed of the engine, stage by stage."""
