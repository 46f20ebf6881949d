"""What computes: the only place of the service that may import torch, transformers or vllm."""
