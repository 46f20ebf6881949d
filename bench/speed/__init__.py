"""How fast the service is, beside transformers and vLLM and beside the matmul peak: `python -m bench.speed cpu`."""
