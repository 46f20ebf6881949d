"""What computes log-probs. `records.Engine` is the protocol."""
