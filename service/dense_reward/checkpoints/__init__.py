"""Checkpoints on disk: manifests written, hub ids and folders adopted, probes."""
