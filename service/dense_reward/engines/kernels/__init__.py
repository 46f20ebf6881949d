"""What a GPU runs: attention, fused layers, sums over the vocabulary, recorded graphs. Knows tensors, but no model."""
