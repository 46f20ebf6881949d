"""Simulates the service on several machines: `python -m bench.scale`."""
