"""GPU code: attention, fused layers, sums over the vocabulary and CUDA graphs. Works on tensors, imports no model."""
