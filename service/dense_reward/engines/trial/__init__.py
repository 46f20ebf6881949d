"""What a checkpoint makes a library compute without a bound is tried in another process first, with limits."""
