"""The `sft` job: supervised fine-tuning on demonstrations -> the finished SFT checkpoint and its milestones.

Data -> ids -> TRL's SFTTrainer -> checkpoints; read from `run` downwards. A killed run resumes if it is started again,
and on a CPU ends with bitwise the weights of an uninterrupted run.
"""

import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from dense_reward.engines.torch.device import chosen_device
from dense_reward.records import Report
from transformers import ProgressCallback
from transformers.utils.logging import disable_progress_bar
from trl import SFTConfig as TrlConfig
from trl import SFTTrainer

from dense_reward_trainer.configs.sft import SftConfig
from dense_reward_trainer.data.held_out_file import write_held_out
from dense_reward_trainer.data.sources import DataError, Split, data_sha256, load, split
from dense_reward_trainer.data.tokenised import TokenisedRow, encode_demonstrations
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.runs.checkpoint import (
    is_complete,
    newest_training_state,
    recover,
    training_step,
)
from dense_reward_trainer.runs.next_step import finished, serve
from dense_reward_trainer.runs.processes import silent
from dense_reward_trainer.runs.progress import busy
from dense_reward_trainer.runs.run_folder import (
    METRICS_NAME,
    MetricsLog,
    Run,
    check_run,
    pinned,
    plot_metrics,
    redacted,
)
from dense_reward_trainer.runs.trackers import check_trackers, open_trackers
from dense_reward_trainer.sft.arguments import checkpointing, lora_config, quiet
from dense_reward_trainer.sft.callbacks import EvaluateAtEnd, LogToFile, ShowProgress
from dense_reward_trainer.sft.checkpoint_writer import SFT, CheckpointWriter, SaveMilestones, shared_facts
from dense_reward_trainer.sft.initial_model import InitialModel, initial_model_of
from dense_reward_trainer.sft.memory_check import check_memory
from dense_reward_trainer.sft.milestones import Schedule
from dense_reward_trainer.sft.packing import check_packing
from dense_reward_trainer.sft.pinned_inputs import open_pinned_run
from dense_reward_trainer.sft.row_order import OrderedTrainer
from dense_reward_trainer.sft.sharding import (
    check_processes,
    check_same_run_folder,
    loads_whole_models,
    sharing_processes,
)
from dense_reward_trainer.sft.training_rows import TrainingRows, as_dataset, training_rows


def run(config: SftConfig, report: Report) -> None:
    """Trains, and writes `checkpoints/sft` and the milestones to `config.output_dir`. Keeps a finished run.

    Raises ConfigError, DataError or CheckpointError, whose message states the cure; JobError if training diverges.
    """
    disable_progress_bar()
    check_options(config)
    arguments = training_arguments(config)
    check_processes(config, arguments)
    report = report if arguments.process_index == 0 else silent
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    checkpoints = config.output_dir / "checkpoints"
    with arguments.main_process_first(local=False):
        check_run("sft", config)
        state = newest_training_state(config.output_dir / "resume", report)
        for name in (SFT, *config.milestones):
            recover(checkpoints / name)
    done, is_finished = 0 if state is None else training_step(state), is_complete(checkpoints / SFT)
    check_same_run_folder(done, is_finished)
    if is_finished:
        shutil.rmtree(config.output_dir / "resume", ignore_errors=True)
        report(f"{config.output_dir} holds a finished run, so there is nothing to do")
        report(last_line(config))
        return
    train(config, arguments, state, report)
    if arguments.process_index == 0:
        shutil.rmtree(config.output_dir / "resume")
    report(last_line(config))


def last_line(config: SftConfig) -> str:
    """What is finished, and what to run next."""
    run = config.output_dir
    return finished(run / "checkpoints" / SFT, serve(run, config.milestones))


@quiet()
def train(config: SftConfig, arguments: TrlConfig, state: Path | None, report: Report) -> None:
    """Trains from `state`, the newest training state, or from the start; writes all checkpoints."""
    done = 0 if state is None else training_step(state)
    demonstrations = load_split(config, report)
    with loads_whole_models(), busy("loading the model to start from"):
        initial = initial_model_of(config, demonstrations.train, pinned(config.output_dir))
    check_base_is_elsewhere(config, initial.base)
    for note in initial.notes:
        report(note)
    train, held_out = encode_split(config, initial, demonstrations, report)
    rows = training_rows(config, train, processes=arguments.world_size, limit_tokens=initial.limit_tokens)
    steps = milestone_steps(config.milestones, rows.schedule)
    check_milestones(steps, config.output_dir / "checkpoints", done)
    for warning in schedule_warnings(config.warmup_steps, steps, rows.schedule.total_steps):
        report(warning)
    processes = arguments.world_size
    check_memory(config, initial.model, rows, report, processes=processes, sharing=sharing_processes(processes))
    trainer = make_trainer(config, arguments, initial, rows, held_out)
    report(run_summary(trainer, rows.schedule, steps, (len(train), len(held_out)), done))
    metrics, writer = MetricsLog(config.output_dir / METRICS_NAME), None
    if arguments.process_index == 0:
        opened, writer = start_run(config, initial, rows.schedule, train=train, held_out=held_out, processes=processes)
        values = redacted(config.model_dump(mode="json"))
        metrics = replace(metrics, trackers=open_trackers(config.report_to, opened, values, done))
        metrics.drop_after(done)
        trainer.add_callback(LogToFile(metrics))
    milestones = SaveMilestones(
        lambda: trainer.accelerator.unwrap_model(trainer.model), rows.schedule, steps, writer, report
    )
    trainer.add_callback(milestones)
    trainer.train(resume_from_checkpoint=None if state is None else str(state))
    if writer is not None:
        plot_metrics(metrics, ("loss", "eval_loss"), config.output_dir / "loss.png", ylabel="loss (nats per token)")
    milestones.write_sft(rows.schedule.total_steps, trainer.lr_scheduler)


