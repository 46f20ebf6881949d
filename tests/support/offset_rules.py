"""What holds for the offsets of any text, whatever tokenizer made them."""

from collections.abc import Sequence
from itertools import pairwise

from dense_reward.text.offsets import Span


def assert_covering(spans: Sequence[Span], length: int) -> None:
    """Monotone, gapless, from the first code point to the last."""
    assert all(start <= end for start, end in spans)
    assert all(left[1] == right[0] for left, right in pairwise(spans))
    assert not spans or (spans[0][0], spans[-1][1]) == (0, length)
