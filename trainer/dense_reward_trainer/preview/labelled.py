"""Reads labelled data: prompts whose right answer is known, or answers that are judged already. Its keys decide which.

Must not import models or jobs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from dense_reward_trainer.data.demonstration import parse_line, read_row
from dense_reward_trainer.data.file_rows import file_rows
from dense_reward_trainer.data.final_answers import AnswerChecker, right_answer
from dense_reward_trainer.data.records import BadLine, DataError, Demonstration, LineError, RawRow
from dense_reward_trainer.data.row_values import json_type
from dense_reward_trainer.data.sources import NO_SKIP, DataSource, load

_LISTED_BAD_LINES = 10
_NO_ANSWER = (
    "no row states its answer, so samples cannot be judged: add final_answer to the rows, choose another checker, or "
    "give answers with `right`: true or false"
)


@dataclass(frozen=True, slots=True)
class Labelled:
    """What a file holds, in its order.

    `demonstrations`: a prompt and an answer each. `right`: whether the answer is right; null if the answers are
    demonstrations, whose prompts a policy answers itself. `summary`: what was read, for the user.
    """

    demonstrations: tuple[Demonstration, ...]
    right: tuple[bool, ...] | None
    summary: str


def read_labelled(path: Path, checker: AnswerChecker) -> Labelled:
    """The labelled data of a file. Rows with the key `right` are judged answers.

    Of other rows, only those whose answer the checker can know are kept. Raises DataError, with the place and the cure.
    """
    path = path.expanduser()
    if not path.is_file():
        raise DataError(f"{path}: there is no such file: labelled is held_out.jsonl of an SFT run, or a file like it")
    rows = list(_rows(path))
    if any("right" in row for _, row in rows if not isinstance(row, LineError)):
        return _judged(path, rows)
    loaded = load(DataSource(source=str(path), held_out_fraction=0.0), cure=NO_SKIP, prompts_only=True)
    known = tuple(one for one in loaded.demonstrations if _is_known(one, checker))
    if not known:
        raise DataError(f"{path}: {_NO_ANSWER}")
    return Labelled(known, None, f"{loaded.summary}\nanswers are known for {len(known)} rows")


def wanted(demonstration: Demonstration, checker: AnswerChecker) -> str | None:
    """The right answer to a prompt, None if it is not known. Raises DataError if the checker can never find it."""
    if checker == "exact" and not demonstration.response.strip():
        return None
    try:
        return right_answer(demonstration.response, demonstration.answer, checker)
    except ValueError as error:
        raise DataError(f"{demonstration.source}: {error}: set checker to final_answer or exact") from None


def _is_known(demonstration: Demonstration, checker: AnswerChecker) -> bool:
    return wanted(demonstration, checker) is not None


def _rows(path: Path) -> Iterator[tuple[int, RawRow | LineError]]:
    for number, line in file_rows(path).rows:
        try:
            yield number, parse_line(line) if isinstance(line, bytes) else line
        except LineError as error:
            yield number, error


def _judged(path: Path, rows: Sequence[tuple[int, RawRow | LineError]]) -> Labelled:
    answers: list[tuple[Demonstration, bool]] = []
    bad: list[BadLine] = []
    for number, row in rows:
        try:
            if isinstance(row, LineError):
                raise row
            read = [(read_row(one, f"{path}:{number}").demonstration, right) for one, right in judged_answers(row)]
            answers += read
        except LineError as error:
            bad.append(BadLine(str(path), number, error.reason, error.detail))
    if bad:
        listed = "\n".join(f"  {line}" for line in bad[:_LISTED_BAD_LINES])
        more = f"\n  and {len(bad) - _LISTED_BAD_LINES} more" if len(bad) > _LISTED_BAD_LINES else ""
        raise DataError(
            f"{path}: {len(bad)} of {len(rows)} rows are no judged answers:\n{listed}{more}\n{NO_SKIP}", bad
        )
    right = tuple(is_right for _, is_right in answers)
    summary = f"{path}: {len(right)} judged answers in {len(rows)} rows, {sum(right)} of them are right"
    return Labelled(tuple(one for one, _ in answers), right, summary)


def judged_answers(row: RawRow) -> list[tuple[RawRow, bool]]:
    """A row for each answer of a row, in a layout of demonstrations, and whether it is right. Raises LineError."""
    if row.get("right") is None:
        raise LineError("wrong type", "`right` is missing, but other rows have it: true or false is needed")
    rest = {key: value for key, value in row.items() if key not in ("right", "responses")}
    texts, right = row.get("responses"), row["right"]
    if texts is None:
        return [(_answered(rest), _truth(right))]
    if "response" in rest:
        raise LineError("two formats", "has `response` and `responses`: keep one of them")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise LineError("wrong type", "`responses` must be a list of one or more texts")
    if not isinstance(right, list) or len(right) != len(texts):
        detail = f"`right` must be a list of true or false, one for each of the {len(texts)} responses"
        raise LineError("wrong type", detail)
    return [(_answered({**rest, "response": text}), _truth(one)) for text, one in zip(texts, right, strict=True)]


def _answered(row: RawRow) -> RawRow:
    """The row, with a response that stands beside `messages` as their last message."""
    messages, response = row.get("messages"), row.get("response")
    if not isinstance(messages, list) or response is None:
        return row
    last = messages[-1] if messages else None
    if isinstance(last, Mapping) and last.get("role") == "assistant":
        detail = "`messages` ends with an answer, and there is another one beside it: keep one of them"
        raise LineError("two formats", detail)
    rest = {key: value for key, value in row.items() if key != "response"}
    return {**rest, "messages": [*cast(list[object], messages), {"role": "assistant", "content": response}]}


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise LineError("wrong type", f"`right` is {json_type(value)}, true or false is needed")
    return value
