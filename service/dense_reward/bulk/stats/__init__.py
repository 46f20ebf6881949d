"""Statistics of scored files: distributions of the reward by position, length and token class, and lowest spans."""
