"""Explicit reward models: a scalar head on every token, computed with torch in this process."""
