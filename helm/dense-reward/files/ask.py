"""Asks a release for rewards, as `helm test` does: python3 ask.py URL PATIENCE_S, with the key in REWARD_KEY.

Ends with an exception where an answer is not as it must be.
"""

import os
import sys

import httpx
import numpy as np
from dense_reward import Client, ScoreOptions

PROMPT = "Add 478 and 365."
RESPONSES = ["8+5=13 write 3 carry 1", "8+5=15 write 3 carry 1"]


def main() -> None:
    url, patience_s = sys.argv[1], float(sys.argv[2])
    # The certificate may be of the cluster's own authority: what is tested here is the rewards.
    transport = httpx.HTTPTransport(verify=False) if url.startswith("https:") else None
    key = os.environ.get("REWARD_KEY")
    with Client(url, api_key=key, retry_for_s=patience_s, transport=transport) as client:
        client.wait_until_ready(patience_s)
        for card in client.models():
            check(client, card.name)


def check(client: Client, model: str) -> None:
    """Two responses to one prompt have a finite reward for each token, which is the difference of the log-probs."""
    options = ScoreOptions(model=model, include=["reward", "sft_logprob", "reference_logprob"])
    scored = client.score(prompt=PROMPT, responses=RESPONSES, options=options)
    if len(scored.results) != len(RESPONSES):
        sys.exit(f"{model}: {len(scored.results)} results for {len(RESPONSES)} responses")
    for result in scored.results:
        reward, sft, reference = map(np.asarray, (result.reward, result.sft_logprob, result.reference_logprob))
        if not len(reward) or len(reward) != result.length:
            sys.exit(f"{model}: {len(reward)} rewards for {result.length} tokens")
        if not np.isfinite(reward).all() or not np.allclose(reward, sft - reference, atol=1e-4):
            sys.exit(f"{model}: rewards are not the differences of finite log-probs")
        sys.stdout.write(f"{model}: {len(reward)} rewards, {reward.min():.3f} to {reward.max():.3f} nats\n")


if __name__ == "__main__":
    main()
