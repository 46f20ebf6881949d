"""Demonstrations -> the ids that are trained on: exactly those that the service will score.

Must not know models, files or jobs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dense_reward.errors import RequestError
from dense_reward.text.encode import Encoded, Encoder

from dense_reward_trainer.data.sources import SKIP_BAD, DataError, Demonstration

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Row:
    """One demonstration as training takes it: `labels` are the ids where they are learnt, else IGNORED."""

    demonstration: Demonstration
    encoded: Encoded

    @property
    def input_ids(self) -> list[int]:
        return [*map(int, self.encoded.prompt_P), *map(int, self.encoded.responses[0].ids_T)]

    @property
    def labels(self) -> list[int]:
        response = self.encoded.responses[0]
        learnt = [int(i) if scored else IGNORED for i, scored in zip(response.ids_T, response.scored_T, strict=True)]
        return [IGNORED] * len(self.encoded.prompt_P) + learnt

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.encoded.prompt_P) + len(self.encoded.responses[0].ids_T)


@dataclass(frozen=True, slots=True)
class Rows:
    """Encoded demonstrations in their order, and the complaints about those that were left out."""

    rows: tuple[Row, ...]
    dropped: tuple[str, ...]


def encode_demonstrations(
    demonstrations: Sequence[Demonstration],
    encoder: Encoder,
    *,
    every_turn: bool,
    limit_tokens: int,
    skip_bad: bool,
    cure: str = SKIP_BAD,
) -> Rows:
    """Rows of at most `limit_tokens`, each with its end of turn; nothing is ever cut.

    Raises DataError, naming file and line, for a demonstration that is longer or that the template refuses, unless
    `skip_bad` leaves it out. `cure`: what the job at hand can do about such demonstrations.
    """
    rows: list[Row] = []
    dropped: list[str] = []
    for demonstration in demonstrations:
        try:
            rows.append(_row(demonstration, encoder, every_turn, limit_tokens))
        except _BadDemonstrationError as error:
            dropped.append(f"{demonstration.source}: {error}")
    if dropped and not skip_bad:
        more = f" (and {len(dropped) - 1} more)" if len(dropped) > 1 else ""
        raise DataError(f"{dropped[0]}{more}. {cure}")
    return Rows(tuple(rows), tuple(dropped))


class _BadDemonstrationError(Exception):
    """One demonstration cannot be trained on."""


def _row(demonstration: Demonstration, encoder: Encoder, every_turn: bool, limit_tokens: int) -> Row:
    messages = [{"role": message.role, "content": message.content} for message in demonstration.messages]
    try:
        encoded = encoder.conversation(messages, add_eos=True, every_turn=every_turn)
    except RequestError as error:
        raise _BadDemonstrationError(str(error)) from None
    row = Row(demonstration, encoded)
    if row.length > limit_tokens:
        raise _BadDemonstrationError(
            f"{row.length} tokens, at most {limit_tokens} (max_length_tokens or the model's own)"
        )
    return row