def check_options(config: SftConfig) -> None:
    """Raises ConfigError if an option needs a library or a device that is not there."""
    check_trackers(config.report_to)
    quantised = config.lora is not None and config.lora.quantise is not None
    needs = {"liger": ("liger_kernel", config.liger), "lora.quantise": ("bitsandbytes", quantised)}
    for option, (library, wanted) in needs.items():
        if wanted and find_spec(library) is None:
            raise ConfigError(f"{option} needs {library}: pip install {library.replace('_', '-')}")
        if wanted and not chosen_device(config.device).startswith("cuda"):
            raise ConfigError(f"{option} needs a GPU: remove it to train on the CPU")


def training_arguments(config: SftConfig) -> TrlConfig:
    """The trainer's arguments. TRL must not prepare the data: it would truncate long demonstrations."""
    return TrlConfig(
        output_dir=str(config.output_dir / "resume"),
        use_cpu=chosen_device(config.device) == "cpu",
        bf16=config.precision == "bfloat16",
        seed=config.seed,
        max_length=None,
        packing=config.packing,
        use_liger_kernel=config.liger,
        completion_only_loss=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta2=config.adam_beta2,
        max_grad_norm=config.max_grad_norm,
        logging_steps=config.log_every_steps,
        logging_first_step=True,
        # The filter would replace a nan loss by an average, and MetricsLog could not detect divergence.
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_every_steps,
        save_total_limit=2,
        eval_strategy="no" if config.eval_every_steps is None else "steps",
        eval_steps=config.eval_every_steps,
        report_to="none",
        **checkpointing(config.gradient_checkpointing),
    )


def check_base_is_elsewhere(config: SftConfig, base: Path | None) -> None:
    """Raises ConfigError if the run would write into the folder of its base model, and so change or remove it."""
    run_folder = config.output_dir
    written = [run_folder / "checkpoints" / name for name in (SFT, *config.milestones)]
    places = [place.resolve() for place in (run_folder, *written)]
    if base is not None and (
        base.resolve() in places or base.resolve().is_relative_to(run_folder.resolve() / "resume")
    ):
        raise ConfigError(f"the run would write over its base model, {base}: use another output_dir")


def load_split(config: SftConfig, report: Report) -> Split:
    """Training and held-out demonstrations. Raises DataError if none is left to train on."""
    with busy(f"reading {config.data.source}"):
        loaded = load(config.data)
    report(loaded.summary)
    parts = split(loaded.demonstrations, config.data.held_out_fraction, config.data.seed)
    if not parts.train:
        raise DataError(f"{config.data.source}: every demonstration is held out: lower data.held_out_fraction")
    if not parts.held_out and config.eval_every_steps is not None:
        raise ConfigError("eval_every_steps is set, but nothing is held out: raise data.held_out_fraction, or set null")
    return parts


def encode_split(
    config: SftConfig, initial: InitialModel, parts: Split, report: Report
) -> tuple[Sequence[TokenisedRow], Sequence[TokenisedRow]]:
    """Tokenised rows to train on and to evaluate on. Raises DataError, naming file and line."""
    sides = []
    for demonstrations in (parts.train, parts.held_out):
        with busy(f"encoding {len(demonstrations)} demonstrations"):
            encoded = encode_demonstrations(
                demonstrations,
                initial.encoder,
                every_turn=config.train_on == "all_assistant",
                limit_tokens=initial.limit_tokens,
                skip_bad=config.data.skip_bad,
            )
        if encoded.shortened:
            report(
                f"{encoded.shortened} of {len(encoded.rows)} responses repeated the end of their prompt, or ended in "
                "the end of turn, which is added to each: the repetition was removed"
            )
        if encoded.unclosed:
            report(
                f"in {encoded.unclosed} of {len(encoded.rows)} demonstrations the prompt opens a thought that the "
                "response does not close: the model learns to answer inside its thought"
            )
        if encoded.dropped:
            report(f"left out {len(encoded.dropped)} demonstrations, the first is {encoded.dropped[0]}")
        sides.append(encoded.rows)
    if not sides[0]:
        raise DataError(
            f"{config.data.source}: no demonstration is left to train on: give more rows, raise max_length_tokens "
            "if rows were left out, or lower held_out_fraction"
        )
    return sides[0], sides[1]


