"""Responses sampled from a policy, as exact ids. Reproducible: samples depend only on the seed and the inputs.

Must not know rewards or jobs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from dense_reward.records import IdArray
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, MinPLogitsWarper, PreTrainedModel, TopPLogitsWarper

from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.rl.policy import Policy, frozen_logprobs, microbatches, own_actions, state_logprobs
from dense_reward_trainer.rl.records import OnBatch, Rollout
from dense_reward_trainer.rl.tilt import TiltedSampling
from dense_reward_trainer.runs.progress import Progress


@dataclass(frozen=True, slots=True)
class Sampling:
    """How responses are sampled: `group_size` to each prompt, at most `max_new_tokens` long.

    `greedy` takes the likeliest token each time and ignores the temperature. `batch_size`: responses generated in
    parallel. `top_p`: only the likeliest tokens that together have this probability (nucleus sampling, arXiv
    1904.09751); 1: all. `min_p`: only tokens with this share of the probability of the likeliest (arXiv 2407.01082);
    0: all. Both act after the temperature, top_p first.
    """

    max_new_tokens: int
    group_size: int = 1
    temperature: float = 1.0
    greedy: bool = False
    batch_size: int = 64
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def truncates(self) -> bool:
        """Whether some tokens are never sampled in some states."""
        return self.top_p < 1 or self.min_p > 0


def sample(
    policy: Policy, prompts: Sequence[IdArray], sampling: Sampling, seed: int, on_batch: OnBatch | None = None
) -> list[Rollout]:
    """`group_size` rollouts to each prompt, in the order of the prompts. Leaves the global random state unchanged.

    `on_batch` is called with each batch. Raises ConfigError if a prompt is empty or leaves no room for
    `max_new_tokens` below the model's limit.
    """
    _check(policy, prompts, sampling)
    rows = [prompt for prompt in prompts for _ in range(sampling.group_size)]
    devices = [policy.device] if policy.device.type == "cuda" else []
    rollouts: list[Rollout] = []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), policy.precision(), plain_generation(policy.model):
        torch.manual_seed(seed)
        for start in range(0, len(rows), sampling.batch_size):
            batch = _sample_batch(policy, rows[start : start + sampling.batch_size], sampling)
            rollouts += batch
            if on_batch is not None:
                on_batch(batch)
    return rollouts


def counted(progress: Progress) -> OnBatch:
    """Counts the rollouts of each batch, and their tokens."""
    return lambda batch: progress.advance(len(batch), tokens=sum(len(rollout.response_T) for rollout in batch))


@torch.no_grad()
def sampled_logprobs(policy: Policy, rollouts: Sequence[Rollout], sampling: Sampling, microbatch_tokens: int) -> Tensor:
    """log-prob of each token of samples under the distribution that they were sampled from, [B, T], on the CPU.

    In nats; 0 after the end of a response. If `sampling` truncates, normalised over the tokens that it keeps. A sampled
    token always counts as kept: another batch rounds otherwise, which can put a token at the boundary outside.
    """
    prompts, responses = [r.prompt_P for r in rollouts], [r.response_T for r in rollouts]
    if not sampling.truncates:
        return frozen_logprobs(policy, prompts, responses, microbatch_tokens, sampling.temperature)
    own_BT1 = own_actions(responses)
    logprob_BT = torch.zeros(own_BT1.shape[:2], dtype=torch.promote_types(policy.model.dtype, torch.float32))
    lengths = [len(prompt) + len(ids) for prompt, ids in zip(prompts, responses, strict=True)]
    for rows in microbatches(lengths, microbatch_tokens):
        parts = [prompts[b] for b in rows], [responses[b] for b in rows]
        (row_N, step_N), logprob_NV = state_logprobs(policy, *parts, sampling.temperature)
        place = torch.tensor(rows)[row_N.cpu()], step_N.cpu()
        own_N1 = own_BT1[place].to(policy.device)
        kept_NV = _truncated(logprob_NV[:, : policy.vocab_size], sampling)
        kept_NV = kept_NV.scatter(1, own_N1, logprob_NV.gather(1, own_N1))
        logprob_BT[place] = kept_NV.log_softmax(dim=-1).gather(1, own_N1)[:, 0].cpu()
    return logprob_BT


def _truncated(logprob_NV: Tensor, sampling: Sampling) -> Tensor:
    """The log-probs of the tokens that top_p and then min_p keep, -inf for the others, as in `generate`."""
    ids_N0 = torch.empty(len(logprob_NV), 0, dtype=torch.long)  # the ids so far, which truncation does not read
    if sampling.top_p < 1:
        logprob_NV = TopPLogitsWarper(sampling.top_p)(ids_N0, logprob_NV)
    if sampling.min_p > 0:
        logprob_NV = MinPLogitsWarper(sampling.min_p)(ids_N0, logprob_NV)
    return logprob_NV


def generation_config(policy: Policy, sampling: Sampling) -> GenerationConfig:
    """The policy's own distribution at a temperature, truncated as `sampling` says: no top-k, no penalty."""
    options: dict[str, float | None] = {}
    if not sampling.greedy:
        options = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        options["min_p"] = sampling.min_p or None
    # suppress output rows beyond the tokenizer: their ids have no text
    unknown = list(range(policy.vocab_size, policy.model.config.get_text_config().vocab_size))
    return GenerationConfig(
        do_sample=not sampling.greedy,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=policy.end_of_turn_id,
        pad_token_id=policy.end_of_turn_id,
        suppress_tokens=unknown or None,
        **options,
    )


