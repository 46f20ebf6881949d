"""The `dpr` job with `engine: trl`: TRL's GRPOTrainer samples and updates, in one or several processes.

Advantages are those of the job's own engine (integrations/trl.py). What differs: prompts come in another order, the
learning rate changes with every optimiser step instead of every batch, and the policy is not measured during the run.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shutil import rmtree

import torch
from datasets import Dataset
from dense_reward.engines.torch.device import chosen_device
from dense_reward.manifest import files_folder
from dense_reward.records import IdArray, Report
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProgressCallback
from trl import GRPOConfig

from dense_reward_trainer.configs.dpr import DprConfig
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.integrations.trl import DenseReward, DenseRewardGRPOTrainer
from dense_reward_trainer.jobs.dpr_policy import last_line, write_policy
from dense_reward_trainer.rl.policy import PolicyCheckpoint, load_policy
from dense_reward_trainer.rl.prompts import check_room_at_service, prompts_and_held_out, prompts_sha256
from dense_reward_trainer.runs.checkpoint import is_complete, newest_training_state, recover, training_step
from dense_reward_trainer.runs.end_of_turn import set_model_end, tokenizer_with_end
from dense_reward_trainer.runs.processes import silent
from dense_reward_trainer.runs.run_folder import (
    METRICS_NAME,
    MetricsLog,
    Run,
    check_run,
    open_run,
    pin,
    plot_metrics,
    redacted,
)
from dense_reward_trainer.runs.trackers import open_trackers
from dense_reward_trainer.sft.arguments import checkpointing
from dense_reward_trainer.sft.callbacks import EndsAtLastStep, LogToFile, ShowProgress
from dense_reward_trainer.sft.sharding import check_launch, check_same_run_folder, loads_whole_models, whole_weights

LAUNCH = "start it with torchrun or accelerate launch"
LOSS = {"sequences": "dr_grpo", "tokens": "dapo"}
NO_CLIP = 1e9
RESUME = "resume"


def run(config: DprConfig, report: Report) -> None:
    """As jobs/dpr.py. Every process of the launcher calls it; the first one writes and reports."""
    arguments = grpo_arguments(config, int(os.environ.get("WORLD_SIZE", "1")))
    check_launch(arguments, config.precision, LAUNCH)
    first = arguments.process_index == 0
    report = report if first else silent
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    policy = config.output_dir / "checkpoints" / "policy"
    with arguments.main_process_first(local=False):
        check_run("dpr", config)
        state = newest_training_state(config.output_dir / RESUME, report)
        recover(policy)
    done = 0 if state is None else training_step(state)
    finished = is_complete(policy)
    check_same_run_folder(done, finished)
    if finished:
        rmtree(config.output_dir / RESUME, ignore_errors=True)
        report(f"{config.output_dir} holds a finished run, so there is nothing to do")
    else:
        train(config, arguments, state, report)
        if first:
            rmtree(config.output_dir / RESUME, ignore_errors=True)
    report(last_line(config))


def train(config: DprConfig, arguments: GRPOConfig, state: Path | None, report: Report) -> None:
    """Trains from `state`, the newest training state, or from the start; writes the policy."""
    with loads_whole_models():
        checkpoint = load_policy(config.policy, precision=config.precision, device="cpu")
    prompts, held_out = prompts_and_held_out(config, checkpoint, report)
    tokenizer = AutoTokenizer.from_pretrained(
        files_folder(config.policy, checkpoint.manifest), local_files_only=True, trust_remote_code=False
    )
    trainer = PolicyTrainer(config, arguments, checkpoint, tokenizer, prompts)
    try:
        check_room_at_service(trainer.card.max_length_tokens, prompts, config.max_new_tokens)
        opened = None
        metrics = MetricsLog(config.output_dir / METRICS_NAME)
        if arguments.process_index == 0:
            opened = start_run(config, checkpoint, prompts, trainer.card.revision)
            done = 0 if state is None else training_step(state)
            values = redacted(config.model_dump(mode="json"))
            metrics = replace(metrics, trackers=open_trackers(config.report_to, opened, values, done))
            metrics.drop_after(done)
            trainer.add_callback(LogToFile(metrics))
        report(f"{len(prompts)} prompts; rewards from {trainer.card.sft}; processes: {arguments.world_size}")
        if held_out:
            report("engine trl does not measure held_out during the run: use the job evaluate afterwards")
        trainer.train(resume_from_checkpoint=None if state is None else str(state))
        weights = whole_weights(trainer.accelerator.unwrap_model(trainer.model))
    finally:
        trainer.close()
    if opened is not None:
        model = trainer.accelerator.unwrap_model(trainer.model)
        names = ("dense_reward/reward_sum", "dense_reward/kl_to_sft")
        plot_metrics(metrics, names, config.output_dir / "dpr.png", ylabel="nats per response")
        write_policy(config, checkpoint, opened, model, prompts, weights=weights)


def start_run(config: DprConfig, checkpoint: PolicyCheckpoint, prompts: Sequence[IdArray], revision: str) -> Run:
    """Opens the run folder. Raises ConfigError, naming the input, if a resumed run has other inputs."""
    opened = open_run("dpr", config)
    identity = {"policy": checkpoint.manifest.weights_sha256, "prompts": prompts_sha256(prompts)}
    pin(opened, {**identity, "reward model": revision})
    return opened


class PolicyTrainer(EndsAtLastStep, DenseRewardGRPOTrainer):
    """The trainer of a run: prompts are the ids of the job, and the loss has the size of the job's."""

    def __init__(
        self,
        config: DprConfig,
        arguments: GRPOConfig,
        checkpoint: PolicyCheckpoint,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[IdArray],
    ) -> None:
        self._ids = named(prompts, tokenizer)
        # dr_grpo divides by the longest possible response
        self._scale = float(config.max_new_tokens) if config.normalise == "sequences" else 1.0
        end, model = checkpoint.policy.end_of_turn_id, checkpoint.policy.model
        set_model_end(model, tokenizer, end)
        super().__init__(
            model,
            dense_reward_of(config),
            arguments,
            processing_class=tokenizer_with_end(tokenizer, end),
            train_dataset=Dataset.from_dict({"prompt": [*self._ids]}),
            callbacks=[ShowProgress()],
        )
        self.remove_callback(ProgressCallback)
        # as in the own engine, nothing else ends a turn: not the tokenizer's EOS, nor other ids of the base model
        self.eos_token_ids = [end]
        if not self.use_vllm:
            self.generation_config.eos_token_id = self.generation_kwargs["eos_token_id"] = [end]

    def _tokenize_prompts(self, prompts: Sequence[str]) -> tuple[list[list[int]], None, dict[str, object]]:
        return [self._ids[name] for name in prompts], None, {}

    def _token_advantages(self, output: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        advantage_BT, metrics = super()._token_advantages(output)
        return advantage_BT * self._scale, metrics


def named(prompts: Sequence[IdArray], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """The ids of each prompt by its text, which logs show; texts that several prompts share are numbered."""
    found: dict[str, list[int]] = {}
    for number, ids in enumerate(prompts):
        text = str(tokenizer.decode(ids.tolist()))
        found[f"{text} [{number}]" if text in found else text] = ids.tolist()
    return found


def dense_reward_of(config: DprConfig) -> DenseReward:
    """The options of the job that TRL's trainer shares; its groups have num_generations."""
    shared = config.model_dump(include=set(DenseReward.model_fields) - {"group_size"})
    return DenseReward.model_validate(shared)


def grpo_arguments(config: DprConfig, processes: int) -> GRPOConfig:
    """The trainer's arguments. Raises ConfigError if the responses of a step cannot be divided among the processes."""
    responses = config.prompts_per_step * config.group_size
    local, rest = divmod(responses, processes)
    if rest or local % config.group_size:
        raise ConfigError(
            f"{config.prompts_per_step} prompts of a step cannot be divided among {processes} processes: set "
            f"prompts_per_step to a multiple of {processes}"
        )
    batch_size = config.trl.batch_size or local
    if local % batch_size:
        raise ConfigError(
            f"trl.batch_size is {batch_size}, but a process has {local} responses of a step: use a divisor of that"
        )
    updates, clip = config.updates_per_batch, config.ratio_clip
    return GRPOConfig(
        output_dir=str(config.output_dir / RESUME),
        use_cpu=chosen_device(config.device) == "cpu",
        bf16=config.precision == "bfloat16",
        seed=config.seed,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=local // batch_size,
        num_generations=config.group_size,
        num_iterations=updates,
        max_steps=config.steps * updates,
        max_completion_length=config.max_new_tokens,
        temperature=config.temperature,
        beta=0.0,
        loss_type=LOSS[config.normalise],
        epsilon=NO_CLIP if clip is None else clip,
        scale_rewards="none",
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant_with_warmup" if config.schedule == "constant" else config.schedule,
        warmup_steps=config.warmup_steps * updates,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        disable_dropout=True,
        use_vllm=config.trl.vllm,
        logging_steps=1,
        # The filter would replace a nan loss by an average, and MetricsLog could not detect divergence.
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_every * updates,
        save_total_limit=2,
        report_to="none",
        **({"vllm_mode": "colocate"} if config.trl.vllm else {}),
        **checkpointing(config.trl.gradient_checkpointing),
    )
