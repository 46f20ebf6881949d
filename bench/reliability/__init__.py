"""Reliability of the service under load, signals, kills and bad clients: `python -m bench.reliability`."""
