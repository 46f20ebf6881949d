"""A scored request -> a heatmap in the format that its caller asked for."""

from collections.abc import Collection, Mapping, Sequence
from typing import cast

import numpy as np

from dense_reward.errors import refuse
from dense_reward.heatmap import (
    PALETTES,
    HeatmapAlternative,
    HeatmapRow,
    build,
    render_ansi,
    render_html_document,
    render_svg,
)
from dense_reward.schemas import ArrayName, HeatmapRequest, Item
from dense_reward.scoring.rows import Row
from dense_reward.text.encode import Tokenizer

DETAILS: tuple[ArrayName, ...] = ("reward", "sft_logprob", "reference_logprob", "kl", "centred", "entropy")
ARRAYS: tuple[ArrayName, ...] = ("token_ids", "tokens", "offsets", "text", *DETAILS)
FROM_BOTH = frozenset({"kl", "centred", "entropy"})
"""Of these, what needs whole distributions, which not every engine has."""
MEDIA_TYPES = {"html": "text/html", "svg": "image/svg+xml", "ansi": "text/plain"}


def with_arrays(request: HeatmapRequest, quantities: Collection[str]) -> HeatmapRequest:
    """The request as it must be scored to be drawn, without what its engine, which has `quantities`, cannot give.

    Raises RequestError for an option that makes no picture.
    """
    if request.palette not in PALETTES:
        raise refuse(
            "invalid_request", f"palette {request.palette!r}: choose one of {sorted(PALETTES)}", param="palette"
        )
    given = [name for name in ARRAYS if name not in FROM_BOTH or name in quantities]
    whole = request.model_copy(update={"include": given})
    if request.format == "json":
        return whole if request.include is None else request
    if request.format == "svg" and not request.compare and sum(map(_responses, request.listed())) > 1:
        raise refuse("invalid_request", "an svg is one picture: ask with compare, or one by one", param="compare")
    if request.encoding_format == "base64":
        raise refuse("invalid_request", "a picture holds no arrays: remove encoding_format", param="encoding_format")
    if request.on_error == "per_item":
        raise refuse("invalid_request", "a picture is drawn whole or not at all: remove on_error", param="on_error")
    return whole


def draw(request: HeatmapRequest, rows: Sequence[Row], tokenizer: Tokenizer) -> str:
    """The picture of all responses, on one colour scale or, without `compare`, each on its own."""
    drawn = heatmap_rows(request, rows, tokenizer)
    groups = [drawn] if request.compare else [[row] for row in drawn]
    heatmaps = [build(group, signal=request.signal, palette=request.palette) for group in groups]
    if request.format == "svg":
        return render_svg(heatmaps[0])
    if request.format == "ansi":
        return "\n".join(render_ansi(heatmap) for heatmap in heatmaps)
    return render_html_document(heatmaps)


def heatmap_rows(request: HeatmapRequest, rows: Sequence[Row], tokenizer: Tokenizer) -> list[HeatmapRow]:
    """What is drawn of each response of a request that was scored `with_arrays`."""
    items = request.listed()
    return [_row(row, items[cast(int, row["item"])], request, tokenizer, len(rows)) for row in rows]


def _row(row: Row, item: Item, request: HeatmapRequest, tokenizer: Tokenizer, count: int) -> HeatmapRow:
    text = str(row["text"])
    offsets = cast(np.ndarray[tuple[int, int], np.dtype[np.int32]], row["offsets"]).tolist()
    ids = tuple(int(i) for i in _array(row, "token_ids").tolist())
    names = cast(list[str], row["tokens"])
    pieces = tuple(
        names[t] if ids[t] in tokenizer.special_ids and start == end else text[start:end]
        for t, (start, end) in enumerate(offsets)
    )
    return HeatmapRow(
        title=f"response {cast(int, row['response']) + 1}" if count > 1 else "response",
        prompt=_prompt(item, tokenizer),
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
    listed = cast(list[list[Mapping[str, str | float]]], row["alternatives"])
    return tuple(
        tuple(HeatmapAlternative(str(one["token"]), float(one["sft_logprob"]), float(one["reward"])) for one in token)
        for token in listed
    )


def _responses(item: Item) -> int:
    return len(item.responses or item.response_ids or [item])


def _prompt(item: Item, tokenizer: Tokenizer) -> str:
    """What stands before the response, for people."""
    match item.form:
        case "prompt":
            return item.prompt or ""
        case "messages":
            return "\n".join(f"{message.role}: {message.content}" for message in (item.messages or [])[:-1])
        case "ids":
            return tokenizer.text_and_spans(item.prompt_ids or [])[0]
        case "stream":
            mask = item.score_mask or []
            first = mask.index(1) if 1 in mask else len(mask)
            return tokenizer.text_and_spans((item.token_ids or [])[:first])[0]
        case _:
            return ""
