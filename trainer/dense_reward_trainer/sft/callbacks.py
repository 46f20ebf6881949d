"""What goes on beside transformers' trainer: its log as a file, its progress bar, an evaluation at the end.

Must not know jobs or checkpoints.
"""

from collections.abc import Mapping

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dense_reward_trainer.runs.run_folder import MetricsLog

# What transformers' trainer sums up at its end; it has no step of its own.
SUMMARY = frozenset({"total_flos", "train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second"})


class EvaluateAtEnd(TrainerCallback):  # type: ignore[misc]
    """The last step is evaluated too, whatever its number."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if state.global_step == state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True


class LogToFile(TrainerCallback):  # type: ignore[misc]
    """What the trainer logs, as lines of metrics.jsonl."""

    def __init__(self, metrics: MetricsLog) -> None:
        self._metrics = metrics

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float],
        **_: object,
    ) -> None:
        values = {name: float(value) for name, value in logs.items() if name not in SUMMARY}
        if values.keys() & {"loss", "eval_loss"}:
            self._metrics.append(state.global_step, values)


class QuietProgress(ProgressCallback):  # type: ignore[misc]
    """transformers' progress bar with the loss in it, instead of a line for each log."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float],
        **_: object,
    ) -> None:
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}")
