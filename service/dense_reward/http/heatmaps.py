"""POST /heatmap: which arrays a picture needs, and the rows of an answer -> html, svg or ansi."""

import json
from collections.abc import Collection, Iterator, Sequence
from typing import cast

import numpy as np
from pydantic import JsonValue

from dense_reward.errors import refuse
from dense_reward.heatmap import (
    HEAD_MEANING,
    HEAD_UNIT,
    PALETTES,
    HeatmapAlternative,
    HeatmapRow,
    build,
    render_ansi,
    render_html_document,
    render_svg,
)
from dense_reward.schemas import ArrayName, ChatMessage, HeatmapRequest, Item
from dense_reward.scoring.rows import Alternatives, Row
from dense_reward.text.tokenizer import Tokenizer

DETAILS: tuple[ArrayName, ...] = ("reward", "sft_logprob", "reference_logprob", "kl", "centred", "entropy")
ARRAYS: tuple[ArrayName, ...] = ("token_ids", "tokens", "offsets", "text", *DETAILS)
FROM_DISTRIBUTIONS = frozenset(DETAILS) - {"reward"}
"""The arrays that need the distributions of the models: remote engines lack some of them, a token head all."""
MEDIA_TYPES = {"html": "text/html", "svg": "image/svg+xml", "ansi": "text/plain"}


def with_arrays(request: HeatmapRequest, offered: Collection[str]) -> HeatmapRequest:
    """The request with an `include` of all arrays for a heatmap, as far as what the engine offers allows.

    For format json, the caller's `include` is not replaced. Raises RequestError for options that a picture cannot have.
    """
    if request.palette not in PALETTES:
        raise refuse(
            "invalid_request", f"palette {request.palette!r}: choose one of {sorted(PALETTES)}", param="palette"
        )
    given = [name for name in ARRAYS if name not in FROM_DISTRIBUTIONS or name in offered]
    whole = request.model_copy(update={"include": given})
    if request.format == "json":
        return whole if request.include is None else request
    if request.format == "svg" and not request.compare and sum(map(_responses, request.listed())) > 1:
        message = "an svg is one picture with one colour scale: set compare true, or send the responses one by one"
        raise refuse("invalid_request", message, param="compare")
    if request.encoding_format == "base64":
        raise refuse("invalid_request", "a picture has no arrays: remove encoding_format", param="encoding_format")
    if request.on_error == "per_item":
        raise refuse("invalid_request", "a picture needs all items to be good: remove on_error", param="on_error")
    return whole


def draw(request: HeatmapRequest, rows: Sequence[Row], tokenizer: Tokenizer, *, of_head: bool = False) -> str:
    """The picture of all responses: with `compare` on one colour scale, otherwise each on its own.

    `of_head`: the rewards are the values of a token head.
    """
    drawn = heatmap_rows(request, rows, tokenizer)
    groups = [drawn] if request.compare else [[row] for row in drawn]
    words = {"meaning": HEAD_MEANING, "unit": HEAD_UNIT} if of_head else {}
    heatmaps = [build(group, signal=request.signal, palette=request.palette, **words) for group in groups]
    if request.format == "svg":
        return render_svg(heatmaps[0])
    if request.format == "ansi":
        return "\n".join(render_ansi(heatmap) for heatmap in heatmaps)
    return render_html_document(heatmaps)


def heatmap_rows(request: HeatmapRequest, rows: Sequence[Row], tokenizer: Tokenizer) -> list[HeatmapRow]:
    """A heatmap row for each response of a request that was scored `with_arrays`."""
    items = request.listed()
    titles = [_title(row, several_items=len(items) > 1, alone=len(rows) == 1) for row in rows]
    drawn = zip(rows, titles, strict=True)
    return [_row(row, items[cast(int, row["item"])], request, tokenizer, title) for row, title in drawn]


def _title(row: Row, *, several_items: bool, alone: bool) -> str:
    """People count from 1."""
    response = "response" if alone else f"response {cast(int, row['response']) + 1}"
    return f"item {cast(int, row['item']) + 1}, {response}" if several_items else response


def _row(row: Row, item: Item, request: HeatmapRequest, tokenizer: Tokenizer, title: str) -> HeatmapRow:
    text = str(row["text"])
    offsets = cast(np.ndarray[tuple[int, int], np.dtype[np.int32]], row["offsets"]).tolist()
    ids = tuple(int(i) for i in _array(row, "token_ids").tolist())
    names = cast(list[str], row["tokens"])
    pieces = tuple(
        names[t] if ids[t] in tokenizer.special_ids and start == end else text[start:end]
        for t, (start, end) in enumerate(offsets)
    )
    return HeatmapRow(
        title=title,
        prompt=prompt_shown(item, tokenizer),
        pieces=pieces,
        token_ids=ids,
        values=tuple(_array(row, request.signal).tolist()),
        details={name: tuple(_array(row, name).tolist()) for name in DETAILS if name in row},
        alternatives=_alternatives(row),
    )


def _array(row: Row, name: str) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return cast(np.ndarray[tuple[int], np.dtype[np.float32]], row[name])


def _alternatives(row: Row) -> tuple[tuple[HeatmapAlternative, ...], ...] | None:
    if "alternatives" not in row:
        return None
    listed = cast(Alternatives, row["alternatives"])
    return tuple(
        tuple(HeatmapAlternative(str(one["token"]), float(one["sft_logprob"]), float(one["reward"])) for one in token)
        for token in listed
    )


def _responses(item: Item) -> int:
    return len(item.responses or item.response_ids or [item])


def prompt_shown(item: Item, tokenizer: Tokenizer) -> str:
    """The text before the response, for people: messages are not rendered, ids are decoded."""
    match item.form:
        case "prompt":
            return item.prompt or ""
        case "messages":
            return "\n".join(line for message in (item.messages or [])[:-1] for line in _lines(message))
        case "ids":
            return tokenizer.text_and_spans(item.prompt_ids or [])[0]
        case "stream":
            mask = item.score_mask or []
            first = mask.index(1) if 1 in mask else len(mask)
            return tokenizer.text_and_spans((item.token_ids or [])[:first])[0]
        case _:
            return ""


def _lines(message: ChatMessage) -> Iterator[str]:
    """A message that the chat's encoder has accepted, as people read it."""
    thought = message.reasoning_content or message.reasoning or message.thinking
    if thought:
        yield f"{message.role} thinks: {thought}"
    parts = message.content if isinstance(message.content, list) else [message.content]
    texts = [str(part["text"]) if isinstance(part, dict) else part for part in parts]
    content = "\n".join(text for text in texts if isinstance(text, str))
    if content or not (thought or message.tool_calls):
        yield f"{message.role}: {content}"
    for call in message.tool_calls or ():
        yield f"{message.role} calls: {_call(call)}"


def _call(call: JsonValue) -> str:
    whole = cast(dict[str, JsonValue], call)
    function = cast(dict[str, JsonValue], whole.get("function", whole))  # data sets leave the wrapper out
    arguments = function.get("arguments") or {}
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f"{function['name']}({text})"
