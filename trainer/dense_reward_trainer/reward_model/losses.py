"""The two losses of a scalar head on every token. Pure tensors; must not know models or text.

B pairs of a demonstration and an answer, padded on the right to T tokens each. r_t is the head's value after token t.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True, eq=False)
class HeadValues:
    """The values after each token of B responses, [B, T] float32, and their lengths, [B], at least 1."""

    values_BT: Tensor
    length_B: Tensor

    @property
    def last_B(self) -> Tensor:  # noqa: N802 - names carry shapes
        """The value after the last token, [B]."""
        return self.values_BT.gather(1, self.length_B[:, None] - 1)[:, 0]

    def extended(self, width: int) -> Tensor:
        """[B, width]: the values, and after the end of a response its last value."""
        position_T = torch.arange(width, device=self.values_BT.device)
        return self.values_BT.gather(1, position_T[None].minimum(self.length_B[:, None] - 1))


def aligned_loss(demonstration: HeadValues, answer: HeadValues, first_B: Tensor) -> Tensor:
    """Position-aligned Bradley-Terry: -log sigmoid(r_demo - r_answer), mean over positions, then over pairs.

    The loss of the authors' code of arXiv 2405.17888. Position t of one response is compared with position t of the
    other, from the first one where they differ (`first_B`, below the longer length) to the end of the longer response.
    After the end of the shorter one stands its last value: it has been judged. (The authors read the head on padding
    tokens there.)
    """
    width = int(torch.maximum(demonstration.length_B, answer.length_B).max())
    margin_BT = demonstration.extended(width) - answer.extended(width)
    position_T = torch.arange(width, device=margin_BT.device)
    end_B = torch.maximum(demonstration.length_B, answer.length_B)
    compared_BT = (position_T >= first_B[:, None]) & (position_T < end_B[:, None])
    loss_BT = functional.softplus(-margin_BT) * compared_BT
    return (loss_BT.sum(1) / compared_BT.sum(1)).mean()


def terminal_loss(demonstration: HeadValues, answer: HeadValues) -> Tensor:
    """Bradley-Terry on whole responses: the mean over pairs of -log sigmoid(r_demo - r_answer) after the last tokens.

    The loss of the successor's code (arXiv 2503.13538), and of TRL's RewardTrainer.
    """
    return functional.softplus(answer.last_B - demonstration.last_B).mean()
