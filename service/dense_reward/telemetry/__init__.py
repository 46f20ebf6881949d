"""What operators see: metrics, logs, traces, and the memory of the process."""
