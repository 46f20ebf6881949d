"""Parts of the SFT job: initial model, length-grouped batches, callbacks, milestones."""
