"""Is the reward any good? Planted errors, right against wrong answers, calibration."""
