"""One round of self-play: the model at its start answers the prompts, then learns to prefer the demonstrations."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dense_reward.engines.tokenizer import read_tokenizer
from dense_reward.engines.torch.device import chosen_device
from dense_reward.manifest import files_folder
from dense_reward.records import Report
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dense_reward_trainer.configs.irft import IrftConfig
from dense_reward_trainer.data.tokenised import TokenisedRow
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.rl.policy import load_policy
from dense_reward_trainer.runs.checkpoint import newest_training_state, training_step
from dense_reward_trainer.runs.run_folder import METRICS_NAME, MetricsLog
from dense_reward_trainer.selfplay.checkpoint_writer import RoundWriter
from dense_reward_trainer.selfplay.generation import Opponent, generate
from dense_reward_trainer.selfplay.pairs import Pair, PairCounts, PairFile
from dense_reward_trainer.selfplay.plan import RoundPlan
from dense_reward_trainer.selfplay.start import Start
from dense_reward_trainer.selfplay.trainer import make_trainer, merged
from dense_reward_trainer.sft.callbacks import SUMMARY


class LogRound(TrainerCallback):  # type: ignore[misc]
    """Writes what the trainer logs to metrics.jsonl, at the steps of the whole run."""

    def __init__(self, metrics: MetricsLog, plan: RoundPlan) -> None:
        self._metrics, self._plan = metrics, plan

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float],
        **_: object,
    ) -> None:
        values = {name: float(value) for name, value in logs.items() if name not in SUMMARY}
        if "loss" in values:
            self._metrics.append(self._plan.first_step + state.global_step, {"round": self._plan.number, **values})


@dataclass(frozen=True, slots=True, eq=False)
class SelfPlay:
    """Everything that a run uses."""

    config: IrftConfig
    start: Start
    rows: Sequence[TokenisedRow]
    plans: Sequence[RoundPlan]
    writer: RoundWriter
    report: Report

    @property
    def metrics(self) -> MetricsLog:
        return MetricsLog(self.config.output_dir / METRICS_NAME)

    def play(self, plan: RoundPlan) -> None:
        """Runs one round, or the rest of it, and writes the checkpoint after it."""
        before = self._folder_before(plan)
        own = self._pair_file(plan)
        generate(self.config, Opponent(before, plan.number, self.start), own)
        pairs = own.read()
        self._describe(plan, pairs)
        if plan.number > 1 and self.config.previous_rounds:
            pairs += self._pair_file(self.plans[plan.number - 2]).read()
        self._train(plan, before, pairs)

    def _train(self, plan: RoundPlan, before: Path, pairs: Sequence[Pair]) -> None:
        config = self.config
        resume = config.output_dir / "resume" / f"round_{plan.number}"
        state = newest_training_state(resume, self.report)
        done = 0 if state is None else training_step(state)
        self.metrics.drop_after(plan.first_step + done)
        checkpoint = load_policy(before, precision=config.precision, device=chosen_device(config.device))
        tokenizer = read_tokenizer(files_folder(self.start.folder, self.start.manifest))
        trainer = make_trainer(config, plan, checkpoint.policy.model, tokenizer, pairs)
        trainer.add_callback(LogRound(self.metrics, plan))
        resumed = f", resumed at step {done}" if done else ""
        self.report(f"round {plan.number}: {plan.steps} steps on {len(pairs)} pairs{resumed}")
        trainer.train(resume_from_checkpoint=None if state is None else str(state))
        self.writer.write(plan, merged(trainer), float(trainer.lr_scheduler.get_last_lr()[0]))
        shutil.rmtree(resume, ignore_errors=True)

    def _folder_before(self, plan: RoundPlan) -> Path:
        return self.writer.folder_after(plan.number - 1)

    def _pair_file(self, plan: RoundPlan) -> PairFile:
        return PairFile(
            self.config.output_dir / "pairs" / f"round_{plan.number}.jsonl",
            plan.places,
            tuple(self.rows[place] for place in plan.places),
            self.config.generation.batch_size,
        )

    def _describe(self, plan: RoundPlan, pairs: Sequence[Pair]) -> None:
        """Reports what was generated, and logs it once. Raises JobError if there is nothing to learn."""
        counts = PairCounts.of(pairs)
        self.report(f"round {plan.number}: {counts.in_words}")
        if counts.identical == counts.pairs and self.config.loss == "sigmoid":
            raise JobError(
                f"round {plan.number}: every answer equals its demonstration, so the loss has no gradient: end with "
                "fewer rounds, or raise generation.temperature, in another output_dir"
            )
        if not any(line.get("pairs") and line["round"] == plan.number for line in self.metrics.read()):
            self.metrics.append(plan.first_step, {"round": plan.number, **asdict(counts)})