def left_padded(prompts: Sequence[IdArray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, [B, P], padded on the left, so that all prompts end where sampling starts."""
    longest = max(len(prompt) for prompt in prompts)
    ids_BP = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask_BP = torch.zeros_like(ids_BP)
    for row, prompt in enumerate(prompts):
        ids_BP[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        mask_BP[row, longest - len(prompt) :] = 1
    return ids_BP.to(device), mask_BP.to(device)


@contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Replaces the checkpoint's own generation settings by the defaults while sampling.

    `generate` uses them for every option that a call does not set. With a shipped top_k or repetition penalty, the
    samples would come from a different distribution than the one whose log-probs are differentiated.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def cut_at_end_of_turn(generated_T: IdArray, end_of_turn_id: int) -> tuple[IdArray, bool]:
    """The generated ids up to and including the first end of turn, and whether there is one; the rest is padding."""
    ends = np.flatnonzero(generated_T == end_of_turn_id)
    if len(ends) == 0:
        return generated_T, False
    return generated_T[: int(ends[0]) + 1], True


def _sample_batch(policy: Policy, prompts: Sequence[IdArray], sampling: Sampling) -> list[Rollout]:
    ids_BP, mask_BP = left_padded(prompts, policy.device)
    tilts = [] if policy.tilt is None else [TiltedSampling(policy.tilt, mask_BP)]
    output_BL: Tensor = policy.model.generate(
        input_ids=ids_BP,
        attention_mask=mask_BP,
        generation_config=generation_config(policy, sampling),
        logits_processor=LogitsProcessorList(tilts),
    )
    generated_BT = output_BL[:, ids_BP.shape[1] :].to(torch.int32).cpu().numpy()
    return [
        Rollout(prompt, *cut_at_end_of_turn(generated_T, policy.end_of_turn_id))
        for prompt, generated_T in zip(prompts, generated_BT, strict=True)
    ]


def _check(policy: Policy, prompts: Sequence[IdArray], sampling: Sampling) -> None:
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ConfigError(f"prompt {index} is empty: give it at least one token")
        room = policy.limit_tokens - len(prompt)
        if sampling.max_new_tokens > room:
            raise ConfigError(
                f"prompt {index} has {len(prompt)} tokens, which with max_new_tokens {sampling.max_new_tokens} is over "
                f"the model's limit of {policy.limit_tokens}: lower max_new_tokens to {room}, or remove the prompt"
            )
