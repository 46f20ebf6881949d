"""Checkpoints on disk: writes manifests, adopts folders and hub ids, measures probes."""
