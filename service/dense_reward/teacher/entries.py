"""vLLM's prompt_logprobs as JSON. Bytes are joined: an object for each log-prob would take several times as long.

{"ID": {"logprob": nats, "rank": 1}, ...} for each token, the token itself first, then the likeliest ids.

Shapes: N tokens of a part, K likeliest ids at each.
"""

from collections.abc import Iterator

import numpy as np
import orjson
from numpy.typing import NDArray

from dense_reward.records import FloatArray, IdArray, TeacherScores

PART_ENTRIES = 16_384
"""Log-probs that are written at once: a part holds the GIL for milliseconds."""
_OPEN, _LOGPROB, _RANK = b',"', b'":{"logprob":', b',"rank":%d}'
_PIECES = 5
"""Pieces of an entry: _OPEN, its id, _LOGPROB, its log-prob, _RANK."""


def entries_json(ids_S: IdArray, scores: TeacherScores) -> Iterator[bytes]:
    """The object of each token. Ids with probability 0 are left out: they come last."""
    k = scores.top_ids_SK.shape[1]
    size = max(1, PART_ENTRIES // (1 + k))
    suffixes = [_RANK % place for place in range(1, k + 1)]
    for start in range(0, len(ids_S), size):
        part = slice(start, start + size)
        yield from _part(ids_S[part], scores, part, suffixes)


def _part(ids_N: IdArray, scores: TeacherScores, part: slice, suffixes: list[bytes]) -> Iterator[bytes]:
    top_ids_NK, top_logprob_NK = scores.top_ids_SK[part], scores.top_logprob_SK[part]
    pieces = _pieces(top_ids_NK, top_logprob_NK, suffixes)
    width = _PIECES * len(suffixes)
    possible_N = (top_logprob_NK > -np.inf).sum(axis=1).tolist()
    own_NK = top_ids_NK == ids_N[:, None]
    places = np.where(own_NK.any(axis=1), own_NK.argmax(axis=1) if len(suffixes) else 0, -1).tolist()
    # a token outside the likeliest ids comes after them, also where log-probs are equal
    ranks = np.maximum(scores.rank_S[part], len(suffixes) + 1).tolist()
    own = zip(_numbers(ids_N), _numbers(scores.logprob_S[part]), places, ranks, possible_N, strict=True)
    for at, (token, logprob, place, rank, possible) in enumerate(own):
        row = pieces[at * width : at * width + _PIECES * possible]
        first = _PIECES * place
        if not 0 <= place < possible:
            itself, others = [token, _LOGPROB, logprob, _RANK % rank], row
        else:
            itself, others = row[first + 1 : first + _PIECES], row[:first] + row[first + _PIECES :]
        yield b'{"%b%b}' % (b"".join(itself), b"".join(others))


def _pieces(ids_NK: IdArray, logprob_NK: FloatArray, suffixes: list[bytes]) -> list[bytes]:
    """The pieces of all entries in order, each with its comma."""
    pieces = [b""] * (_PIECES * ids_NK.size)
    if pieces:
        pieces[0::_PIECES] = [_OPEN] * ids_NK.size
        pieces[1::_PIECES] = _numbers(ids_NK)
        pieces[2::_PIECES] = [_LOGPROB] * ids_NK.size
        pieces[3::_PIECES] = _numbers(logprob_NK)
        pieces[4::_PIECES] = suffixes * len(ids_NK)
    return pieces


def _numbers(array: NDArray[np.generic]) -> list[bytes]:
    """JSON of each number: the shortest decimal that gives it back; null for an infinity, which is not written."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return orjson.dumps(flat, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].split(b",")
