"""Bulk scoring: the rows of a file or data set -> a file with their rewards, and statistics of such files."""
