"""What encoding makes: the ids of a prompt and its responses, and the stream of a chat of several turns. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dense_reward.errors import refuse
from dense_reward.records import BoolArray, IdArray
from dense_reward.text.offsets import Span


@dataclass(frozen=True, slots=True)
class EncodedResponse:
    """The ids after a prompt, which are scored, and the span of each scored id in `text` (None for input as ids)."""

    ids_T: IdArray
    scored_T: BoolArray
    text: str | None = None
    spans_S: tuple[Span, ...] | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """One prompt and the responses that share it. Raises RequestError(empty_prompt) for a prompt without ids."""

    prompt_P: IdArray
    responses: tuple[EncodedResponse, ...]

    def __post_init__(self) -> None:
        if len(self.prompt_P) == 0:
            raise refuse("empty_prompt", "the prompt has no tokens: give at least one", param="prompt")


def as_ids(ids: Sequence[int], vocab_size: int, param: str) -> IdArray:
    """Ids verbatim as int32. Raises RequestError(unknown_token_id) for one outside [0, vocab_size)."""
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        at = next(at for at, token in enumerate(ids) if not 0 <= token < vocab_size)
        message = f"{param}: id {ids[at]} at position {at} is not in the vocabulary [0, {vocab_size})"
        raise refuse("unknown_token_id", message, param=param)
    return np.array(ids, dtype=np.int32)


class TurnStream:
    """One sequence of several turns: each scored response, and the unscored context before it."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._scored: list[bool] = []
        self._text = ""
        self._spans: list[Span] = []

    @property
    def length(self) -> int:
        return len(self._ids)

    def context(self, prompt: IdArray) -> None:
        """Continue with the ids that a policy would see next. Raises RequestError unless they extend the ids so far."""
        ids = prompt.tolist()
        seen = len(self._ids)
        if ids[:seen] != self._ids:
            raise refuse(
                "bad_template",
                "the chat template or the tokenizer renders earlier turns differently once the conversation continues "
                "(some remove their thoughts), so all_assistant would score states that no policy sees: send one item "
                "for each assistant turn, with the messages up to it and without score; or send ids",
                param="score",
            )
        self._ids = ids
        self._scored.extend([False] * (len(ids) - seen))

    def response(self, encoded: EncodedResponse) -> None:
        shift = len(self._text)
        self._ids.extend(encoded.ids_T.tolist())
        self._scored.extend([True] * len(encoded.ids_T))
        self._text += encoded.text or ""
        self._spans.extend((start + shift, end + shift) for start, end in encoded.spans_S or ())

    def finish(self) -> Encoded:
        """The encoded conversation. All ids before the first response are the prompt."""
        ids, scored = np.array(self._ids, dtype=np.int32), np.array(self._scored, dtype=bool)
        first = int(scored.argmax()) if scored.any() else len(ids)
        response = EncodedResponse(ids[first:], scored[first:], self._text, tuple(self._spans))
        return Encoded(ids[:first], (response,))
