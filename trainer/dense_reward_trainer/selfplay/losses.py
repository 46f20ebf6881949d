"""The losses of self-play on log-ratios, as formulas. TRL's trainer computes them; a test proves that it does.

For a pair (y, y'), a demonstration and a generated answer to one prompt: D = log pi(y) - log pi_old(y), summed over the
tokens of the response, and D' the same of y'. Pure; B pairs.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dense_reward_trainer.configs.irft import LossName


def pair_losses(
    loss: LossName, demonstration_B: Tensor, generated_B: Tensor, beta: float, bernoulli_b: float = 0.0
) -> Tensor:
    """The loss of each pair, [B], from the log-ratios D and D', [B] in nats.

    sigmoid (SPIN, arXiv 2401.01335 eq. 4.7; IRFT, 2405.17888): -log sigma(beta (D - D')). bernoulli (GSIL):
    -log sigma(beta D + b) - log sigma(-(beta D' + b)).
    """
    if loss == "sigmoid":
        return -logsigmoid(beta * (demonstration_B - generated_B))
    return -logsigmoid(beta * demonstration_B + bernoulli_b) - logsigmoid(-(beta * generated_B + bernoulli_b))


def loss_at_start(loss: LossName, bernoulli_b: float = 0.0) -> float:
    """The loss if the model is its own reference: log 2 for sigmoid, 2 log 2 for bernoulli with b = 0."""
    zero_1 = torch.zeros(1, dtype=torch.float64)
    return float(pair_losses(loss, zero_1, zero_1, 1.0, bernoulli_b))
