"""Policies that need no training, the controls of every table: how they are loaded, and how one sample is chosen."""
