"""Tokenised demonstrations -> the rows that the trainer reads, their order, and the samples of each step."""

from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset

from dense_reward_trainer.configs.sft import SftConfig
from dense_reward_trainer.data.tokenised import TokenisedRow
from dense_reward_trainer.sft.milestones import MilestoneSchedule, PackedSchedule, Schedule
from dense_reward_trainer.sft.packing import packed_rows
from dense_reward_trainer.sft.row_order import Order, order_by_length, shuffled_order


@dataclass(frozen=True, slots=True, eq=False)
class TrainingRows:
    """`order` None: the trainer's own random order. `longest_tokens`: tokens of the longest row."""

    dataset: Dataset
    order: Order | None
    schedule: Schedule
    longest_tokens: int


def training_rows(
    config: SftConfig, rows: Sequence[TokenisedRow], *, processes: int, limit_tokens: int
) -> TrainingRows:
    """One row for each demonstration; with `packing`, rows of several demonstrations and at most `limit_tokens`."""
    per_step = config.batch_size * config.gradient_accumulation * processes
    dataset = as_dataset(rows)
    if config.packing:
        packed = packed_rows(dataset, limit_tokens)
        order = shuffled_order(len(packed.samples), config.seed)
        steps = config.max_steps or config.epochs * -(-len(packed.samples) // per_step)
        schedule = PackedSchedule.of(packed.samples, order, per_step, steps)
        return TrainingRows(packed.dataset, order, schedule, max(map(len, packed.dataset["input_ids"])))
    lengths = [row.length for row in rows]
    by_length = order_by_length(lengths, per_step, config.seed) if config.group_by_length else None
    steps = config.max_steps or config.epochs * -(-len(rows) // per_step)
    return TrainingRows(dataset, by_length, MilestoneSchedule(len(rows), per_step, steps), max(lengths))


def as_dataset(rows: Sequence[TokenisedRow]) -> Dataset:
    return Dataset.from_dict({"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]})
