"""The references of one SFT model that a service has, also its token heads, and the signals of answers under them.

A column is one signal of a table: `sft_logprob`, or for a signal that needs a reference `reward:early`, where `early`
is the name of the pair. Signals of the SFT model alone are requested once, of the first pair. A token head has a reward
only, the column `reward:NAME`.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from dense_reward import ScoredResponse
from dense_reward.records import FloatArray
from dense_reward.schemas import ArrayName

from dense_reward_trainer.configs.signals import TokenSignal
from dense_reward_trainer.credit.signals import FROM_REFERENCE, SIGNALS, offered, request_for, token_signals
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.rl.records import Rollout
from dense_reward_trainer.rl.reward_service import Chat, PinnedPair, requests

SAME_MODEL_NATS = 0.1
"""Log-probs of one SFT model differ between pairs by rounding only: less than this, on average over an answer."""


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """One scored answer: its signals by column, [T] each, and its arrays under the first pair."""

    signals: dict[str, FloatArray]
    scored: ScoredResponse


@dataclass(frozen=True, slots=True, eq=False)
class References:
    """Pairs of one SFT model, then token heads; at least one of both. Every answer is scored under each of them."""

    pairs: tuple[PinnedPair, ...]

    @property
    def first(self) -> PinnedPair:
        return self.pairs[0]

    @property
    def names(self) -> dict[str, str]:
        """The reference checkpoint of each pair, by the name of the pair."""
        return {pair.card.name: pair.card.reference or f"token head {pair.card.token_head}" for pair in self.pairs}

    @property
    def has_controls(self) -> bool:
        """Whether there are signals of the SFT model alone to compare with."""
        return any(pair_of(column) is None for column in self.columns)

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that the service can compute: those of the SFT model alone first."""
        return tuple(
            column_of(name, pair) for pair in self.pairs for name in SIGNALS if name in _signals_of(pair, self.first)
        )

    @property
    def left_out(self) -> tuple[str, ...]:
        """The columns that the engine of a pair does not compute."""
        all_of_them = (column_of(name, pair) for pair in self.pairs for name in SIGNALS)
        return tuple(dict.fromkeys(column for column in all_of_them if column not in self.columns))

    def check_tokenizer(self, tokenizer_sha256: str) -> None:
        """See PinnedPair.check_tokenizer."""
        for pair in self.pairs:
            pair.check_tokenizer(tokenizer_sha256)

    def score_chats(self, chats: Sequence[Chat], include: Collection[ArrayName] = ()) -> Iterator[Answer]:
        """Scores the last message of each chat under every pair; `include`: more arrays of the first pair.

        Raises JobError if a pair cannot score, or if the pairs turn out to have different SFT models.
        """
        answers = []
        for pair in self.pairs:
            arrays, top_k = _request(pair, self.first, include)
            answers.append(pair.score_chats(chats, arrays, top_k))
        for scores in zip(*answers, strict=True):
            yield self._answer(scores)

    def score_each(self, chats: Sequence[Chat], include: Collection[ArrayName] = ()) -> Iterator[Answer | None]:
        """Like `score_chats` with many requests at a time; None for a chat that is too long for a pair."""
        answers = []
        for pair in self.pairs:
            arrays, top_k = _request(pair, self.first, include)
            answers.append(pair.score_each(chats, arrays, top_k))
        for scores in zip(*answers, strict=True):
            whole = [scored for scored in scores if scored is not None]
            yield self._answer(whole) if len(whole) == len(scores) else None

    def score_rollouts(self, rollouts: Sequence[Rollout]) -> Iterator[Answer]:
        """Scores the ids of sampled answers under every pair, in their order. Raises like `score_chats`."""
        for items in requests(rollouts, self.first.request_tokens):
            answers = []
            for pair in self.pairs:
                arrays, top_k = _request(pair, self.first, ())
                answers.append(pair.score(items, arrays, top_k).results)
            for scores in zip(*answers, strict=True):
                yield self._answer(scores)

    def _answer(self, scores: Sequence[ScoredResponse]) -> Answer:
        signals: dict[str, FloatArray] = {}
        for pair, scored in zip(self.pairs, scores, strict=True):
            _check_same_model(pair, scored, self.first, scores[0])
            found = token_signals(scored, _signals_of(pair, self.first))
            signals |= {column_of(name, pair): values_T for name, values_T in found.items()}
        return Answer(signals, scores[0])


def column_of(name: TokenSignal, pair: PinnedPair) -> str:
    """The column of a signal under a pair. The names of signals have no colon."""
    return f"{name}:{pair.card.name}" if name in FROM_REFERENCE else name


def pair_of(column: str) -> str | None:
    """The name of the pair whose reference a column needs; None for a signal of the SFT model alone."""
    return column.partition(":")[2] or None


def _signals_of(pair: PinnedPair, first: PinnedPair) -> tuple[TokenSignal, ...]:
    given = offered(pair.card)
    return given if pair is first else tuple(name for name in given if name in FROM_REFERENCE)


def _request(pair: PinnedPair, first: PinnedPair, more: Collection[ArrayName]) -> tuple[set[ArrayName], int]:
    wanted = request_for(_signals_of(pair, first))
    same_model: set[ArrayName] = {"sft_logprob"} if pair.card.token_head is None else set()
    return {*wanted.include, *same_model, *(more if pair is first else ())}, wanted.top_k


def _check_same_model(pair: PinnedPair, scored: ScoredResponse, first: PinnedPair, expected: ScoredResponse) -> None:
    """A checkpoint that was replaced on disk, and loaded again for one pair only, keeps its name."""
    if pair.card.token_head is not None:
        return
    own_T, first_T = scored.sft_logprob, expected.sft_logprob
    if own_T is None or first_T is None or len(own_T) != len(first_T):
        raise JobError(f"the pairs {first.card.name} and {pair.card.name} returned different tokens or no sft_logprob")
    difference = float(np.abs(own_T - first_T).mean()) if len(own_T) else 0.0
    if difference > SAME_MODEL_NATS:
        raise JobError(
            f"the pairs {first.card.name} and {pair.card.name} name the same SFT model, {pair.card.sft}, but its "
            f"log-probs differ by {difference:.2f} nats a token: one of them was loaded from other files. Restart the "
            "service"
        )
