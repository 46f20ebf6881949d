"""Trains a head on pairs with transformers' Trainer, on exactly the ids of the pairs; and judges it on other pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from dense_reward_trainer.configs.dpr import Precision
from dense_reward_trainer.configs.rft import HeadLoss, HeadOptions
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.reward_model.head import head_values
from dense_reward_trainer.reward_model.losses import HeadValues, aligned_loss, terminal_loss
from dense_reward_trainer.reward_model.pairs import AnswerPair, differing
from dense_reward_trainer.rl.policy import microbatches
from dense_reward_trainer.runs.run_folder import MetricsLog
from dense_reward_trainer.sft.callbacks import LogToFile, ShowProgress

Pairs = Sequence[AnswerPair]


@dataclass(frozen=True, slots=True)
class Judged:
    """How a head judges pairs that it was not trained on. `loss` in nats; nothing is known of no pairs.

    `accuracy`: the share of pairs whose demonstration has the larger value after the last token (equal values count
    half). `margin`: the mean difference of these values.
    """

    pairs: int
    accuracy: float
    margin: float
    loss: float


class PairTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer with a loss of pairs. A batch is a list of pairs: nothing is tokenised or padded before."""

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, pairs: Pairs, loss: HeadLoss) -> None:
        super().__init__(model=model, args=args, train_dataset=[*pairs], data_collator=_batch)
        # The model takes keyword arguments, so the Trainer would not divide by gradient_accumulation_steps.
        self.model_accepts_loss_kwargs = False
        self._loss = loss

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Pairs],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        return pair_loss(model, inputs["pairs"], self._loss)


def pair_loss(model: PreTrainedModel, pairs: Pairs, loss: HeadLoss) -> Tensor:
    """The mean loss of pairs whose responses differ, in nats, with gradient."""
    demonstration, answer = _both(model, pairs)
    if loss == "terminal":
        return terminal_loss(demonstration, answer)
    first_B = torch.tensor([_first(pair) for pair in pairs], device=model.device)
    return aligned_loss(demonstration, answer, first_B)


def train_head(model: PreTrainedModel, pairs: Pairs, options: HeadOptions, place: "Place", metrics: MetricsLog) -> None:
    """Trains the model in place and logs to `metrics`.

    Raises JobError if the loss is not finite, or if the warm-up would not end before the last step.
    """
    steps = options.epochs * -(-len(pairs) // (options.batch_size * options.gradient_accumulation))
    if options.warmup_steps >= steps:
        raise JobError(
            f"head.warmup_steps is {options.warmup_steps}, but {len(pairs)} pairs make only {steps} steps: lower it, "
            "or raise demonstrations_per_round"
        )
    disable_progress_bar()
    trainer = PairTrainer(model, arguments(options, place), pairs, options.loss)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ShowProgress())
    trainer.add_callback(LogToFile(metrics))
    model.train()
    trainer.train()
    model.eval()


@dataclass(frozen=True, slots=True)
class Place:
    """Where and how a head is trained: a folder that can be written to, the device, the precision and the seed."""

    folder: Path
    device: str
    precision: Precision
    seed: int


def arguments(options: HeadOptions, place: Place) -> TrainingArguments:
    """The trainer's arguments. It saves nothing: a stage that was killed starts again."""
    return TrainingArguments(
        output_dir=str(place.folder),
        use_cpu=place.device == "cpu",
        bf16=place.precision == "bfloat16",
        seed=place.seed,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        logging_steps=options.log_every_steps,
        logging_first_step=True,
        # The filter would replace a nan loss by an average, and MetricsLog could not detect divergence.
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


@torch.no_grad()
def judge(model: PreTrainedModel, pairs: Pairs, loss: HeadLoss, microbatch_tokens: int) -> Judged | None:
    """The head's judgement of pairs; None if there are none whose responses differ."""
    pairs = differing(pairs)
    if not pairs:
        return None
    lengths = [2 * (len(p.prompt_P) + max(len(p.demonstration_T), len(p.answer_T))) for p in pairs]
    margins: list[float] = []
    total = 0.0
    for rows in microbatches(lengths, microbatch_tokens):
        chosen = [pairs[row] for row in rows]
        demonstration, answer = _both(model, chosen)
        margins += (demonstration.last_B - answer.last_B).tolist()
        total += float(pair_loss(model, chosen, loss)) * len(chosen)
    right = sum(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins)
    return Judged(len(pairs), right / len(pairs), sum(margins) / len(pairs), total / len(pairs))


def _both(model: PreTrainedModel, pairs: Pairs) -> tuple[HeadValues, HeadValues]:
    """The values of demonstrations and answers, by one forward."""
    prompts = [pair.prompt_P for pair in pairs] * 2
    values = head_values(model, prompts, [p.demonstration_T for p in pairs] + [p.answer_T for p in pairs])
    half = len(pairs)
    demonstration, answer = (
        HeadValues(values.values_BT[part], values.length_B[part]) for part in (slice(half), slice(half, None))
    )
    return demonstration, answer


def _batch(pairs: Pairs) -> dict[str, Pairs]:
    return {"pairs": pairs}


def _first(pair: AnswerPair) -> int:
    first = pair.first_difference
    if first is None:
        raise JobError("a pair of equal responses has no position to compare: leave it out")
    return first
