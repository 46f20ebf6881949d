"""Dense-Path REINFORCE (DPR): policy, sampling, rewards, advantages, losses, the learner."""
