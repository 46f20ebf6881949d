"""Dense-Path REINFORCE: policy, sampling, rewards, advantages, losses, the learner."""
