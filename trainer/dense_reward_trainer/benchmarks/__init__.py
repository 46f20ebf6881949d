"""Benchmarks of the field: readers of their own file formats, and their own metrics."""
