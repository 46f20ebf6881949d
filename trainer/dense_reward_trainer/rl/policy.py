"""A policy: a causal language model that is sampled from and trained, and its log-probs with gradient.

B responses, right-padded to T tokens; N response tokens of a batch; M actions at each; V ids. Dropout is always off,
because the gradient must be that of the distribution that was sampled from. Must not know rewards or jobs.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from dense_reward.engines.proof import encoder_of
from dense_reward.engines.tokenizer import load_tokenizer
from dense_reward.engines.torch.weights import load_weights, weight_folders
from dense_reward.errors import CheckpointError
from dense_reward.manifest import Manifest, files_folder, load_manifest, verify_files
from dense_reward.records import IdArray
from dense_reward.text.encode import Encoder
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from dense_reward_trainer.configs.dpr import Precision
from dense_reward_trainer.rl.tilt import Tilt
from dense_reward_trainer.runs.progress import busy


@dataclass(frozen=True, slots=True, eq=False)
class Policy:
    """A model and the id that ends its turn.

    `vocab_size`: ids of the tokenizer, 0 to vocab_size - 1; output rows beyond them are never sampled.
    `autocast`: weights and optimiser stay float32, and the model computes in bfloat16. `tilt`: the policy is the model
    tilted away from a reference; it can be sampled and measured, but not trained.
    """

    model: PreTrainedModel
    end_of_turn_id: int
    vocab_size: int
    autocast: bool = False
    tilt: Tilt | None = None

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def limit_tokens(self) -> int:
        """The maximum of prompt and response tokens together; with a tilt, the smaller one of both models."""
        models = [self.model] if self.tilt is None else [self.model, self.tilt.reference]
        return min(int(getattr(m.config.get_text_config(), "max_position_embeddings", 1 << 20)) for m in models)

    def precision(self) -> AbstractContextManager[None]:
        """Context in which the model runs, for sampling and for gradients: autocast or not."""
        context: AbstractContextManager[None] = torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.autocast
        )
        return context


@dataclass(frozen=True, slots=True, eq=False)
class PolicyCheckpoint:
    """A policy, the encoder of its text, and the manifest of its checkpoint."""

    policy: Policy
    encoder: Encoder
    manifest: Manifest


def load_policy(folder: Path, *, precision: Precision, device: str) -> PolicyCheckpoint:
    """Load a checkpoint to train or measure; its files are verified against its manifest, and an adapter is merged.

    bfloat16 means float32 weights under autocast: with bfloat16 weights, updates as small as those of a policy gradient
    would round to nothing. Raises CheckpointError, naming the cure.
    """
    manifest = load_manifest(folder)
    with busy(f"hashing {folder}"):
        verify_files(folder, manifest)
    encoder = load_encoder(folder, manifest)
    dtype = torch.float64 if precision == "float64" else torch.float32
    disable_progress_bar()  # the bar of loading weights would mix with the bars of the job
    with busy(f"loading {folder}"):
        model = load_weights(*weight_folders(folder, manifest), dtype).requires_grad_(True)
    vocab_size = min(encoder.tokenizer.vocab_size, manifest.vocabulary)
    policy = Policy(model.eval().to(device), end_of_turn_of(folder, manifest), vocab_size, precision == "bfloat16")
    return PolicyCheckpoint(policy, encoder, manifest)


def load_encoder(folder: Path, manifest: Manifest) -> Encoder:
    """The encoder of a checkpoint's text, without its weights.

    Raises CheckpointError if the tokenizer is another one or has no end of turn, or if the manifest leaves open what
    precedes a response.
    """
    end_of_turn_of(folder, manifest)
    tokenizer = load_tokenizer(files_folder(folder, manifest))
    if tokenizer.sha256() != manifest.tokenizer_sha256:
        raise CheckpointError(f"{folder}: its tokenizer is not the one of its manifest: adopt the checkpoint again")
    encoder = encoder_of(tokenizer, manifest, folder)
    undecided = encoder.undecided("flags")
    if undecided is not None:
        raise CheckpointError(f"{folder}: {undecided}")
    return encoder


def end_of_turn_of(folder: Path, manifest: Manifest) -> int:
    """The id that ends a response. Raises CheckpointError if there is none."""
    if manifest.end_of_turn_id is None:
        raise CheckpointError(f"{folder}: its tokenizer has no end of turn, so no response could ever finish")
    return manifest.end_of_turn_id


def policy_logprobs(
    policy: Policy, prompts: Sequence[IdArray], responses: Sequence[IdArray], temperature: float = 1.0
) -> Tensor:
    """log pi(a_t|s_t) of the given responses, [B, T] with gradient, in nats; 0 after the end of a response."""
    return action_logprobs(policy, prompts, responses, own_actions(responses), temperature)[..., 0]


def own_actions(responses: Sequence[IdArray]) -> Tensor:
    """The ids of the responses as the only action of each position, [B, T, 1]; 0 after the end of a response."""
    return _padded(responses)[..., None]


def action_logprobs(
    policy: Policy,
    prompts: Sequence[IdArray],
    responses: Sequence[IdArray],
    ids_BTM: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """log pi(a|s_t) of M actions at every position of the given responses, [B, T, M] with gradient, in nats.

    Teacher-forced in one forward pass, padded on the right, log-softmax at least in float32; 0 after the end of a
    response. Prompts have at least one token.

    Normalised over all output rows, including those beyond the tokenizer, as the service normalises pi_sft: for equal
    weights, log pi - log pi_sft is 0. Those rows are never sampled, so the probabilities under which samples are drawn
    are larger by a factor that depends only on the state and is close to 1: its gradient is left out.
    """
    place, logprobs_NV = state_logprobs(policy, prompts, responses, temperature)
    logprob_NM = logprobs_NV.gather(1, ids_BTM.to(policy.device)[place])
    return logprob_NM.new_zeros(ids_BTM.shape).index_put(place, logprob_NM)


def state_logprobs(
    policy: Policy, prompts: Sequence[IdArray], responses: Sequence[IdArray], temperature: float
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The row and the position of each response token in [B, T], both [N], and log pi of every id there, [N, V]."""
    sequences = [np.concatenate(pair) for pair in zip(prompts, responses, strict=True)]
    ids_BL = _padded(sequences).to(policy.device)
    first = min(len(prompt) for prompt in prompts) - 1
    row_N = torch.tensor([b for b, ids in enumerate(responses) for _ in ids], device=policy.device)
    step_N = torch.tensor([t for ids in responses for t in range(len(ids))], device=policy.device)
    start_B = torch.tensor([len(prompt) for prompt in prompts], device=policy.device)
    # position p predicts token p + 1, hence - 1
    at = row_N, start_B[row_N] + step_N - 1 - first
    with policy.precision():
        logits_NV = _logits_from(policy.model, ids_BL, first)[at]
        reference_NV = None if policy.tilt is None else _logits_from(policy.tilt.reference, ids_BL, first)[at]
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    if policy.tilt is not None and reference_NV is not None:
        logits_NV = policy.tilt(logits_NV, reference_NV)
    return (row_N, step_N), torch.log_softmax(logits_NV / temperature, dim=-1)


