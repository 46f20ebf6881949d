"""The signals by which one of several samples is chosen: those of a served pair. Must not know jobs."""

from collections.abc import Collection, Mapping, Sequence

from dense_reward.records import FloatArray

from dense_reward_trainer.configs.signals import TokenSignal
from dense_reward_trainer.credit.signals import offered, request_for, token_signals
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.rl.records import Rollout
from dense_reward_trainer.rl.reward_service import PinnedPair, requests

SampleSignals = Mapping[TokenSignal, Sequence[FloatArray]]
"""Signal -> for each sample, the signal of its tokens, [T]."""


def check_offered(pair: PinnedPair, names: Collection[TokenSignal]) -> None:
    """Raises ConfigError if the engine of the pair cannot compute one of the signals."""
    given = offered(pair.card)
    for name in names:
        if name not in given:
            raise ConfigError(
                f"the service cannot compute {name} for the pair {pair.card.name}: choose by one of "
                f"{', '.join(given)}, or serve the pair with --engine torch"
            )


def sample_signals(pair: PinnedPair, rollouts: Sequence[Rollout], names: Collection[TokenSignal]) -> SampleSignals:
    """Each signal of every sample, in their order; one pass over the samples for all signals.

    Raises JobError if the pair cannot score.
    """
    request = request_for(names)
    found: dict[TokenSignal, list[FloatArray]] = {name: [] for name in names}
    for items in requests(rollouts, pair.request_tokens):
        for scored in pair.score(items, request.include, request.top_k).results:
            for name, values_T in token_signals(scored, names).items():
                found[name].append(values_T)
    return found
