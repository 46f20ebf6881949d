"""Compares options of DPR on a task whose optimum is known exactly."""