def _logits_from(model: PreTrainedModel, ids_BL: Tensor, first: int) -> Tensor:
    """Logits at the positions from `first` on, [B, L - first, V]; the output layer skips those before."""
    logits: Tensor = model(input_ids=ids_BL, use_cache=False, logits_to_keep=ids_BL.shape[1] - first).logits
    return logits


def microbatches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Batches of rows of similar length: at most `tokens` each, padding included, or a single longer row."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if batch and (len(batch) + 1) * lengths[row] > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def frozen_logprobs(
    policy: Policy,
    prompts: Sequence[IdArray],
    responses: Sequence[IdArray],
    microbatch_tokens: int,
    temperature: float = 1.0,
) -> Tensor:
    """log pi(a_t|s_t) of any number of responses, in microbatches, [B, T] without gradient, on the CPU."""
    return likeliest_actions(policy, prompts, responses, 0, microbatch_tokens, temperature=temperature)[1][..., 0]


@torch.no_grad()
def likeliest_actions(
    policy: Policy,
    prompts: Sequence[IdArray],
    responses: Sequence[IdArray],
    count: int,
    microbatch_tokens: int,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """For every position, the id of the response and then the policy's `count` likeliest ids, and their log-probs.

    Both [B, T, 1 + count], on the CPU, 0 after the end of a response; fewer if the tokenizer has fewer ids.
    """
    count = min(count, policy.vocab_size)
    shape = len(responses), max(len(ids) for ids in responses), 1 + count
    ids_BTM = torch.zeros(shape, dtype=torch.long)
    logprob_BTM = torch.zeros(shape, dtype=torch.promote_types(policy.model.dtype, torch.float32))
    lengths = [len(prompt) + len(ids) for prompt, ids in zip(prompts, responses, strict=True)]
    own_BT1 = own_actions(responses)
    for rows in microbatches(lengths, microbatch_tokens):
        parts = [prompts[b] for b in rows], [responses[b] for b in rows]
        (row_N, step_N), logprobs_NV = state_logprobs(policy, *parts, temperature)
        place = torch.tensor(rows)[row_N.cpu()], step_N.cpu()
        likeliest_NK = logprobs_NV[:, : policy.vocab_size].topk(count, dim=1).indices
        ids_NM = torch.cat([own_BT1[place].to(policy.device), likeliest_NK], dim=1)
        ids_BTM[place], logprob_BTM[place] = ids_NM.cpu(), logprobs_NV.gather(1, ids_NM).cpu()
    return ids_BTM, logprob_BTM


def _padded(sequences: Sequence[IdArray]) -> Tensor:
    """Ids, [B, L], padded on the right, which a causal model never attends to; so no mask is needed."""
    ids_BL = torch.zeros(len(sequences), max(len(ids) for ids in sequences), dtype=torch.long)
    for row, ids in enumerate(sequences):
        ids_BL[row, : len(ids)] = torch.from_numpy(ids)
    return ids_BL
