"""Requests to batches: admission, order, deduplication, packing, the loop that runs them."""
