"""Self-play on demonstrations: rounds in which a model learns to prefer them to its own answers."""
