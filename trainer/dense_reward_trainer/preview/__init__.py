"""Would training on the reward help? What labelled answers say before any training."""
