"""Writes the checkpoints of self-play: the start, which only names its files, and the model after each round."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from dense_reward.checkpoints.probe import ProbeIds, probe_of_demonstrations, probe_of_texts
from dense_reward.checkpoints.write_manifest import ManifestFacts
from dense_reward.engines.tokenizer import read_tokenizer
from dense_reward.engines.torch.device import chosen_device
from dense_reward.manifest import adapter_base_folder, files_folder
from dense_reward.text.encode import Encoder
from transformers import PreTrainedModel

from dense_reward_trainer.configs.irft import IrftConfig
from dense_reward_trainer.data.sources import data_sha256
from dense_reward_trainer.data.tokenised import TokenisedRow
from dense_reward_trainer.runs.checkpoint import write_checkpoint, write_named_checkpoint
from dense_reward_trainer.selfplay.plan import FINAL, START, RoundPlan, checkpoint_name
from dense_reward_trainer.selfplay.start import Start


@dataclass(frozen=True, slots=True, eq=False)
class RoundWriter:
    """Writes the checkpoints of one run: references, and after the last round the SFT model of their pairs."""

    config: IrftConfig
    run_id: str
    start: Start
    rows: Sequence[TokenisedRow]
    plans: Sequence[RoundPlan]

    def folder_after(self, number: int) -> Path:
        """The checkpoint after round `number`; 0: the start."""
        return self.config.output_dir / "checkpoints" / checkpoint_name(number, self.config.rounds)

    def write_start(self) -> None:
        """Writes the reference at step 0. It names the policy's files, without a copy."""
        folder, manifest = self.start.folder, self.start.manifest
        facts = replace(
            self._facts(0, 0, 0.0),
            source=files_folder(folder, manifest),
            adapter_base=adapter_base_folder(folder, manifest),
            dtype=manifest.dtype,
        )
        write_named_checkpoint(self.folder_after(0), facts, self._choose_probe, device=self._device)

    def write(self, plan: RoundPlan, model: PreTrainedModel, learning_rate: float) -> None:
        """Writes the model after a round. Does not advance the random number generators."""
        facts = replace(
            self._facts(plan.last_step, plan.last_sample, learning_rate),
            role="sft" if plan.number == self.config.rounds else "reference",
            base_model=str(self.folder_after(plan.number - 1)) if plan.number > 1 else str(self.config.policy),
            dtype=str(model.dtype).removeprefix("torch."),
        )
        tokenizer = read_tokenizer(files_folder(self.start.folder, self.start.manifest))
        with torch.random.fork_rng():
            write_checkpoint(
                self.folder_after(plan.number), model, tokenizer, facts, self._choose_probe, device=self._device
            )

    @property
    def _device(self) -> str:
        return chosen_device(self.config.device)

    def _facts(self, step: int, samples: int, learning_rate: float) -> ManifestFacts:
        manifest = self.start.manifest
        return ManifestFacts(
            role="reference",
            run_id=self.run_id,
            renderer=manifest.renderer,
            end_of_turn_id=manifest.end_of_turn_id,
            choices=manifest.choices,
            optimiser_step=step,
            samples_processed=samples,
            samples_total=self.plans[-1].last_sample,
            learning_rate=learning_rate,
            base_model=str(self.config.policy),
            data_sha256=data_sha256(row.demonstration for row in self.rows),
            seed=self.config.seed,
        )

    def _choose_probe(self, encoder: Encoder, limit_tokens: int) -> Sequence[ProbeIds]:
        """Probe sequences from the demonstrations; fixed texts if fewer than two prompts differ."""
        encoded = [row.encoded for row in self.rows]
        return probe_of_demonstrations(encoded, limit_tokens) or probe_of_texts(encoder, limit_tokens)


def checkpoint_folders(config: IrftConfig) -> list[Path]:
    """The folders of all checkpoints of a run, the start first and the final one last."""
    names = [START, *(f"round_{number}" for number in range(1, config.rounds)), FINAL]
    return [config.output_dir / "checkpoints" / name for name in names]
