"""Measurements: of the reward (credit.py) and of the speed (speed/)."""
