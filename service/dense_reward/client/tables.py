"""Results as tensors and tables. Imports torch and pandas only when they are asked for."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np

from dense_reward.client.pictures import FloatArrayName
from dense_reward.client.results import Scored, ScoredItem, padded
from dense_reward.client.scored_response import ScoredResponse

if TYPE_CHECKING:
    import pandas
    import torch

TOKEN_ARRAYS = (
    "token_ids",
    "reward",
    "sft_logprob",
    "reference_logprob",
    "kl",
    "centred",
    "entropy",
    "varentropy",
    "return_to_go",
)
RESPONSE_COLUMNS = ("item", "response", "length", "sum", "mean", "min", "text", "revision", "error")


def to_torch(scored: Scored, name: FloatArrayName = "reward") -> "tuple[torch.Tensor, torch.Tensor]":
    """float32 [G, T], zero after each response's end, and the bool mask [G, T] of its tokens, on the CPU.

    Raises ValueError if a response failed, or was answered without this array.
    """
    import torch  # noqa: PLC0415 - a caller that uses only numpy needs no torch

    values_GT, mask_GT = padded(scored, name)
    return torch.from_numpy(values_GT), torch.from_numpy(mask_GT)


def to_pandas(
    scored: Scored | ScoredItem | Iterable[ScoredItem], rows: Literal["tokens", "responses"] = "tokens"
) -> "pandas.DataFrame":
    """A table of results: a row for each scored token, or for each response.

    Tokens: item, response, position (0 is the first scored token), then a column for each array of the answer: token,
    start and end (code points in the text), token_id, reward, sft_logprob, reference_logprob, kl, centred, entropy,
    varentropy, return_to_go. A column is left out if no response has it. Failed items have no tokens, so no rows.

    Responses: item, response, length, sum, mean, min, text, revision, error (None, or "code: message"). A failed item
    is one row.
    """
    try:
        import pandas  # noqa: PLC0415 - only this function needs it
    except ImportError:
        raise ImportError("to_pandas needs pandas: pip install pandas") from None
    if rows not in ("tokens", "responses"):
        raise ValueError(f'rows must be "tokens" or "responses", not {rows!r}')
    found = list(_with_revision(scored))
    if rows == "responses":
        return pandas.DataFrame([_response_row(result, of) for result, of in found], columns=list(RESPONSE_COLUMNS))
    results = [result for result, _ in found if result.error is None]
    return pandas.DataFrame({name: column for name, column in _token_columns(results) if column is not None})


def _with_revision(
    scored: Scored | ScoredItem | Iterable[ScoredItem],
) -> Iterator[tuple[ScoredResponse, str | None]]:
    for part in [scored] if isinstance(scored, Scored | ScoredItem) else scored:
        if not isinstance(part, Scored | ScoredItem):
            raise TypeError(f"to_pandas takes the answer of a client or items of score_many, not {type(part).__name__}")
        revision = None if part.model is None else part.model.revision
        if isinstance(part, ScoredItem) and part.error is not None:
            yield ScoredResponse(part.index, None, 0, float("nan"), error=part.error), revision
        yield from ((result, revision) for result in part.results)


def _response_row(result: ScoredResponse, revision: str | None) -> dict[str, object]:
    error = None if result.error is None else f"{result.error.code}: {result.error.message}"
    row = {name: getattr(result, name) for name in RESPONSE_COLUMNS[:7]}
    return row | {"revision": revision, "error": error}


def _token_columns(results: list[ScoredResponse]) -> Iterator[tuple[str, object]]:
    lengths = [result.length for result in results]
    yield "item", np.repeat(np.array([result.item for result in results], dtype=np.int64), lengths)
    yield "response", np.repeat(np.array([result.response or 0 for result in results], dtype=np.int64), lengths)
    yield "position", np.concatenate([np.zeros(0, dtype=np.int64), *(np.arange(length) for length in lengths)])
    yield "token", _texts(results)
    offsets = _stacked(results, "offsets")
    yield "start", None if offsets is None else offsets[:, 0]
    yield "end", None if offsets is None else offsets[:, 1]
    for name in TOKEN_ARRAYS:
        yield name.removesuffix("s") if name == "token_ids" else name, _stacked(results, name)


def _texts(results: list[ScoredResponse]) -> list[str | None] | None:
    if all(result.tokens is None for result in results):
        return None
    texts: list[str | None] = []
    for result in results:
        texts.extend(result.tokens if result.tokens is not None else [None] * result.length)
    return texts


def _stacked(results: list[ScoredResponse], name: str) -> "np.ndarray[tuple[int, ...], np.dtype[np.generic]] | None":
    """The arrays of all responses, one after another; NaN where a response has none. None if no response has it."""
    arrays = [getattr(result, name) for result in results]
    present = next((array for array in arrays if array is not None), None)
    if present is None:
        return None
    shape = present.shape[1:]
    filled = [
        np.full((result.length, *shape), np.nan) if array is None else array
        for result, array in zip(results, arrays, strict=True)
    ]
    return np.concatenate(filled)
