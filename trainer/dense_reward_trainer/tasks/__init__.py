"""Tasks of the studies: files to train and to test on, generated from options and a seed, or given by the user."""
