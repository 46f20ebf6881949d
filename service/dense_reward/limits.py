"""Limits of a request that several rooms share. Imports nothing, because help texts name them."""

MAX_ITEMS = 65_536
"""Items in one request, also if a setting allows more."""
