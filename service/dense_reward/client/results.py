"""The results of a client: typed, with numpy arrays, in nats. Pure; knows no HTTP.

Shapes: T scored tokens of a response, G responses.
"""

from dataclasses import dataclass

import numpy as np

from dense_reward.client.errors import ItemError
from dense_reward.client.pictures import Drawn, FloatArrayName, Pictured
from dense_reward.client.scored_response import ScoredResponse
from dense_reward.records import BoolArray, FloatArray


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What computed an answer: a pair, or a token head, whose `sft` and `reference` are None.

    `related`: both checkpoints come from one run.
    """

    name: str
    sft: str | None
    reference: str | None
    tokenizer_sha256: str
    revision: str
    related: bool
    token_head: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts: of the prompts (one per item), of the responses, and of the scored tokens in them."""

    prompt_tokens: int
    response_tokens: int
    scored_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the service spent the time of a request, in seconds. It holds every timing of the answer.

    `encode_s`: checks and tokenisation. `queue_s`: until its first batch began. `compute_s`: its batches. `describe_s`:
    building the rows of the answer.
    """

    encode_s: float
    queue_s: float
    compute_s: float
    describe_s: float
    total_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Scored(Pictured):
    """The answer to one request: results in the order of the items and their responses. Notebooks show a heatmap."""

    id: str
    model: ServedModel
    results: tuple[ScoredResponse, ...]
    usage: Usage
    timing: Timing

    def _drawn(self) -> Drawn:
        return Drawn(self.results, self.model.token_head is not None)


@dataclass(frozen=True, slots=True, eq=False)
class ScoredItem(Pictured):
    """One item of `score_many`: `index` 0, 1, 2, ... among the items, and a result for each of its responses.

    If `error` is set (only with on_error "per_item") the item failed: no results, and no model.
    """

    index: int
    model: ServedModel | None
    results: tuple[ScoredResponse, ...]
    error: ItemError | None = None

    def _drawn(self) -> Drawn:
        return Drawn(self.results, self.model is not None and self.model.token_head is not None)


def padded(scored: Scored, name: FloatArrayName = "reward") -> tuple[FloatArray, BoolArray]:
    """One array of all responses as [G, T], zero after each response's end, and the mask [G, T] of its tokens.

    Raises ValueError if a response failed, or was answered without this array.
    """
    rows = [_present(result, name) for result in scored.results]
    lengths_G = np.array([len(row) for row in rows], dtype=np.int64)
    mask_GT = np.arange(lengths_G.max(initial=0)) < lengths_G[:, None]
    values_GT = np.zeros(mask_GT.shape, dtype=np.float32)
    values_GT[mask_GT] = np.concatenate([np.zeros(0, dtype=np.float32), *rows])
    return values_GT, mask_GT


def _present(result: ScoredResponse, name: FloatArrayName) -> FloatArray:
    if result.error is not None:
        raise ValueError(f"item {result.item} failed: {result.error.message}: leave it out before padding")
    array: FloatArray | None = getattr(result, name)
    if array is None:
        raise ValueError(f"item {result.item} was answered without {name}: request it with include")
    return array
