"""Does a signal point at an error? Errors are planted in right answers; each must stand out from the rest of its own.

Both answers have as many tokens, so that nothing but the error tells them apart. Must not know jobs or files.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dense_reward import ScoredResponse
from dense_reward.records import FloatArray
from dense_reward.schemas import SignalName
from tqdm import tqdm

from dense_reward_trainer.credit.auroc import Interval, auroc, mean_interval
from dense_reward_trainer.data.corruption import DIGITS, Corrupter, Corruption
from dense_reward_trainer.data.sources import Demonstration
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.rl.reward_service import PinnedPair

Against = Literal["tokens", "digit_tokens"]
SIGNALS: tuple[SignalName, ...] = ("sft_logprob", "reward", "centred")
TOGETHER, TRIES = 64, 8


@dataclass(frozen=True, slots=True)
class Planted:
    """A right answer with one error in it."""

    demonstration: Demonstration
    corruption: Corruption


@dataclass(frozen=True, slots=True)
class Localisation:
    """Of one signal, means over answers: `auroc` of the error being lower than others, `hit` of being the lowest."""

    auroc: Interval
    hit: Interval


@dataclass(frozen=True, slots=True, eq=False)
class Located:
    """An error among the tokens of its answer: the values of a signal there, and at those it must stand out from."""

    error: float
    others: FloatArray

    @property
    def auroc(self) -> float:
        """P(error < other) + P(equal) / 2."""
        return auroc([-self.error], -self.others)

    @property
    def hit(self) -> float:
        """1 where the error is the lowest of all, shared evenly where several are."""
        lowest = float(self.others.min())
        return float(self.error < lowest) if self.error != lowest else 1 / (1 + int((self.others == lowest).sum()))


def localise(
    pair: PinnedPair,
    demonstrations: Sequence[Demonstration],
    corrupter: Corrupter,
    *,
    count: int,
    against: Against,
    seed: int,
) -> dict[str, Localisation]:
    """By signal, over the first `count` answers that an error of the kind could be planted in.

    Raises ConfigError where there are fewer, or where an error has nothing to stand out from.
    """
    located: dict[str, list[Located]] = {name: [] for name in SIGNALS}
    with tqdm(total=count, desc=f"planted errors ({corrupter.kind})", unit="answer") as bar:
        for planted, scored in planted_and_scored(pair, demonstrations, corrupter, seed):
            error, others = groups(planted, offsets_of(scored), against)
            if not others:
                raise ConfigError(f"{planted.demonstration.source}: no other token has a digit: set against=tokens")
            for name in SIGNALS:
                values_T = signal_of(scored, name)
                located[name].append(Located(float(values_T[error]), values_T[others]))
            bar.update()
            if len(located["reward"]) == count:
                break
    found = len(located["reward"])
    if found < count:
        raise ConfigError(
            f"{found} answers can hold an error of kind {corrupter.kind}, answers asks for {count}: lower it"
        )
    return summarised(located, seed)


def summarised(located: Mapping[str, Sequence[Located]], seed: int) -> dict[str, Localisation]:
    """Means over the errors, by signal."""
    return {
        name: Localisation(
            mean_interval([one.auroc for one in found], seed), mean_interval([one.hit for one in found], seed)
        )
        for name, found in located.items()
    }


def planted_and_scored(
    pair: PinnedPair, demonstrations: Sequence[Demonstration], corrupter: Corrupter, seed: int
) -> Iterator[tuple[Planted, ScoredResponse]]:
    """Errors with what the pair gives the tokens around them, in the order of the demonstrations.

    Of up to TRIES seeded errors to an answer the first counts that leaves the number of its tokens as it was.
    """
    for start in range(0, len(demonstrations), TOGETHER):
        part = demonstrations[start : start + TOGETHER]
        proposed = {i: proposals(corrupter, one, [seed, start + i]) for i, one in enumerate(part)}
        lengths = {i: r.length for i, r in zip(proposed, _ask(pair, [(d, d.response) for d in part], ()), strict=True)}
        found: dict[int, tuple[Planted, ScoredResponse]] = {}
        for attempt in range(TRIES):
            tried = {i: some[attempt] for i, some in proposed.items() if i not in found and attempt < len(some)}
            if not tried:
                continue
            asked = [(part[i], corruption.text) for i, corruption in tried.items()]
            for (i, corruption), scored in zip(tried.items(), _ask(pair, asked, SIGNALS), strict=True):
                if scored.length == lengths[i]:
                    found[i] = Planted(part[i], corruption), scored
        yield from (found[i] for i in sorted(found))


def proposals(corrupter: Corrupter, demonstration: Demonstration, seed: Sequence[int]) -> list[Corruption]:
    """Up to TRIES different errors for one answer, always the same for the same seed."""
    rng = random.Random(str(list(seed)))
    drawn = (corrupter(demonstration.response, rng) for _ in range(TRIES))
    return list(dict.fromkeys(corruption for corruption in drawn if corruption is not None))


def groups(planted: Planted, offsets: Sequence[tuple[int, int]], against: Against) -> tuple[int, list[int]]:
    """The first wrong token, and the tokens that it must stand out from (those of the planted error left out).

    An error of several tokens is wrong from its first changed one on; its later tokens are in neither group.
    """
    text, right = planted.corruption.text, planted.demonstration.response
    span = range(planted.corruption.start, planted.corruption.end)
    wrong = [t for t, (start, end) in enumerate(offsets) if any(text[i] != right[i] for i in range(start, end))]
    touched = {t for t, (start, end) in enumerate(offsets) if start < span.stop and end > span.start}
    others = [t for t in range(len(offsets)) if t not in touched]
    if against == "digit_tokens":
        others = [t for t in others if any(c in DIGITS for c in text[offsets[t][0] : offsets[t][1]])]
    return wrong[0], others


def offsets_of(scored: ScoredResponse) -> list[tuple[int, int]]:
    """Code-point spans of the tokens. Raises JobError where the service gave none."""
    if scored.offsets is None:
        raise JobError("the service answered without offsets")
    return [(int(start), int(end)) for start, end in scored.offsets]


def signal_of(scored: ScoredResponse, name: SignalName) -> FloatArray:
    """[T] nats. Raises JobError where the service did not answer it."""
    values_T: FloatArray | None = getattr(scored, name)
    if values_T is None:
        raise JobError(f"the service answered without {name}")
    return values_T


def messages_of(demonstration: Demonstration) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in demonstration.messages]


def _ask(
    pair: PinnedPair, answers: Sequence[tuple[Demonstration, str]], signals: Sequence[SignalName]
) -> Iterator[ScoredResponse]:
    chats = [[*messages_of(one)[:-1], {"role": "assistant", "content": text}] for one, text in answers]
    return pair.ask_chats(chats, [*signals, "offsets", "token_ids"])
