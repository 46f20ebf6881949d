"""Tokenises demonstrations for training, into exactly the ids that the service will score."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from dense_reward.errors import RequestError
from dense_reward.text.encode import Encoder
from dense_reward.text.encoded import Encoded
from dense_reward.text.special_tokens import Message

from dense_reward_trainer.data.records import DataError, Demonstration, JsonValue
from dense_reward_trainer.data.sources import SKIP_BAD

IGNORED = -100
_ONE_RESPONSE = (
    "the chat template or the tokenizer writes earlier turns differently once the conversation continues, so "
    "train_on=all_assistant would learn states that no policy sees: set train_on=response"
)
_WEIGHTS = "an earlier turn has weight 0, but train_on=all_assistant learns every turn: set train_on=response"
_ALL_BAD = "Every demonstration is refused: correct or convert the source."


@dataclass(frozen=True, slots=True)
class TokenisedRow:
    """One tokenised demonstration. `labels`: the id at each position in the loss, IGNORED elsewhere."""

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
        """Number of tokens in prompt and response."""
        return len(self.encoded.prompt_P) + len(self.encoded.responses[0].ids_T)


@dataclass(frozen=True, slots=True)
class TokenisedRows:
    """Tokenised demonstrations in order. `dropped`: for each one left out, its place and the reason.

    `shortened`: number of rows in which a response repeated a part of its prompt or its end of turn; `unclosed`: in
    which the prompt opens a thought that the response does not close.
    """

    rows: tuple[TokenisedRow, ...]
    dropped: tuple[str, ...]
    shortened: int
    unclosed: int


def encode_demonstrations(
    demonstrations: Sequence[Demonstration],
    encoder: Encoder,
    *,
    every_turn: bool,
    limit_tokens: int,
    skip_bad: bool,
    cure: str = SKIP_BAD,
) -> TokenisedRows:
    """Rows of at most `limit_tokens`, each with its end of turn; never truncates.

    Raises DataError, naming file and line, if a demonstration is longer or the template refuses it; with `skip_bad`
    such demonstrations are left out. `cure`: the last sentence of that error, which depends on the job.
    """
    rows: list[TokenisedRow] = []
    dropped: list[str] = []
    shortened = 0
    for demonstration in demonstrations:
        try:
            given: list[Message] = [message.as_mapping() for message in demonstration.messages]
            messages = _without_repetition(given, encoder, every_turn)
            rows.append(_row(demonstration, messages, encoder, every_turn, limit_tokens))
            shortened += messages != given
        except _BadDemonstrationError as error:
            dropped.append(f"{demonstration.source}: {error}")
    if dropped and not skip_bad:
        more = f" (and {len(dropped) - 1} more)" if len(dropped) > 1 else ""
        raise DataError(f"{dropped[0]}{more}. {_ALL_BAD if cure == SKIP_BAD and not rows else cure}")
    unclosed = sum(encoder.leaves_thought_open(row.encoded.responses[0].text or "") for row in rows)
    return TokenisedRows(tuple(rows), tuple(dropped), shortened, unclosed)


def rows_sha256(rows: Iterable[TokenisedRow]) -> str:
    """Hex hash of the ids and labels of all rows in order: equal if and only if the same tokens are learnt."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.length.to_bytes(8, "little"))
        for values in (row.input_ids, row.labels):
            digest.update(np.array(values, dtype="<i4").tobytes())
    return digest.hexdigest()


class _BadDemonstrationError(Exception):
    """A demonstration that cannot be trained on."""


def _without_repetition(messages: Sequence[Message], encoder: Encoder, every_turn: bool) -> list[Message]:
    """The chat; its learnt responses do not repeat what their prompt ends with, or end in the end of turn.

    Data sets often hold responses with both, and the encoder adds them itself.
    """
    learnt = {i for i, message in enumerate(messages) if message["role"] == "assistant"}
    learnt = learnt if every_turn else {len(messages) - 1}
    try:
        return [
            {**message, "content": encoder.without_repetition(str(message["content"]))} if i in learnt else message
            for i, message in enumerate(messages)
        ]
    except RequestError as error:
        raise _BadDemonstrationError(str(error)) from None


def _row(
    demonstration: Demonstration, messages: Sequence[Message], encoder: Encoder, every_turn: bool, limit_tokens: int
) -> TokenisedRow:
    if every_turn and any(message.weight == 0 for message in demonstration.messages if message.role == "assistant"):
        raise _BadDemonstrationError(_WEIGHTS)
    try:
        encoded = encoder.conversation(messages, add_eos=True, every_turn=every_turn, tools=demonstration.tools or None)
    except RequestError as error:
        # The encoder names the cure of a request over HTTP, where `score` chooses the turns.
        chooses_turns = any(fault.param == "score" for fault in error.faults)
        raise _BadDemonstrationError(_ONE_RESPONSE if every_turn and chooses_turns else str(error)) from None
    _check_tools(demonstration, encoder, encoded)
    row = TokenisedRow(demonstration, encoded)
    if row.length > limit_tokens:
        raise _BadDemonstrationError(
            f"{row.length} tokens, at most {limit_tokens} (max_length_tokens or the model's own limit)"
        )
    return row


def _check_tools(demonstration: Demonstration, encoder: Encoder, encoded: Encoded) -> None:
    """Raises _BadDemonstrationError if the ids of the prompt lack a tool, or a call in an earlier turn."""
    calls = [call for message in demonstration.prompt_messages for call in message.tool_calls]
    names = {str(cast(Mapping[str, JsonValue], tool["function"])["name"]) for tool in (*demonstration.tools, *calls)}
    if not names:
        return
    ids = [*encoded.prompt_P, *encoded.responses[0].ids_T]
    text = encoder.tokenizer.text_and_spans([int(i) for i in ids])[0]
    lost = sorted(name for name in names if name not in text)
    if lost:
        listed = ", ".join(map(ascii, lost))
        raise _BadDemonstrationError(f"the chat template does not write the tool {listed}: a policy would not see it")
