"""Callbacks of transformers' trainer: log to a file, progress bar, evaluation after the last step."""

from collections.abc import Mapping

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dense_reward_trainer.runs.run_folder import MetricsLog

# Keys of the summary that transformers' trainer logs at its end; it belongs to no step.
SUMMARY = frozenset({"total_flos", "train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second"})


class EvaluateAtEnd(TrainerCallback):  # type: ignore[misc]
    """Also evaluates after the last step, even if it is not a multiple of eval_steps."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if state.global_step == state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True


class LogToFile(TrainerCallback):  # type: ignore[misc]
    """Writes what the trainer logs to metrics.jsonl."""

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
    """transformers' progress bar, with the loss in it instead of a printed line for each log."""

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
