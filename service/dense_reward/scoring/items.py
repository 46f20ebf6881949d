"""One item of a request -> one trunk for the engine. Pure.

`prepare` makes every check of an item that the schema cannot make: shapes, sizes and options here; texts, chats and ids
in text/encode.py, which it calls.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from pydantic import JsonValue

from dense_reward.errors import refuse
from dense_reward.records import MAX_CANDIDATES, Branch, IdArray, Trunk
from dense_reward.schemas import Item, Options
from dense_reward.text.encode import Encoder
from dense_reward.text.encoded import Encoded, EncodedResponse, as_ids

MAX_TURNS = 256
"""Limit on the scored turns of one chat: each turn renders the chat again, so the work grows with their square."""
MAX_RENDERED_MESSAGES = 131_072
"""Limit on the messages before each scored turn of one chat, summed. Each is rendered, in about 50 us: 6 seconds."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest item that is accepted. Ids must be below `vocab_size`."""

    vocab_size: int
    max_length_tokens: int
    max_responses: int
    max_json_depth: int


@dataclass(frozen=True, slots=True)
class PreparedItem:
    """An item that is ready to be computed.

    `segments`: the [start, end) spans of each response. `from_text`: the caller sent text, so the answer has text too.
    """

    trunk: Trunk
    responses: tuple[EncodedResponse, ...]
    segments: tuple[tuple[tuple[int, int], ...], ...] | None
    from_text: bool


def prepare(item: Item, options: Options, encoder: Encoder, limits: Limits) -> PreparedItem:
    """Encode and check an item. Raises RequestError with the field, the limit and the cure."""
    _check_responses(item, limits)
    _check_depth(item, limits.max_json_depth)
    encoded = encode_item(item, options, replace(encoder, max_tokens=limits.max_length_tokens), limits.vocab_size)
    _check_known(encoded, limits.vocab_size)
    _check_size(encoded, limits)
    scored = [int(response.scored_T.sum()) for response in encoded.responses]
    candidates = _candidates(item, scored, limits.vocab_size)
    branches = tuple(
        Branch(response.ids_T, response.scored_T, candidates_SK)
        for response, candidates_SK in zip(encoded.responses, candidates, strict=True)
    )
    segments = _segments(item, scored)
    return PreparedItem(
        Trunk(encoded.prompt_P, branches), encoded.responses, segments, item.form not in {"ids", "stream"}
    )


def encode_item(item: Item, options: Options, encoder: Encoder, vocab_size: int) -> Encoded:
    """Encode an item according to its form. Raises RequestError."""
    raw = options.render == "raw"
    if options.render == "chat" and encoder.renderer != "chat":
        message = f"this checkpoint was trained with the {encoder.renderer} renderer: omit render, or send it raw"
        raise refuse("invalid_request", message, param="render")
    match item.form:
        case "ids":
            _refuse_add_eos(options)
            return _exact_ids(item.prompt_ids or [], item.response_ids or [], vocab_size)
        case "stream":
            _refuse_add_eos(options)
            return _stream(item.token_ids or [], item.score_mask or [], vocab_size)
        case "text":
            return encoder.text(item.text or "", add_eos=bool(options.add_eos), raw=raw)
        case "prompt":
            texts = item.responses if item.responses is not None else [item.response or ""]
            prompt_P = encoder.prompt(item.prompt or "", raw=raw)
            add_eos = options.add_eos is not False
            responses = (
                encoder.response(text, add_eos=add_eos, raw=raw, raw_prompt=item.prompt or "") for text in texts
            )
            return Encoded(prompt_P, tuple(responses))
        case _:
            if raw:
                raise refuse("invalid_request", "messages are rendered: render raw is for text", param="render")
            return _chat(item, encoder, add_eos=options.add_eos is not False)


def _chat(item: Item, encoder: Encoder, *, add_eos: bool) -> Encoded:
    messages = item.messages or []
    every_turn = item.score == "all_assistant"
    turns = sum(message.role == "assistant" for message in messages)
    if every_turn and turns > MAX_TURNS:
        message = f"all_assistant scores at most {MAX_TURNS} turns of a chat, this one has {turns}: send ids"
        raise refuse("too_long", message, param="messages")
    if rendered_messages(item) > MAX_RENDERED_MESSAGES:
        message = f"all_assistant renders the messages before each of {turns} turns, {rendered_messages(item)} together"
        message += f"; the limit is {MAX_RENDERED_MESSAGES}: send fewer messages, or ids"
        raise refuse("too_long", message, param="messages")
    return encoder.conversation(
        [message.model_dump(exclude_none=True) for message in messages],
        add_eos=add_eos,
        every_turn=every_turn,
        tools=item.tools,
        template_kwargs=item.template_kwargs,
    )


def rendered_messages(item: Item) -> int:
    """How many messages are rendered to encode this item: those before each scored turn."""
    if item.score != "all_assistant":
        return len(item.messages or ())
    return sum(at for at, message in enumerate(item.messages or ()) if message.role == "assistant")


