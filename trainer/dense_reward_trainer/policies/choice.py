"""Which of several samples to a prompt is the answer. Pure functions; must not import models or tokenizers."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def by_majority(answers: Sequence[str | None]) -> int:
    """The index of the first sample with the most frequent answer; None does not vote.

    Of equally frequent answers the one whose votes are complete first wins. Without any vote, the first sample.
    """
    votes: Counter[str] = Counter()
    winner, most = None, 0
    for answer in answers:
        if answer is not None:
            votes[answer] += 1
            if votes[answer] > most:
                winner, most = answer, votes[answer]
    return 0 if winner is None else answers.index(winner)


def by_power(logprobs_G: NDArray[np.float64], power: float, random: np.random.Generator) -> int:
    """The index of one of G samples from pi, drawn with probability proportional to pi(y)^(power - 1).

    `logprobs_G`: log pi(y) of the samples, in nats. Sampling-importance-resampling: for many samples the result is
    distributed as pi^power. From few it is nearer to pi, and never likelier than the likeliest sample.
    """
    with np.errstate(over="ignore"):  # a weight of -inf is right for a high power, and nan never occurs
        weights_G = (power - 1) * (logprobs_G - logprobs_G.max())
    weights_G = np.exp(weights_G - weights_G.max())
    return int(random.choice(len(logprobs_G), p=weights_G / weights_G.sum()))


def by_score(scores: Sequence[float], finished: Sequence[bool]) -> int:
    """The index of the finished sample with the highest score, of all samples if none is finished; the first of equals.

    Raises ValueError for scores of another number than samples, or one that is not finite.
    """
    if len(scores) != len(finished) or not np.isfinite(scores).all():
        raise ValueError(f"{len(finished)} samples need as many finite scores, but these are {list(scores)}")
    eligible = [index for index, ended in enumerate(finished) if ended] or range(len(scores))
    return max(eligible, key=lambda index: scores[index])
