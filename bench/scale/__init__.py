"""The service on several machines, in simulated time: `python -m bench.scale`."""
