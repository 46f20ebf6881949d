"""Pairs of a demonstration and a sampled answer to its prompt, as ids on disk. Must not know models or rewards."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward.records import IdArray

from dense_reward_trainer.errors import JobError


@dataclass(frozen=True, slots=True, eq=False)
class AnswerPair:
    """A prompt with two responses of at least one token; `finished`: the sampled answer ends with its end of turn."""

    prompt_P: IdArray
    demonstration_T: IdArray
    answer_T: IdArray
    finished: bool = True

    @property
    def first_difference(self) -> int | None:
        """The first position of the responses where they differ; None if they are equal.

        If one continues the other, it is the first position that the shorter one lacks.
        """
        shared = min(len(self.demonstration_T), len(self.answer_T))
        differing = np.flatnonzero(self.demonstration_T[:shared] != self.answer_T[:shared])
        if len(differing):
            return int(differing[0])
        return None if len(self.demonstration_T) == len(self.answer_T) else shared


def write_pairs(path: Path, pairs: Iterable[AnswerPair]) -> None:
    """Writes a line of JSON for each pair; the file appears whole or not at all."""
    rows = (
        {
            "prompt_ids": pair.prompt_P.tolist(),
            "demonstration_ids": pair.demonstration_T.tolist(),
            "answer_ids": pair.answer_T.tolist(),
            "finished": pair.finished,
        }
        for pair in pairs
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(f"{json.dumps(row)}\n" for row in rows).encode())


def read_pairs(path: Path) -> list[AnswerPair]:
    """The pairs of a file. Raises JobError if it was changed into something else."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [
            AnswerPair(
                _ids(row["prompt_ids"]), _ids(row["demonstration_ids"]), _ids(row["answer_ids"]), bool(row["finished"])
            )
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JobError(
            f"{path} does not hold the pairs that this run wrote ({error}): restore it, or use another output_dir"
        ) from error


def pairs_sha256(pairs: Iterable[AnswerPair]) -> str:
    """Hash of the ids of pairs in their order."""
    digest = hashlib.sha256()
    for pair in pairs:
        for ids in (pair.prompt_P, pair.demonstration_T, pair.answer_T):
            digest.update(len(ids).to_bytes(8, "little") + ids.astype("<i4").tobytes())
    return digest.hexdigest()


def differing(pairs: Sequence[AnswerPair]) -> list[AnswerPair]:
    """The pairs whose responses differ: equal ones have no gradient."""
    return [pair for pair in pairs if pair.first_difference is not None]


def _ids(listed: Sequence[int]) -> IdArray:
    ids = np.array(listed, dtype=np.int32)
    if ids.ndim != 1 or not len(ids):
        raise ValueError("a row without ids")
    return ids
