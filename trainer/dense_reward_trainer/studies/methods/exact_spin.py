"""One exact round of SPIN, against its closed form: p_{t+1} is proportional to p_t (p_data / p_t)^(1 / lambda).

The task is so small that all responses are enumerated, so the expectation of the loss over all pairs (y, y') is exact.
The policy is a table of logits. S states (the response tokens so far), V ids, of which 0 ends a response, R responses.
"""

from itertools import product

import torch
from torch import Tensor

from dense_reward_trainer.selfplay.losses import pair_losses

VOCABULARY, HORIZON = 3, 3
LAMBDAS = (0.5, 1.0, 2.0)
_ITERATIONS, _TOLERANCE = 2000, 1e-12


def spin_round_error(seed: int = 0) -> float:
    """The largest error of a response's probability after one round, for any of the values of lambda (theorem 5.4)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        data_SV, start_SV = (torch.randn(len(states()), VOCABULARY, dtype=torch.float64) for _ in range(2))
    data_R, start_R = response_logprobs(data_SV), response_logprobs(start_SV)
    errors = []
    for lam in LAMBDAS:
        expected_R = torch.softmax(start_R + (data_R - start_R) / lam, dim=0)
        errors.append(float((spin_round(start_SV, data_R, lam).exp() - expected_R).abs().max()))
    return max(errors)


def spin_round(start_SV: Tensor, data_R: Tensor, lam: float) -> Tensor:
    """log p_{t+1} of every response, [R]: the table that minimises the expected loss, found by L-BFGS."""
    start_R = response_logprobs(start_SV)
    weight_RR = (data_R[:, None] + start_R[None, :]).exp()
    table_SV = start_SV.clone().requires_grad_(True)
    optimiser = torch.optim.LBFGS(
        [table_SV],
        max_iter=_ITERATIONS,
        tolerance_grad=_TOLERANCE,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def expected_loss() -> Tensor:
        optimiser.zero_grad()
        ratio_R = response_logprobs(table_SV) - start_R
        loss = (weight_RR * pair_losses("sigmoid", ratio_R[:, None], ratio_R[None, :], lam)).sum()
        torch.autograd.backward(loss)
        return loss

    optimiser.step(expected_loss)  # type: ignore[no-untyped-call]
    return response_logprobs(table_SV).detach()


def response_logprobs(table_SV: Tensor) -> Tensor:
    """log p of every response, [R]: it ends with id 0, or is cut off after HORIZON tokens."""
    logprob_SV = torch.log_softmax(table_SV, dim=1)
    index = {state: i for i, state in enumerate(states())}
    responses = [(*state, 0) for state in index] + list(product(range(1, VOCABULARY), repeat=HORIZON))
    rows = [[logprob_SV[index[ids[:t]], token] for t, token in enumerate(ids)] for ids in responses]
    return torch.stack([torch.stack(row).sum() for row in rows])


def states() -> list[tuple[int, ...]]:
    """The tokens so far, shorter ones first."""
    return [state for length in range(HORIZON) for state in product(range(1, VOCABULARY), repeat=length)]
