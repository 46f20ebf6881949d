"""The pairs of a round on disk: a demonstration and the model's own answer to its prompt, as exact ids and as text.

One file for each round, one line for each pair. Lines are only appended, and nothing that is written is generated
again.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward.text.encode import Encoder
from pydantic import BaseModel, ConfigDict, ValidationError

from dense_reward_trainer.data.tokenised import TokenisedRow
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.rl.records import Rollout


class Pair(BaseModel):
    """One line. `demonstration_ids` end with the end of turn; `generated_ids` only if the answer is `finished`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    place: int
    source: str
    prompt_ids: tuple[int, ...]
    demonstration_ids: tuple[int, ...]
    generated_ids: tuple[int, ...]
    finished: bool
    demonstration: str
    generated: str


@dataclass(frozen=True, slots=True)
class PairCounts:
    """What there is to know of a round's pairs. `empty`: answers that only end their turn."""

    pairs: int
    identical: int
    cut_off: int
    empty: int
    generated_tokens: float
    demonstration_tokens: float

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> "PairCounts":
        return cls(
            pairs=len(pairs),
            identical=sum(pair.generated_ids == pair.demonstration_ids for pair in pairs),
            cut_off=sum(not pair.finished for pair in pairs),
            empty=sum(pair.finished and len(pair.generated_ids) == 1 for pair in pairs),
            generated_tokens=sum(len(pair.generated_ids) for pair in pairs) / len(pairs),
            demonstration_tokens=sum(len(pair.demonstration_ids) for pair in pairs) / len(pairs),
        )

    @property
    def in_words(self) -> str:
        parts = [
            f"{self.pairs} pairs",
            f"{self.identical} answers equal their demonstration",
            f"{self.cut_off} cut off",
            f"{self.empty} empty",
            f"{self.generated_tokens:.1f} tokens on average (demonstrations: {self.demonstration_tokens:.1f})",
        ]
        return ", ".join(parts)


def demonstration_ids(row: TokenisedRow) -> tuple[int, ...]:
    """Ids of the demonstrated response, its end of turn included."""
    return tuple(int(i) for i in row.encoded.responses[0].ids_T)


@dataclass(frozen=True, slots=True)
class PairFile:
    """The file of one round. `rows`: the demonstrations of its prompts, at `places` of the data."""

    path: Path
    places: tuple[int, ...]
    rows: tuple[TokenisedRow, ...]
    chunk: int

    def missing(self) -> Iterator[range]:
        """The chunks of rows that are not written yet, in order. Removes a chunk that a kill cut off."""
        written = len(self.read())
        whole = written if written == len(self.rows) else written // self.chunk * self.chunk
        if self.path.is_file() and whole < len(self.rows):
            lines = self.path.read_bytes().split(b"\n")[:whole]
            write_whole(self.path, b"".join(line + b"\n" for line in lines))
        for start in range(whole, len(self.rows), self.chunk):
            yield range(start, min(start + self.chunk, len(self.rows)))

    def append(self, chunk: range, rollouts: Sequence[Rollout], encoder: Encoder) -> None:
        """Appends the pairs of a chunk, and waits until they are on disk."""
        pairs = [self._pair(i, rollout, encoder) for i, rollout in zip(chunk, rollouts, strict=True)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(b"".join(pair.model_dump_json().encode() + b"\n" for pair in pairs))
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[Pair]:
        """All complete lines. Raises ConfigError if one is not a pair of this run."""
        if not self.path.is_file():
            return []
        lines = self.path.read_bytes().split(b"\n")[:-1]
        if len(lines) > len(self.rows):
            raise ConfigError(
                f"{self.path} has {len(lines)} lines for {len(self.rows)} prompts: restore it, or remove it to "
                "generate again"
            )
        return [self._checked(i, line) for i, line in enumerate(lines)]

    def _pair(self, i: int, rollout: Rollout, encoder: Encoder) -> Pair:
        row, ids = self.rows[i], [int(each) for each in rollout.response_T]
        return Pair(
            place=self.places[i],
            source=row.demonstration.source,
            prompt_ids=tuple(int(each) for each in row.encoded.prompt_P),
            demonstration_ids=demonstration_ids(row),
            generated_ids=tuple(ids),
            finished=rollout.finished,
            demonstration=row.encoded.responses[0].text or "",
            generated=encoder.tokenizer.text_and_spans(ids[:-1] if rollout.finished else ids)[0],
        )

    def _checked(self, i: int, line: bytes) -> Pair:
        try:
            pair = Pair.model_validate_json(line)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ConfigError(
                f"{self.path}:{i + 1} is not a pair ({reason}): restore the file, or remove it to generate again"
            ) from None
        row = self.rows[i]
        prompt = tuple(int(each) for each in row.encoded.prompt_P)
        if (pair.place, pair.prompt_ids, pair.demonstration_ids) != (self.places[i], prompt, demonstration_ids(row)):
            raise ConfigError(
                f"{self.path}:{i + 1} holds another prompt or demonstration than {row.demonstration.source}: restore "
                "the file, or remove it to generate again"
            )
        return pair
