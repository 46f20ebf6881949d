"""DPR inside slime: an advantage for every token, from a running service.

    --custom-reward-post-process-path dense_reward_trainer.integrations.slime.fetch
    --custom-advantage-function-path dense_reward_trainer.integrations.slime.advantages
    --custom-config-path FILE   # YAML; `dense_reward` has the options of DenseRewardOptions

`fetch` runs where samples of all prompts are, computes the advantages, and puts them into `teacher_log_probs`: slime
takes this field of a sample to its training processes, one number for each token. `advantages` takes them out there.
The rewards of `--rm-type` are logged and not trained on. An error of the service stops the run.
"""

from collections.abc import MutableMapping, Sequence
from typing import Any

from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.integrations import samples as sampled

HOOK = f"{__name__}.advantages"
CARRIER = "teacher_log_probs"


def fetch(args: Any, samples: Sequence[Any]) -> tuple[list[float], list[float]]:  # noqa: ANN401 - slime's types
    """slime's hook after sampling: the samples get their advantages. Returns the rewards of `--rm-type` unchanged.

    Raises ConfigError if the advantages would not be used, or not be what they are called; JobError if the service
    cannot be used.
    """
    if args.custom_advantage_function_path != HOOK:
        raise ConfigError(f"the dense reward is not used: set --custom-advantage-function-path {HOOK}")
    _check(args)
    for sample, advantage_T in zip(samples, sampled.advantages(args, samples), strict=True):
        sample.teacher_log_probs = advantage_T.tolist()
    rewards = [sample.get_reward_value(args) for sample in samples]
    return rewards, rewards


def advantages(args: Any, rollout_data: MutableMapping[str, Any]) -> None:  # noqa: ANN401 - slime's types
    """slime's hook in training: the advantages of this process's samples, one for each of their tokens."""
    _check(args)
    found = rollout_data.get(CARRIER)
    if found is None:
        raise ConfigError(f"samples have no dense reward: set --custom-reward-post-process-path {__name__}.fetch")
    shapes = [tuple(kl_T.shape) for kl_T in rollout_data["kl"]]
    if [tuple(advantage_T.shape) for advantage_T in found] != shapes:
        raise ValueError(f"advantages of shapes {[tuple(one.shape) for one in found]} for tokens of {shapes}")
    rollout_data["advantages"] = [advantage_T.float() for advantage_T in found]
    rollout_data["returns"] = rollout_data["advantages"]


def _check(args: Any) -> None:  # noqa: ANN401
    if args.use_opd:
        raise ConfigError(f"--use-opd reads {CARRIER}, where the dense reward is: leave it out")
    if args.kl_coef != 0:
        raise ConfigError("--kl-coef has no effect here: set it to 0, and kl_coefficient of dense_reward instead")
