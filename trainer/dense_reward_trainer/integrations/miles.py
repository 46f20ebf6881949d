"""DPR inside miles: an advantage for every token, from a running service.

    --custom-reward-post-process-path dense_reward_trainer.integrations.miles.fetch
    --use-opd --opd-type sglang --opd-kl-coef 1 --advantage-estimator grpo
    --custom-config-path FILE   # YAML; `dense_reward` has the options of DenseRewardOptions

miles subtracts `opd_reverse_kl` of a sample from the advantages of its tokens. Here it holds minus the dense
advantages, and the rewards that miles trains on are 0. The rewards of `--rm-type` are logged. An error of the service
stops the run.
"""

from collections.abc import Sequence
from typing import Any

from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.integrations import samples as sampled


def fetch(args: Any, samples: Sequence[Any]) -> tuple[list[float], list[float]]:  # noqa: ANN401 - miles' types
    """miles' hook after sampling: the samples get their advantages. Returns the rewards to log, and 0 to train on.

    Raises ConfigError if the advantages would not be used, or not be what they are called; JobError if the service
    cannot be used.
    """
    _check(args)
    for sample, advantage_T in zip(samples, sampled.advantages(args, samples), strict=True):
        sample.opd_reverse_kl = (-advantage_T).tolist()
    return [sample.get_reward_value(args) for sample in samples], [0.0] * len(samples)


def _check(args: Any) -> None:  # noqa: ANN401
    faults = {
        "the dense reward is added by --use-opd with --opd-type sglang: set both": (
            not args.use_opd or args.opd_type != "sglang"
        ),
        "opd_kl_coef scales the dense reward: set --opd-kl-coef 1": args.opd_kl_coef != 1,
        "the dense advantages are added to those of the estimator, which must be 0: set --advantage-estimator grpo": (
            args.advantage_estimator != "grpo"
        ),
        "--kl-coef would do nothing with grpo: set it to 0, and kl_coefficient of dense_reward instead": (
            args.kl_coef != 0
        ),
    }
    for fault, found in faults.items():
        if found:
            raise ConfigError(fault)
