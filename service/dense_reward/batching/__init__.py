"""From requests to batches: admission, order, deduplication, packing, and the loop that runs the batches."""
