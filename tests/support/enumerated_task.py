"""Every response over three ids of at most three tokens, and tables of log-probs over the states, in float64.

The policy is a table of logits, one row per state, so that every expectation is a finite sum.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

VOCABULARY, HORIZON, END = 3, 3, 0
Response = tuple[int, ...]


def every_response() -> list[Response]:
    """The responses that end with END, and those that are cut off at the horizon."""
    bodies = [body for length in range(HORIZON) for body in product(range(1, VOCABULARY), repeat=length)]
    return [*((*body, END) for body in bodies), *product(range(1, VOCABULARY), repeat=HORIZON)]


RESPONSES = every_response()
STATES = sorted({response[:t] for response in RESPONSES for t in range(len(response))})
STATE_INDEX = {state: index for index, state in enumerate(STATES)}
LENGTHS = [len(response) for response in RESPONSES]


def gathered(table_SV: Tensor) -> Tensor:
    """A value per state and action, gathered along every response, [B, T]."""
    rows = [torch.stack([table_SV[STATE_INDEX[r[:t]], r[t]] for t in range(len(r))]) for r in RESPONSES]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def along(value_S: Tensor) -> Tensor:
    """A value per state, gathered along every response, [B, T]."""
    return gathered(value_S[:, None].expand(-1, VOCABULARY))


def random_logprobs(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(1.5 * torch.randn(len(STATES), VOCABULARY, generator=generator, dtype=torch.float64), -1)


@dataclass(frozen=True, slots=True)
class World:
    """Tables of the SFT model, the reference and the policy; gradients are with respect to the policy's logits."""

    sft_SV: Tensor
    reference_SV: Tensor
    logits_SV: Tensor

    @property
    def policy_SV(self) -> Tensor:
        return torch.log_softmax(self.logits_SV, -1)

    @property
    def reward_SV(self) -> Tensor:
        return self.sft_SV - self.reference_SV

    @property
    def kl_S(self) -> Tensor:
        """KL(pi_sft || pi_ref) at every state."""
        return (self.sft_SV.exp() * self.reward_SV).sum(-1)

    def probability_B(self) -> Tensor:
        """The probability of every response under the policy; differentiable."""
        return gathered(self.policy_SV).sum(-1).exp()


def gradient(objective: Tensor, world: World) -> Tensor:
    return torch.autograd.grad(objective, world.logits_SV)[0]


def exact(world: World, reward_SV: Tensor, coefficient: float = 0.0) -> Tensor:
    """Gradient of E[sum r] - b KL(pi || pi_sft), by autograd through the exact expectation."""
    kl_B = gathered(world.policy_SV - world.sft_SV).sum(-1)
    return gradient((world.probability_B() * (gathered(reward_SV).sum(-1) - coefficient * kl_B)).sum(), world)


def a_world() -> World:
    return World(random_logprobs(1), random_logprobs(2), random_logprobs(3).requires_grad_())


def assert_same(gradient_SV: Tensor, expected_SV: Tensor) -> None:
    assert expected_SV.abs().max() > 1e-3
    torch.testing.assert_close(gradient_SV, expected_SV, rtol=0, atol=1e-12)
