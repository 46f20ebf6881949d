"""DPR in SkyRL 0.3 and 0.4: a reward for every token from a running service. Not run yet: it needs GPUs.

python examples/skyrl_dense.py trainer.algorithm.advantage_estimator=dense_reward \
    trainer.algorithm.use_kl_in_reward=true generator.n_samples_per_prompt=8 ...

SkyRL's other settings are as for its own entry point; its KL is to trainer.ref.model, which must be the sft checkpoint.
"""

import os
import sys
from typing import Any

import ray
from dense_reward_trainer.configs.dense_reward import DenseRewardOptions
from dense_reward_trainer.integrations.skyrl import DenseRewardGenerator
from skyrl.train.config import SkyRLTrainConfig
from skyrl.train.entrypoints.main_base import BasePPOExp
from skyrl.train.utils import validate_cfg
from skyrl.train.utils.utils import initialize_ray

URL = os.environ.get("DENSE_REWARD_URL", "http://127.0.0.1:8000")


class DenseRewardExp(BasePPOExp):  # type: ignore[misc]
    """SkyRL's training with the dense reward."""

    def get_generator(self, cfg: Any, tokenizer: Any, inference_engine_client: Any) -> DenseRewardGenerator:  # noqa: ANN401
        """The generator of a reward for every token."""
        gym = cfg.environment.skyrl_gym
        options = DenseRewardOptions(service_url=URL)
        return DenseRewardGenerator(options, cfg.generator, gym, inference_engine_client, tokenizer)


@ray.remote(num_cpus=1)  # type: ignore[untyped-decorator]
def train(cfg: SkyRLTrainConfig) -> None:
    """The training process."""
    DenseRewardExp(cfg).run()


if __name__ == "__main__":
    settings = SkyRLTrainConfig.from_cli_overrides(sys.argv[1:])
    validate_cfg(settings)
    initialize_ray(settings)
    ray.get(train.remote(settings))