def make_trainer(
    config: SftConfig,
    arguments: TrlConfig,
    initial: InitialModel,
    rows: TrainingRows,
    held_out: Sequence[TokenisedRow],
) -> SFTTrainer:
    """TRL's trainer on rows that are tokenised already. Raises ConfigError if the model cannot be packed."""
    if config.packing:
        check_packing(initial.model.config)
    use_cache = initial.model.config.use_cache
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`use_liger_kernel=True` is deprecated", category=FutureWarning)
        trainer = OrderedTrainer(
            model=initial.model,
            args=arguments,
            train_dataset=rows.dataset,
            eval_dataset=as_dataset(held_out) if config.eval_every_steps is not None else None,
            # A copy: TRL makes the EOS the padding of a tokenizer that has none, and checkpoints must not keep that.
            processing_class=deepcopy(initial.tokenizer),
            peft_config=None if config.lora is None else lora_config(config.lora),
            callbacks=[EvaluateAtEnd()],
        )
    trainer.order = rows.order
    if config.lora is not None and config.lora.quantise is not None:
        # TRL makes the adapter of a quantised base bfloat16, in which a small step rounds to nothing.
        for parameter in filter(lambda parameter: parameter.requires_grad, trainer.model.parameters()):
            parameter.data = parameter.data.float()
    # TRL turns the KV cache off for training. Without this, the checkpoint keeps that and sampling from it is slow.
    initial.model.config.use_cache = use_cache
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ShowProgress())
    return trainer


def milestone_steps(milestones: Mapping[str, float], schedule: Schedule) -> dict[str, int]:
    """The step of each milestone. Raises ConfigError if one falls on the last step, which is the sft checkpoint's."""
    steps = {name: schedule.step_at(fraction) for name, fraction in milestones.items()}
    for name, step in steps.items():
        if step == schedule.total_steps:
            raise ConfigError(
                f"milestone {name} at {milestones[name]} of the samples falls on the last step ({step}): "
                "lower it, or train for more steps"
            )
    return steps


def schedule_warnings(warmup_steps: int, steps: Mapping[str, int], total_steps: int) -> Iterator[str]:
    """What a run that is too short for its schedule would silently not do. `steps`: of each milestone."""
    if warmup_steps >= total_steps:
        yield (
            f"warning: warmup_steps is {warmup_steps}, but the run has only {total_steps} steps, so the learning rate "
            "never reaches its peak: lower warmup_steps, or train for more steps"
        )
    at: dict[int, list[str]] = {}
    for name, step in steps.items():
        at.setdefault(step, []).append(name)
    for step, names in at.items():
        if len(names) > 1:
            yield (
                f"warning: the milestones {' and '.join(names)} are the same model, that of step {step}: train for "
                "more steps, or remove one"
            )


def check_milestones(steps: Mapping[str, int], checkpoints: Path, done: int) -> None:
    """Raises ConfigError if a resumed run is past the step of a milestone whose checkpoint is missing."""
    for name, step in steps.items():
        if 0 < done >= step and not is_complete(checkpoints / name):
            raise ConfigError(
                f"{checkpoints / name} is gone, and the run is past its step {step}: use another output_dir"
            )


def run_summary(
    trainer: SFTTrainer, schedule: Schedule, steps: Mapping[str, int], counts: tuple[int, int], done: int
) -> str:
    """One line about the run: sizes, steps and milestones."""
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    at = ", ".join(f"{name} at step {step}" for name, step in steps.items())
    resumed = f"; resumed at step {done}" if done else ""
    return (
        f"{trained / 1e6:.2f}M parameters to train, {counts[0]} demonstrations ({counts[1]} held out), "
        f"{schedule.words()}; {at}{resumed}"
    )


def start_run(
    config: SftConfig,
    initial: InitialModel,
    schedule: Schedule,
    *,
    train: Sequence[TokenisedRow],
    held_out: Sequence[TokenisedRow],
    processes: int,
) -> tuple[Run, CheckpointWriter]:
    """Opens the run folder and writes held_out.jsonl. Raises ConfigError if a resumed run has other inputs."""
    data = data_sha256(row.demonstration for row in train)
    with busy(f"hashing {initial.base}"):
        opened = open_pinned_run(config, initial, data, [*train, *held_out], processes)
    write_held_out(config.output_dir / "held_out.jsonl", [row.demonstration for row in held_out])
    facts = shared_facts(config, opened.run_id, data, initial)
    return opened, CheckpointWriter(config.output_dir / "checkpoints", initial, schedule, facts, train)
