"""The files that a run writes, and the processes that it starts."""
