"""A running service: its state, its pairs by name, where they come from and how they are loaded."""
