"""Writes the checkpoints of an SFT run: its milestones, the untrained start among them, and the finished model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from dense_reward.checkpoints.probe import ProbeIds, probe_of_demonstrations, probe_of_texts
from dense_reward.checkpoints.write_manifest import ManifestFacts
from dense_reward.manifest import Role
from dense_reward.records import Report
from dense_reward.text.encode import Encoder
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dense_reward_trainer.configs.sft import SftConfig
from dense_reward_trainer.data.tokenised import TokenisedRow
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.runs.checkpoint import write_checkpoint, write_named_checkpoint, writes_same_texts
from dense_reward_trainer.sft.initial_model import InitialModel
from dense_reward_trainer.sft.milestones import Schedule
from dense_reward_trainer.sft.sharding import Snapshot, check_sharded, loads_whole_models, whole_weights

SFT: Role = "sft"


def shared_facts(config: SftConfig, run_id: str, data: str, initial: InitialModel) -> ManifestFacts:
    """The manifest entries that all checkpoints of the run share."""
    return ManifestFacts(
        role=SFT,
        run_id=run_id,
        renderer=initial.encoder.renderer,
        end_of_turn_id=initial.encoder.end_of_turn_id,
        choices=initial.encoder.choices,
        base_model=config.base_model,
        data_sha256=data,
        seed=config.seed,
        dtype=str(initial.model.dtype).removeprefix("torch."),
        adapter_base=initial.base if config.lora is not None else None,
    )


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointWriter:
    """Writes the run's checkpoints; only the first process has one."""

    folder: Path
    initial: InitialModel
    schedule: Schedule
    facts: ManifestFacts
    train: Sequence[TokenisedRow]

    def write(self, name: str, role: Role, step: int, learning_rate: float, snapshot: Snapshot) -> None:
        """Writes the model, after `step` optimiser steps. Does not advance the random number generators."""
        facts = self._facts_at(role, step, learning_rate)
        with torch.random.fork_rng():
            write_checkpoint(
                self.folder / name,
                snapshot.model,
                self.initial.tokenizer,
                facts,
                self.choose_probe,
                weights=snapshot.weights,
            )

    def write_start(self, name: str, learning_rate: float, snapshot: Snapshot) -> Path | None:
        """Writes the reference at step 0: the model before training. Returns the folder of the files that it names.

        A base model's files are named, without a copy and without an adapter, if their tokenizer, chat template and end
        of turn are those of the run. Otherwise, and for random weights, None: the model is written as at any step; an
        adapter that is not trained yet changes nothing.
        """
        base = self.initial.base
        facts = replace(self._facts_at("reference", 0, learning_rate), source=base)
        if base is None or not writes_same_texts(self.initial.model, self.initial.tokenizer, facts):
            self.write(name, "reference", 0, learning_rate, snapshot)
            return None
        with torch.random.fork_rng():
            write_named_checkpoint(self.folder / name, replace(facts, adapter_base=None), self.choose_probe)
        return base

    def _facts_at(self, role: Role, step: int, learning_rate: float) -> ManifestFacts:
        return replace(
            self.facts,
            role=role,
            optimiser_step=step,
            samples_processed=self.schedule.samples_processed(step),
            samples_total=self.schedule.samples_total,
            unique_samples=self.schedule.unique_samples(step),
            learning_rate=learning_rate,
        )

    def choose_probe(self, encoder: Encoder, limit_tokens: int) -> Sequence[ProbeIds]:
        """Probe sequences from the demonstrations; fixed texts if fewer than two prompts differ."""
        encoded = [row.encoded for row in self.train]
        return probe_of_demonstrations(encoded, limit_tokens) or probe_of_texts(encoder, limit_tokens)


class SaveMilestones(TrainerCallback):  # type: ignore[misc]
    """Writes each milestone at its step, before the training state of that step: a resumed run skips none.

    All processes have one, because all take part in gathering the weights; only that of the first has a writer.
    """

    def __init__(
        self,
        model: Callable[[], PreTrainedModel],
        schedule: Schedule,
        steps: Mapping[str, int],
        writer: CheckpointWriter | None,
        report: Report,
    ) -> None:
        self._model, self._schedule, self._steps = model, schedule, steps
        self._writer, self._report = writer, report

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        lr_scheduler: LRScheduler,
        **_: object,
    ) -> None:
        if state.max_steps != self._schedule.total_steps:
            raise JobError(f"transformers plans {state.max_steps} steps, milestones are for {self._schedule.words()}")
        check_sharded(self._model())
        if state.global_step == 0:  # not resumed
            self._write_due(0, lr_scheduler)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        lr_scheduler: LRScheduler,
        **_: object,
    ) -> None:
        self._write_due(state.global_step, lr_scheduler)

    def write_sft(self, step: int, lr_scheduler: LRScheduler) -> None:
        """Writes the finished model."""
        self._write(SFT, SFT, step, float(lr_scheduler.get_last_lr()[0]))

    def _write_due(self, step: int, lr_scheduler: LRScheduler) -> None:
        for name in [name for name, at in self._steps.items() if at == step]:
            base = self._write(name, "reference", step, float(lr_scheduler.get_last_lr()[0]))
            if self._writer is not None:
                named = "" if base is None else f", which names the files of {base}"
                self._report(f"milestone: {self._writer.folder / name} at step {step}{named}")

    def _write(self, name: str, role: Role, step: int, learning_rate: float) -> Path | None:
        """Returns the folder of the files that a start names."""
        model = self._model()
        snapshot = Snapshot(model, whole_weights(model))
        if self._writer is None:
            return None
        with loads_whole_models():
            if step == 0:
                return self._writer.write_start(name, learning_rate, snapshot)
            self._writer.write(name, role, step, learning_rate, snapshot)
        return None
