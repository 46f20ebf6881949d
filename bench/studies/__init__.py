"""The studies behind docs/results.md and docs/methods.md: their key figures, and their tables."""
