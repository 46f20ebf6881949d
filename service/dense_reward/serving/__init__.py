"""What is served: the pairs of a running service, where they come from, how they come and go."""
