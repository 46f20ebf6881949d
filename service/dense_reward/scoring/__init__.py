"""Scores one request: checks and encodes its items, computes or reuses scores, and builds the rows of the answer."""
