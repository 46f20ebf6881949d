"""What the service keeps under load, signals, faults and malice: `python -m bench.reliability`."""
