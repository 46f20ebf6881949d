"""How many tokens the service computes for conversations that begin alike, compared with those that are distinct.

Several requests arrive at once, one for each conversation, all with one system prompt. A request scores every answer of
its conversation, as multi-turn RL does: the prompt of an answer is all that precedes it.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bench.speed.contestants import Service
from bench.speed.results import Conversations

REQUESTS, TURNS = 32, 6
SYSTEM_TOKENS, USER_TOKENS, ANSWER_TOKENS = 128, 64, 128
COMPUTED = "dense_reward_computed_tokens_total"
Item = dict[str, object]


def conversations(service: Service, vocab_size: int) -> Conversations:
    """Sends all requests at once, and reads the service's own count of computed tokens."""
    requests = [_items(at, vocab_size) for at in range(REQUESTS)]
    with service.client() as client, ThreadPoolExecutor(REQUESTS) as threads:
        before = service.metric(COMPUTED)
        list(threads.map(client.score_items, requests))
        computed = int(service.metric(COMPUTED) - before)
    return Conversations(requests=REQUESTS, turns=TURNS, computed_tokens=computed, distinct_tokens=distinct_tokens())


def distinct_tokens() -> int:
    """Tokens that differ in their id or in what precedes them. The last one of a conversation is only predicted."""
    return SYSTEM_TOKENS + REQUESTS * (TURNS * (USER_TOKENS + ANSWER_TOKENS) - 1)


def _items(conversation: int, vocab_size: int) -> list[Item]:
    system = np.random.default_rng(0).integers(0, vocab_size, SYSTEM_TOKENS).tolist()
    random = np.random.default_rng(1 + conversation)
    items: list[Item] = []
    before = system
    for _ in range(TURNS):
        user, answer = (random.integers(0, vocab_size, tokens).tolist() for tokens in (USER_TOKENS, ANSWER_TOKENS))
        items.append({"prompt_ids": before + user, "response_ids": [answer]})
        before = before + user + answer
    return items
