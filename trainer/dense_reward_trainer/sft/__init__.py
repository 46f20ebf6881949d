"""Parts of the SFT job: the initial model, batches by length, milestones."""
