"""TRL's DPOTrainer on pairs of exact ids, with the model at the start of the round as the reference.

DPO's loss on (demonstration, own answer) is that of SPIN and IRFT; its `bco_pair` is GSIL's with b = 0. TRL must not
tokenise: it would append an end of turn to answers that were cut off.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from dense_reward.engines.torch.device import chosen_device
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback
from trl import DPOConfig, DPOTrainer

from dense_reward_trainer.configs.irft import IrftConfig, LossName
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.selfplay.losses import loss_at_start
from dense_reward_trainer.selfplay.pairs import Pair
from dense_reward_trainer.selfplay.plan import RoundPlan
from dense_reward_trainer.sft.arguments import checkpointing, lora_config, quiet
from dense_reward_trainer.sft.callbacks import EndsAtLastStep, ShowProgress

TRL_LOSS: Mapping[LossName, str] = {"sigmoid": "sigmoid", "bernoulli": "bco_pair"}
OPTIMISER = {"rmsprop": "rmsprop", "adamw": "adamw_torch"}
ROUNDING = {False: 1e-4, True: 1e-2}
"""Largest mean log-ratio of a token, in nats, by which the same model can differ from itself: float32, bfloat16."""


def training_arguments(config: IrftConfig, plan: RoundPlan) -> DPOConfig:
    """The trainer's arguments for one round."""
    return DPOConfig(
        output_dir=str(config.output_dir / "resume" / f"round_{plan.number}"),
        use_cpu=chosen_device(config.device) == "cpu",
        bf16=config.precision == "bfloat16",
        seed=(config.seed + plan.number) % 2**32,
        loss_type=[TRL_LOSS[config.loss]],
        beta=config.beta_of(plan.number),
        max_length=None,
        precompute_ref_log_probs=True,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        max_steps=plan.steps,
        optim=OPTIMISER[config.optimiser],
        learning_rate=config.learning_rate_of(plan.number),
        lr_scheduler_type=config.schedule,
        warmup_steps=warmup_steps(config, plan.steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        logging_steps=config.log_every_steps,
        logging_first_step=True,
        # The filter would replace a nan loss by an average, and MetricsLog could not detect divergence.
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_every_steps,
        save_total_limit=2,
        eval_strategy="no",
        report_to="none",
        **checkpointing(config.gradient_checkpointing),
    )


def warmup_steps(config: IrftConfig, steps: int) -> int:
    """Steps of the warm-up. The first of them has learning rate 0, so at least one step follows."""
    return min(math.ceil(config.warmup_fraction * steps), steps - 1)


def check_processes(arguments: DPOConfig) -> None:
    """Raises ConfigError for several processes or GPUs: answers are generated in one process, on one device."""
    if arguments.world_size > 1:
        raise ConfigError("irft runs in one process: start it without torchrun or accelerate launch")
    if arguments.n_gpu > 1:
        raise ConfigError(f"irft uses one GPU, but {arguments.n_gpu} are visible: set CUDA_VISIBLE_DEVICES=0")


class PairTrainer(EndsAtLastStep, DPOTrainer):  # type: ignore[misc]
    """DPOTrainer on rows of ids, with GSIL's b, that verifies its first loss."""

    def __init__(
        self,
        config: IrftConfig,
        arguments: DPOConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Dataset,
    ) -> None:
        self._loss, self._b, self._verified = config.loss, config.bernoulli_b, False
        # A copy: TRL makes the EOS the padding of a tokenizer that has none, and checkpoints must not keep that.
        copied = deepcopy(tokenizer)
        adapter = None if config.lora is None else lora_config(config.lora)
        with quiet():
            super().__init__(model, args=arguments, train_dataset=rows, processing_class=copied, peft_config=adapter)

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        """The rows as they are: prompt_ids, chosen_ids, rejected_ids."""
        return dataset

    def _compute_loss(self, model: nn.Module, inputs: Mapping[str, Tensor], return_outputs: bool) -> Tensor:
        # b is a shift of both log-ratios: beta (D + b / beta) = beta D + b. TRL then logs rewards with b in them.
        shift = self._b / self.beta
        shifted = {name: inputs[name] - shift for name in ("ref_chosen_logps", "ref_rejected_logps")}
        loss: Tensor = super()._compute_loss(model, {**inputs, **shifted}, return_outputs)
        logged = self._metrics["train" if self.model.training else "eval"]
        for name in ("rewards/chosen", "rewards/rejected"):
            logged[name][-1] -= self._b
        if not self._verified and self.state.global_step == 0:
            self._verify_first(float(loss.detach()), inputs)
        self._verified = True
        return loss

    def _verify_first(self, loss: float, inputs: Mapping[str, Tensor]) -> None:
        """Raises JobError unless the model equals its reference: a wrong reference would train towards nothing."""
        tokens = max(1.0, float(inputs["completion_mask"].sum()) / len(inputs["completion_mask"]))
        allowed = ROUNDING[bool(self.args.bf16)] * tokens
        ratios = [self._metrics["train"][f"rewards/{side}"][-1] / self.beta for side in ("chosen", "rejected")]
        expected = loss_at_start(self._loss, self._b)
        close = abs(loss - expected) <= 2 * self.beta * allowed + 1e-5
        if not close or not all(abs(ratio) <= allowed for ratio in ratios):
            raise JobError(
                f"the first loss of the round is {loss:.6f}, not {expected:.6f}: the model in training is not its "
                f"reference (mean log-ratios {ratios[0]:.4g} and {ratios[1]:.4g} nats). Set every dropout of the "
                "policy's config.json to 0, or precision to float32"
            )


def make_trainer(
    config: IrftConfig,
    plan: RoundPlan,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
) -> PairTrainer:
    """The trainer of one round. It computes the reference's log-probs from the model as it is now."""
    use_cache = model.config.use_cache
    turn_dropout_off(model)
    disable_progress_bar()
    trainer = PairTrainer(config, training_arguments(config, plan), model, tokenizer, as_dataset(pairs))
    # TRL turns the KV cache off for training. Without this, the checkpoint keeps that and sampling from it is slow.
    model.config.use_cache = use_cache
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ShowProgress())
    return trainer


def as_dataset(pairs: Sequence[Pair]) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt_ids": [pair.prompt_ids for pair in pairs],
            "chosen_ids": [pair.demonstration_ids for pair in pairs],
            "rejected_ids": [pair.generated_ids for pair in pairs],
        }
    )


def turn_dropout_off(model: nn.Module) -> None:
    """Sets every dropout of a model to 0, also those that are numbers of a layer (Llama's attention_dropout).

    TRL turns off only modules of dropout; with the others, a model in training is not its own reference.
    """
    for module, name in _dropouts(model):
        setattr(module, name, 0.0)


def _dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            yield module, "p"
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
                yield module, name


def merged(trainer: PairTrainer) -> PreTrainedModel:
    """The trained model; adapters are merged into it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    merge = getattr(model, "merge_and_unload", None)
    with torch.no_grad():
        result: PreTrainedModel = model if merge is None else merge()
    return result
