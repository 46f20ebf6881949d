"""DPR inside TRL: a GRPOTrainer whose advantages are per token, from a running reward service.

    trainer = DenseRewardGRPOTrainer(
        "runs/mine/checkpoints/sft", DenseReward(service_url="http://127.0.0.1:8000"), args=GRPOConfig(...),
        train_dataset=prompts,
    )
    trainer.train()

Generation (also by vLLM), loss, distribution and adapters are TRL's; rewards are fetched by ids, and returns, baselines
and the KL penalty are those of the `dpr` job (rl/advantages.py). GRPOTrainer takes advantages of shape [B, T].
RLOOTrainer does not, and broadcasts them wrongly without an error if T equals B (TRL 1.16): it has no such class here.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import numpy as np
import torch
from dense_reward.client.tokenizer import sha256_of
from dense_reward.records import IdArray
from dense_reward.schemas import ModelCard
from peft import PeftModel
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer, is_conversational

from dense_reward_trainer.configs.advantages import AdvantageOptions
from dense_reward_trainer.configs.service import ServiceOptions
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.rl.advantages import action_advantages, make_batch, shaped_rewards
from dense_reward_trainer.rl.batch_metrics import PER_TOKEN, describe
from dense_reward_trainer.rl.records import Rollout
from dense_reward_trainer.rl.reward_service import ServiceAddress, connected

LOSSES = ("dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo")
"""TRL's losses that are sums over tokens of a function of the token's own advantage."""
SCALAR_METRICS = (
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "rewards/no_scalar_reward/mean",
    "rewards/no_scalar_reward/std",
)


class DenseReward(AdvantageOptions, ServiceOptions):
    """Where token rewards come from, and how they become advantages; groups have num_generations of GRPOConfig."""

    service_url: str = Field(
        default="http://127.0.0.1:8000", description="Address of the reward service, without a path."
    )

    @model_validator(mode="after")
    def _what_the_loss_of_trl_can_do(self) -> Self:
        if self.candidates:
            raise ValueError("candidates: TRL's loss uses only sampled ids: set candidates to 0, or use the job dpr")
        if self.kl_penalty != "reward":
            raise ValueError(
                "kl_penalty: TRL computes a KL in the loss: set beta of GRPOConfig, and kl_coefficient to 0"
            )
        if "group_size" in self.model_fields_set:
            raise ValueError("group_size: leave it out and set num_generations of GRPOConfig")
        return self


class DenseRewardGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """GRPOTrainer with an advantage for every token, [B, T], in nats.

    Scalar `reward_funcs` of your own are optional: their group-relative advantage is added to every token's. Metrics
    are those of the job dpr, with the prefix `dense_reward/`. Raises ConfigError for options under which the advantages
    would not be what they are called, JobError if the service cannot be used or becomes unavailable for longer than
    `service_patience_s`.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        dense_reward: DenseReward,
        args: GRPOConfig,
        *,
        reward_funcs: object = None,
        **others: object,
    ) -> None:
        check(args, others)
        self._has_scalar_rewards = reward_funcs is not None
        super().__init__(model, [no_scalar_reward] if reward_funcs is None else reward_funcs, args=args, **others)
        check_processes(dense_reward, self.accelerator.num_processes)
        check_dropout(self.model)
        self._dense_reward = dense_reward
        self._open = ExitStack()
        address = ServiceAddress.of(dense_reward.service_url, dense_reward)
        sha256, with_kl = sha256_of(self._tokenizer), dense_reward.baseline == "kl"
        report = logging.get_logger(__name__).info
        connection = connected(address, sha256, report, signal=dense_reward.signal, with_kl=with_kl)
        self._rewards = self._open.enter_context(connection)
        weakref.finalize(self, self._open.close)  # at the latest at exit, while modules can still be used
        if is_conversational(next(iter(self.train_dataset))):
            check_rendering(self.card, args.chat_template_kwargs or {})

    @property
    def card(self) -> ModelCard:
        """What the service says of the pair whose rewards are used."""
        return self._rewards.card

    def close(self) -> None:
        """Closes the connection to the service."""
        self._open.close()

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        mode = "train" if self.model.training else "eval"
        if not self._has_scalar_rewards:
            for name in SCALAR_METRICS:
                self._metrics[mode].pop(name, None)
        advantage_BT, metrics = self._token_advantages(output)
        if self._has_scalar_rewards:
            advantage_BT = (advantage_BT + output["advantages"][:, None]) * output["completion_mask"]
        output["advantages"] = advantage_BT
        self._log_means(mode, metrics, len(advantage_BT))
        return output

    def _log_means(self, mode: str, metrics: Mapping[str, float], responses: int) -> None:
        """Logs means over all processes: a mean over tokens counts by the tokens of each, one over responses alike."""
        for name, value in metrics.items():
            weight = responses * (metrics["length_mean"] if name in PER_TOKEN else 1.0)
            local = torch.tensor([[value * weight, weight]], device=self.accelerator.device)
            total, weights = self.accelerator.gather(local).sum(dim=0).tolist()
            self._metrics[mode][f"dense_reward/{name}"].append(total / weights)

    def _token_advantages(self, output: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Advantages, [B, T] float32, 0 on padding, and the metrics of this process's samples."""
        rollouts = self._rollouts(output)
        length = max(len(rollout.response_T) for rollout in rollouts)
        ids_BT = output["completion_ids"][:, :length]
        logprob_BT = self._logprobs_at_temperature_1(output)[:, :length] * output["completion_mask"][:, :length]
        scored = self._rewards.score(rollouts)
        batch = make_batch(rollouts, ids_BT.cpu()[..., None], logprob_BT.float().cpu()[..., None], scored)
        options = self._dense_reward.model_copy(update={"group_size": self.num_generations})
        if not self.model.training:  # advantages of an evaluation train nothing, and its groups can be of any size
            options = options.model_copy(update={"baseline": "none"})
        found_BT = action_advantages(batch, options, options.kl_coefficient).advantage_BTM[..., 0]
        advantage_BT = torch.zeros(output["completion_ids"].shape)
        advantage_BT[:, :length] = found_BT
        metrics = describe(batch, shaped_rewards(batch, options, options.kl_coefficient))
        return advantage_BT.to(output["completion_ids"].device), metrics

    def _rollouts(self, output: Mapping[str, Tensor]) -> list[Rollout]:
        """Prompts and completions of this process without padding."""
        columns = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        rows = zip(*(output[name].cpu() for name in columns), strict=True)
        return [
            Rollout(
                ids_of(prompt[kept.bool()]), ids_of(ids[own.bool()]), int(ids[own.bool()][-1]) in self.eos_token_ids
            )
            for prompt, kept, ids, own in rows
        ]

    def _logprobs_at_temperature_1(self, output: Mapping[str, Tensor]) -> Tensor:
        """log pi of each sampled id, [B, T] in nats, whatever the temperature of the samples; not in the graph."""
        known = output.get("old_per_token_logps")
        if known is not None and self.args.temperature == 1:
            return known
        ids_BL = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        mask_BL = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        size = self.args.per_device_train_batch_size if self.model.training else self.args.per_device_eval_batch_size
        with torch.no_grad(), self._temperature_1():
            found: Tensor = self._get_per_token_logps_and_entropies(
                self.model, ids_BL, mask_BL, output["completion_ids"].size(1), batch_size=size
            )[0]
        return found

    @contextmanager
    def _temperature_1(self) -> Iterator[None]:
        sampled_at: float = self.args.temperature
        self.temperature = 1.0
        try:
            yield
        finally:
            self.temperature = sampled_at


def check(args: GRPOConfig, others: Mapping[str, object]) -> None:
    """Raises ConfigError for options of GRPO that would make token advantages wrong, with the cure."""
    if not isinstance(args, GRPOConfig):
        raise ConfigError(
            f"args must be a GRPOConfig, not {type(args).__name__}: RLOOTrainer takes no token advantages"
        )
    asked = [name for name in ("tools", "rollout_func", "environment_factory") if others.get(name) is not None]
    local = args.per_device_train_batch_size * args.steps_per_generation
    faults = {
        f"loss_type {args.loss_type} reads one advantage of a whole response: use one of {', '.join(LOSSES)}": (
            args.loss_type not in LOSSES
        ),
        "off_policy_mask_threshold reads one advantage of a whole response: leave it out": (
            args.off_policy_mask_threshold is not None
        ),
        "mask_truncated_completions hides responses whose tokens have rewards: set it to False": (
            args.mask_truncated_completions
        ),
        f"{', '.join(asked)}: tokens that the policy did not write would be rewarded: leave it out": bool(asked),
        f"per_device_train_batch_size x steps_per_generation is {local}, not a multiple of num_generations "
        f"({args.num_generations}), so a group would be split among processes: change one of them": (
            local % args.num_generations != 0
        ),
    }
    for fault, found in faults.items():
        if found:
            raise ConfigError(fault)


def check_processes(dense_reward: AdvantageOptions, processes: int) -> None:
    """Raises ConfigError for statistics over the batch, of which each process sees a part."""
    over_batch = "whiten" if dense_reward.whiten else "baseline batch" if dense_reward.baseline == "batch" else None
    if over_batch is not None and processes > 1:
        raise ConfigError(
            f"{over_batch} needs all responses of a step, but each of {processes} processes has only its own: "
            "use one process, or baseline leave_one_out"
        )


def check_rendering(card: ModelCard, template_kwargs: Mapping[str, object]) -> None:
    """Raises ConfigError if TRL would render chats otherwise than the models of the service were trained on."""
    if dict(card.template_kwargs) != dict(template_kwargs):
        raise ConfigError(
            f"the models of the service were trained with the template variables {dict(card.template_kwargs)}, not "
            f"{dict(template_kwargs)}: set chat_template_kwargs of GRPOConfig to them"
        )
    if card.response_prefix:
        raise ConfigError(
            f"the service's models expect {card.response_prefix!r} before a response, which TRL does not write: give "
            "prompts as texts that end with it"
        )


def check_dropout(model: nn.Module) -> None:
    """Raises ConfigError if the model that is trained would not be the one that was sampled from."""
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        raise ConfigError("dropout makes the trained model differ from the one that answers: set disable_dropout")


def no_scalar_reward(completions: Sequence[object], **_: object) -> list[float]:
    """GRPOTrainer needs a reward function; its advantage is 0."""
    return [0.0] * len(completions)


def ids_of(ids: Tensor) -> IdArray:
    found: IdArray = ids.numpy().astype(np.int32)
    return found
