"""Speed of the service against transformers, vLLM and the matmul peak: `python -m bench.speed cpu`."""
