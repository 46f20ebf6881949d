"""Public chat templates, and what the service does with each: `python -m bench.templates`."""
