"""Requests rewards from a release and checks them: the command of `helm test`.

Usage: python3 ask.py URL PATIENCE_S [KEYS], with the API key in REWARD_KEY, or in KEYS, the service's list of keys.
Exits with a message or an exception if a response is wrong.
"""

import json
import os
import sys
from pathlib import Path

import httpx2
import numpy as np
from dense_reward import Client, ScoreOptions

PROMPT = "Add 478 and 365."
RESPONSES = ["8+5=13 write 3 carry 1", "8+5=15 write 3 carry 1"]


def main() -> None:
    url, patience_s = sys.argv[1], float(sys.argv[2])
    # The cluster's own authority can have signed the certificate. This test checks rewards, not certificates.
    transport = httpx2.HTTPTransport(verify=False) if url.startswith("https:") else None
    key = first_key(Path(sys.argv[3])) if len(sys.argv) > 3 else os.environ.get("REWARD_KEY")
    with Client(url, api_key=key, retry_for_s=patience_s, transport=transport) as client:
        client.wait_until_ready(patience_s)
        for card in client.models():
            check(client, card.name)


def first_key(keys: Path) -> str:
    """The first key of the list that may score."""
    for entry in json.loads(keys.read_text()):
        if "score" in entry.get("rights", ["score"]):
            return str(entry["key"])
    sys.exit(f"{keys} has no key with the right to score: add one, or set test.apiKey")


def check(client: Client, model: str) -> None:
    """Checks that two responses get one finite reward per token. The client compares it with the log-probs."""
    options = ScoreOptions(model=model, include=["reward", "sft_logprob", "reference_logprob"])
    scored = client.score(prompt=PROMPT, responses=RESPONSES, options=options)
    if len(scored.results) != len(RESPONSES):
        sys.exit(f"{model}: got {len(scored.results)} results for {len(RESPONSES)} responses")
    for result in scored.results:
        reward = np.asarray(result.reward)
        if not len(reward) or len(reward) != result.length:
            sys.exit(f"{model}: got {len(reward)} rewards for {result.length} tokens")
        if not np.isfinite(reward).all():
            sys.exit(f"{model}: a reward is not finite")
        sys.stdout.write(f"{model}: {len(reward)} rewards, {reward.min():.3f} to {reward.max():.3f} nats\n")


if __name__ == "__main__":
    main()
