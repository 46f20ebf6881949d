"""Finished runs as one page for a paper's appendix or a colleague."""
