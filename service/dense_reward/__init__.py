"""dense-reward: the reward of every token, from two checkpoints of one supervised fine-tuning run.

Importing this package imports the client alone. The service is `dense_reward.app`, its device code lies in `engine`.
"""
