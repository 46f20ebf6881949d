"""Stage: rewards of whole models, packed and in bfloat16, against transformers in float64; repeated and alone."""

import copy

import numpy as np
import torch
from dense_reward.engines.torch.pair import ComputeOptions, PairEngine
from dense_reward.records import Scores, Trunk, Wants
from numpy.typing import NDArray

from bench.gpu.machine import INFO, Machine, Record, rms, trunks_of
from bench.speed.workload import SHAPES, Lengths

LENGTHS: Lengths = ((512, (1024,) * 8), (128, (128, 7, 60)), (128, (128,)))
TIMES_TRANSFORMERS = 1.1
"""Largest error in units of that of transformers' own bfloat16."""


def stage(machine: Machine, record: Record) -> None:
    """Fails if the error exceeds that of transformers, or if scores that must be equal to the bit are not."""
    shape, lengths = machine.shape(SHAPES["05b"]), machine.lengths(LENGTHS)
    trunks = trunks_of(lengths, shape.vocab_size)
    models = [machine.model(shape, seed) for seed in (1, 2)]
    for model in models:  # of random weights the logits are nearly equal: make them as different as a trained model's
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(4)
    plain = [_logprobs(model, trunks) for model in models]
    exact = [_logprobs(copy.deepcopy(model).double(), trunks) for model in models]
    engine = machine.engine(*models)
    found = engine.score(trunks, Wants(kl=True, entropy=True))
    again = engine.score(trunks, Wants(kl=True, entropy=True))
    record(equal_when_repeated=all(np.array_equal(*two) for two in zip(_rewards(found), _rewards(again), strict=True)))
    alone = PairEngine(*engine.models, INFO, ComputeOptions(1 << 20, alone=True))
    whole = _rewards(alone.score(trunks, Wants()))
    single = np.concatenate(
        [_rewards(alone.score([Trunk(t.prompt_P, (branch,))], Wants())) for t in trunks for branch in t.branches]
    )
    record(equal_alone=np.array_equal(whole, single))
    errors = {
        "reward, nats": rms(_rewards(found) - (exact[0] - exact[1])),
        "reward of transformers, nats": rms((plain[0] - plain[1]) - (exact[0] - exact[1])),
    }
    record(errors=errors, reward_std=float((exact[0] - exact[1]).std()), tokens=len(exact[0]))
    if machine.tiny:
        return
    if not np.array_equal(whole, single):
        raise SystemExit("alone, a sequence must have equal scores in every batch")
    if not errors["reward, nats"] <= TIMES_TRANSFORMERS * errors["reward of transformers, nats"]:
        raise SystemExit(f"the error is larger than that of transformers: {errors}")


def _rewards(scores: Scores) -> NDArray[np.float64]:
    return np.concatenate(
        [s.sft_logprob_S.astype(np.float64) - s.reference_logprob_S for of_trunk in scores for s in of_trunk]
    )


@torch.inference_mode()
def _logprobs(model: torch.nn.Module, trunks: list[Trunk]) -> NDArray[np.float64]:
    """transformers' own log-probs of every response token, one sequence at a time."""
    found = []
    device = next(model.parameters()).device
    for trunk in trunks:
        for branch in trunk.branches:
            ids = torch.from_numpy(np.concatenate([trunk.prompt_P, branch.ids_T])).long().to(device)
            logits = model(input_ids=ids[None], use_cache=False).logits[0, len(trunk.prompt_P) - 1 : -1]
            logprobs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), 1)
            found.append(logprobs.gather(1, ids[len(trunk.prompt_P) :, None])[:, 0].double().cpu().numpy())
    return np.concatenate(found)
