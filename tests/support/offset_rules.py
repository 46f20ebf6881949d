"""Rules for the offsets of any text, from any tokenizer."""

from collections.abc import Sequence
from itertools import pairwise

from dense_reward.text.offsets import Span


def assert_covering(spans: Sequence[Span], length: int) -> None:
    """Spans are monotone, without gaps, and cover the text from its first code point to its last."""
    assert all(start <= end for start, end in spans)
    assert all(left[1] == right[0] for left, right in pairwise(spans))
    assert not spans or (spans[0][0], spans[-1][1]) == (0, length)
