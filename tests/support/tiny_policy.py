"""A tiny random policy over bytes, and sources of token rewards without a service, for tests of training."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from dense_reward.engines.fake import EOS_ID, VOCABULARY, FakeEngine, FakeTokenizer
from dense_reward.manifest import Manifest
from dense_reward.records import Branch, Engine, IdArray, Trunk, Wants
from dense_reward.reward import candidate_reward, signal
from dense_reward.schemas import SignalName
from dense_reward.text.encode import Encoder
from dense_reward_trainer.rl.policy import Policy, PolicyCheckpoint, frozen_logprobs
from dense_reward_trainer.rl.records import ResponseRewards, Rollout
from dense_reward_trainer.rl.reward_service import candidate_signal
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(*, seed: int = 0, vocab_size: int = VOCABULARY, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Two layers; large weights, so that log-probs differ by nats and mistakes show."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(12.0)
    return model.eval()


def tiny_policy(*, seed: int = 0, end_of_turn_id: int = EOS_ID, dtype: torch.dtype = torch.float32) -> Policy:
    return Policy(tiny_llama(seed=seed, dtype=dtype), end_of_turn_id, VOCABULARY)


def tiny_checkpoint(*, seed: int = 0) -> PolicyCheckpoint:
    """A checkpoint as if loaded from a folder: the bytes tokenizer with the plain renderer."""
    stated = {"role": "sft", "run_id": "tiny", "renderer": "plain", "end_of_turn_id": EOS_ID, "vocabulary": VOCABULARY}
    hashes = {"tokenizer_sha256": "fake", "template_sha256": "fake", "files": {}, "probe": ()}
    manifest = Manifest.model_validate({**stated, **hashes, "dtype": "float32", "created_at": "2026-01-01T00:00:00Z"})
    return PolicyCheckpoint(tiny_policy(seed=seed), Encoder.of(FakeTokenizer(), "plain"), manifest)


def ids_of(*ids: int) -> IdArray:
    return np.array(ids, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class EngineRewards:
    """An engine's rewards, without a service."""

    signal: SignalName = "reward"
    engine: Engine = field(default_factory=FakeEngine)

    def score(self, rollouts: Sequence[Rollout], candidates: Sequence[IdArray] | None = None) -> list[ResponseRewards]:
        ids: Sequence[IdArray | None] = [None] * len(rollouts) if candidates is None else candidates
        trunks = [
            Trunk(r.prompt_P, (Branch(r.response_T, np.ones(len(r.response_T), dtype=bool), ids_TK),))
            for r, ids_TK in zip(rollouts, ids, strict=True)
        ]
        rows = [branches[0] for branches in self.engine.prepare(trunks, Wants(kl=True))()]
        return [
            ResponseRewards(
                signal(self.signal, row),
                row.sft_logprob_S,
                row.kl_S,
                candidate_signal(self.signal, candidate_reward(row), row.candidate_sft_logprob_SK, row.kl_S),
                row.candidate_sft_logprob_SK,
            )
            for row in rows
        ]


@dataclass(frozen=True, slots=True)
class PolicyRewards:
    """Rewards of 0, with the log-probs of a given policy as those of the SFT model."""

    sft: Policy

    def score(self, rollouts: Sequence[Rollout], candidates: Sequence[IdArray] | None = None) -> list[ResponseRewards]:
        assert candidates is None
        prompts, responses = [r.prompt_P for r in rollouts], [r.response_T for r in rollouts]
        logprob_BT = frozen_logprobs(self.sft, prompts, responses, 512).numpy()
        rows = [row[: len(ids)] for row, ids in zip(logprob_BT, responses, strict=True)]
        return [ResponseRewards(np.zeros_like(row), row) for row in rows]
