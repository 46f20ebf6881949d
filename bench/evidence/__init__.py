"""When training on the token reward helps and when it hurts: the study behind docs/results.md, and its tables."""
