"""Is the reward any good: planted errors, right and wrong answers, calibration."""
