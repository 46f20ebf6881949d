"""Texts of any length -> tokens, without keeping other threads from running and without tokenising what is refused."""

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from dense_reward.cancellation import check_cancelled
from dense_reward.errors import refuse

LONG_CHARACTERS = 4_096
"""Longer texts are tokenised without the GIL, which tokenizers (0.23) holds if it is given a single text."""
WINDOW_CHARACTERS_PER_TOKEN, CERTAIN = 8, 2
"""The windows of a text have about as many tokens as the text; CERTAIN times too many cannot be due to the cuts."""


def encoding_of(backend: Backend, text: str, at_most: int | None) -> Encoding:
    """The tokens of a text, without any that the tokenizer adds.

    Raises RequestError(too_long) for a long text with more than `at_most` tokens. It is made known by windows of the
    text, so that no object is made of millions of tokens: to free it takes as long as to tokenise, with the GIL held.
    """
    if len(text) <= LONG_CHARACTERS:
        return backend.encode(text, add_special_tokens=False)
    if at_most is not None:
        size = WINDOW_CHARACTERS_PER_TOKEN * at_most
        tokens = 0
        for at in range(0, len(text) if len(text) > size else 0, size):
            check_cancelled()
            tokens += len(_without_gil(backend, text[at : at + size]))
            if tokens > CERTAIN * at_most:
                raise refuse("too_long", _too_long(f"more than {CERTAIN * at_most}", at_most))
    encoding = _without_gil(backend, text)
    if at_most is not None and len(encoding) > at_most:
        raise refuse("too_long", _too_long(str(len(encoding)), at_most))
    return encoding


def _without_gil(backend: Backend, text: str) -> Encoding:
    encoding: Encoding
    (encoding,) = backend.encode_batch([text], add_special_tokens=False)
    return encoding


def _too_long(tokens: str, at_most: int) -> str:
    message = f"a text has {tokens} tokens; the limit is {at_most} (--max-length-tokens)"
    return f"{message}: shorten it, nothing is truncated here"