def _exact_ids(prompt_ids: Sequence[int], response_ids: Sequence[Sequence[int]], vocab_size: int) -> Encoded:
    if not prompt_ids:
        raise refuse("empty_prompt", "prompt_ids is empty: give at least one id, such as BOS", param="prompt_ids")
    responses = []
    for index, ids in enumerate(response_ids):
        ids_T = as_ids(ids, vocab_size, f"response_ids[{index}]")
        responses.append(EncodedResponse(ids_T, np.ones(len(ids_T), dtype=bool)))
    return Encoded(as_ids(prompt_ids, vocab_size, "prompt_ids"), tuple(responses))


def _stream(token_ids: Sequence[int], score_mask: Sequence[int], vocab_size: int) -> Encoded:
    """The tokens before the first scored one become the prompt."""
    if not token_ids:
        raise refuse("empty_prompt", "token_ids is empty: give at least one id", param="token_ids")
    mask = np.array(score_mask, dtype=bool)
    if mask[0]:
        raise refuse(
            "empty_prompt",
            "the first token has nothing before it and cannot be scored: mask it out",
            param="score_mask",
        )
    ids = as_ids(token_ids, vocab_size, "token_ids")
    first = int(mask.argmax()) if mask.any() else len(ids)
    return Encoded(ids[:first], (EncodedResponse(ids[first:], mask[first:]),))


def _check_known(encoded: Encoded, vocab_size: int) -> None:
    """Raises RequestError for an id of the tokenizer that the model lacks: only the tokenizer was extended."""
    for ids in (encoded.prompt_P, *(response.ids_T for response in encoded.responses)):
        if ids.max(initial=0) >= vocab_size:
            message = f"the text has token id {ids.max()}, which the model lacks: its ids are [0, {vocab_size})"
            raise refuse("unknown_token_id", message)


def _check_responses(item: Item, limits: Limits) -> None:
    count = len(item.responses or item.response_ids or ())
    if count > limits.max_responses:
        message = f"{count} responses to one prompt; the limit is {limits.max_responses}"
        raise refuse("too_long", f"{message} (--max-responses): send them in parts", param="responses")


def _check_depth(item: Item, max_depth: int) -> None:
    """Templates and this module walk these values recursively: unlimited depth would overflow the stack."""
    calls = [("messages", message.tool_calls) for message in item.messages or ()]
    for param, value in (("tools", item.tools), ("template_kwargs", item.template_kwargs), *calls):
        if _is_deeper(value, max_depth):
            message = f"{param} is nested more than {max_depth} levels deep (--max-json-depth): flatten it"
            raise refuse("too_long", message, param=param)


def _is_deeper(value: JsonValue, depth: int) -> bool:
    if isinstance(value, dict):
        return depth == 0 or any(_is_deeper(entry, depth - 1) for entry in value.values())
    if isinstance(value, list):
        return depth == 0 or any(_is_deeper(entry, depth - 1) for entry in value)
    return False


def _check_size(encoded: Encoded, limits: Limits) -> None:
    for index, response in enumerate(encoded.responses):
        length = len(encoded.prompt_P) + len(response.ids_T)
        if length > limits.max_length_tokens:
            message = f"prompt and response {index} have {length} tokens; the limit is {limits.max_length_tokens}"
            raise refuse("too_long", f"{message}: shorten them, nothing is truncated here", param="response")


def _candidates(item: Item, scored: Sequence[int], vocab_size: int) -> list[IdArray | None]:
    """For each response its candidates as [S, K] ids; None if it has none."""
    if item.candidate_ids is None:
        return [None] * len(scored)
    _check_count(len(item.candidate_ids), len(scored), "candidate_ids")
    arrays: list[IdArray | None] = []
    for index, (rows, count) in enumerate(zip(item.candidate_ids, scored, strict=True)):
        widths = {len(row) for row in rows}
        if len(rows) != count or len(widths) > 1:
            message = (
                f"candidate_ids[{index}] must be [{count}][K] with the same K in every row, it has {len(rows)} rows"
            )
            raise refuse("wrong_shape", f"{message} of lengths {sorted(widths)}", param="candidate_ids")
        width = widths.pop() if widths else 0
        if width > MAX_CANDIDATES:
            message = f"candidate_ids[{index}] names {width} ids at each token; the limit is {MAX_CANDIDATES}"
            raise refuse("too_long", f"{message}: send them in parts", param="candidate_ids")
        flat = as_ids([token for row in rows for token in row], vocab_size, f"candidate_ids[{index}]")
        arrays.append(flat.reshape(count, width) if width else None)
    return arrays


def _segments(item: Item, scored: Sequence[int]) -> tuple[tuple[tuple[int, int], ...], ...] | None:
    if item.segments is None:
        return None
    _check_count(len(item.segments), len(scored), "segments")
    for spans, count in zip(item.segments, scored, strict=True):
        for start, end in spans:
            if not 0 <= start <= end <= count:
                message = f"segment [{start}, {end}) is not inside the {count} scored tokens of its response"
                raise refuse("wrong_shape", message, param="segments")
    return tuple(tuple((start, end) for start, end in spans) for spans in item.segments)


def _check_count(given: int, responses: int, param: str) -> None:
    if given != responses:
        raise refuse("wrong_shape", f"{param} has {given} entries for {responses} responses", param=param)


def _refuse_add_eos(options: Options) -> None:
    if options.add_eos is not None:
        message = "add_eos is refused with ids: they are scored unchanged, so append the id yourself"
        raise refuse("invalid_request", message, param="add_eos")
