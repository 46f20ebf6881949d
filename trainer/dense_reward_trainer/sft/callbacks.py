"""Callbacks of transformers' trainer: log to a file, progress, evaluation after the last step; and its end."""

from collections.abc import Mapping

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dense_reward_trainer.runs.progress import Progress
from dense_reward_trainer.runs.run_folder import MetricsLog

# Keys of the summary that transformers' trainer logs at its end; it belongs to no step.
SUMMARY = frozenset({"total_flos", "train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second"})


class EndsAtLastStep:
    """A trainer that resumes after its last step trains no further one.

    Without this, transformers 5.24 makes one more step if `max_steps` ends within an epoch: it looks at the steps only
    after one. A run is in that state if it was killed before its last checkpoint was whole.
    """

    state: TrainerState
    control: TrainerControl

    def _run_epoch(self, **values: object) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**values)  # type: ignore[misc] # that of transformers' trainer


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


class ShowProgress(TrainerCallback):  # type: ignore[misc]
    """The progress of the run, in the first process. Tokens and loss are those that the trainer logged last."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._step = 0
        self._tokens = 0.0
        self._note = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        if state.is_world_process_zero:
            self._step = state.global_step
            self._progress = Progress(state.max_steps, "steps", state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self._progress is not None:
            self._progress.advance(state.global_step - self._step, note=self._note)
            self._step = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float],
        **_: object,
    ) -> None:
        if self._progress is not None and "loss" in logs:
            tokens = float(logs.get("num_tokens", self._tokens))  # TRL counts those since this start
            self._note = f"loss {float(logs['loss']):.3f}"
            self._progress.advance(0, tokens=int(tokens - self._tokens), note=self._note)
            self._tokens = tokens

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self._progress is not None:
            self._progress.close()
