"""A DPR configuration for tests of training, its prompts, and batches of its samples."""

import torch
from dense_reward_trainer.configs.dpr import DprConfig
from dense_reward_trainer.rl.advantages import Batch, make_batch
from dense_reward_trainer.rl.learner import sampling_of
from dense_reward_trainer.rl.policy import Policy, likeliest_actions
from dense_reward_trainer.rl.records import TokenRewards
from dense_reward_trainer.rl.sampling import sample
from tiny_policy import EngineRewards, ids_of

PROMPTS = [ids_of(5, 6, 7), ids_of(9), ids_of(1, 2, 3, 4, 5)]


def config_of(**changes: object) -> DprConfig:
    values: dict[str, object] = {
        "output_dir": "unused",
        "policy": "unused",
        "prompts": {"source": "arithmetic"},
        "steps": 6,
        "prompts_per_step": 2,
        "group_size": 3,
        "max_new_tokens": 5,
        "learning_rate": 1e-3,
        "microbatch_tokens": 24,
        "save_every": 2,
        "evaluate_every": 100,
        "device": "cpu",
    }
    return DprConfig.model_validate(values | changes)


def batch_of(policy: Policy, config: DprConfig, rewards: TokenRewards | None = None) -> Batch:
    """Samples of a policy for all prompts, scored."""
    rollouts = sample(policy, PROMPTS, sampling_of(config), seed=0)
    prompts, responses = [r.prompt_P for r in rollouts], [r.response_T for r in rollouts]
    ids_BTM, logprob_BTM = likeliest_actions(policy, prompts, responses, config.candidates, config.microbatch_tokens)
    candidates = [ids_TM[: len(ids), 1:].numpy() for ids_TM, ids in zip(ids_BTM, responses, strict=True)]
    scored = (rewards or EngineRewards()).score(rollouts, candidates if config.candidates else None)
    return make_batch(rollouts, ids_BTM, logprob_BTM, scored)


def weights_of(policy: Policy) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in policy.model.parameters()]
