"""A decoded sequence, prompt and response in one text -> the ids of both. Pure; takes a tokenizer through a Protocol.

For callers that send only text of which they have the ids (OpenRLHF). The ids are those that the tokenizer gives the
text: a policy that split the same words otherwise is scored as if it had not.
"""

from collections.abc import Collection

import numpy as np

from dense_reward.errors import refuse
from dense_reward.records import IdArray
from dense_reward.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"


def split_ids(
    tokenizer: Tokenizer, text: str, prompt: str, max_tokens: int, ends: Collection[int | None] = ()
) -> tuple[IdArray, IdArray]:
    """Ids of `prompt`, and of what follows it in `text`; special-token strings in both are special tokens.

    Nothing is added, neither BOS nor an end of turn: the text has all tokens that the policy saw and wrote. `ends` are
    ids that end a turn of the policy, beside the tokenizer's EOS.
    Raises RequestError if the ids would not be those of the text, or could be others.
    """
    _check_bytes(tokenizer, text, max_tokens)
    _check_bytes(tokenizer, prompt, max_tokens)
    prompt_P = tokenizer.encode(prompt, special=True, at_most=max_tokens).ids
    decoded = tokenizer.text(prompt_P)  # what the caller decoded too: it can differ from the prompt
    if not text.startswith(decoded):
        message = "the query does not start with its prompt: was the prompt cut to fit the context? Allow longer ones,"
        raise refuse("invalid_request", f"{message} or send ids to /score", param="query")
    response = text[len(decoded) :]
    if REPLACEMENT in response:
        message = "the response has U+FFFD, which stands for bytes that are no character, so its ids are not known"
        raise refuse("invalid_unicode", f"{message}: send ids to /score", param="query")
    response_T = tokenizer.encode(response, special=True, continues=True, at_most=max_tokens).ids
    if tokenizer.text((*prompt_P, *response_T)) != text:
        message = "the ids of this query decode to another text, so they are not those of the policy"
        raise refuse("invalid_request", f"{message}: send ids to /score", param="query")
    if not {tokenizer.eos_id, *ends}.isdisjoint(response_T[:-1]):
        message = "the query goes on after an end of turn, so not all that follows the prompt is the policy's"
        raise refuse("invalid_request", f"{message}: send ids with a score_mask to /score", param="query")
    return np.array(prompt_P, dtype=np.int32), np.array(response_T, dtype=np.int32)


def _check_bytes(tokenizer: Tokenizer, text: str, max_tokens: int) -> None:
    """Refuses a text that cannot fit before it is tokenised, which costs more than to count its bytes."""
    if len(text.encode()) > max_tokens * tokenizer.longest_token_bytes:
        message = f"the query has more text than {max_tokens} tokens can hold (--max-length-tokens)"
        raise refuse("too_long", f"{message}: shorten it, nothing is truncated here", param="query")
