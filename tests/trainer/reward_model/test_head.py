"""A head's values with gradient are those that the service computes; the trainer's loss is that of the formula."""

from collections.abc import Sequence
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from dense_reward.engines.token_head.engine import HeadModel
from dense_reward.errors import CheckpointError
from dense_reward_trainer.configs.rft import HeadLoss, HeadOptions
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.reward_model.head import head_values, new_head
from dense_reward_trainer.reward_model.head_rewards import HeadRewards
from dense_reward_trainer.reward_model.pair_trainer import Place, judge, pair_loss, train_head
from dense_reward_trainer.reward_model.pairs import AnswerPair
from dense_reward_trainer.rl.records import Rollout
from dense_reward_trainer.runs.run_folder import MetricsLog
from dense_reward_trainer.sft.arguments import checkpointing
from tiny_heads import tiny_head
from tiny_models import tiny_model, write_tokenizer
from tiny_policy import tiny_policy
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer

pytestmark = pytest.mark.slow


def ids_of(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


PAIRS = [
    AnswerPair(ids_of(1, 2), ids_of(3, 4, 5), ids_of(3, 9)),
    AnswerPair(ids_of(7), ids_of(8), ids_of(9, 10, 11, 12)),
    AnswerPair(ids_of(1, 2, 3), ids_of(20, 21), ids_of(20, 22)),
]


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    write_tokenizer(tmp_path)
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tmp_path)
    return loaded


def place(folder: Path) -> Place:
    return Place(folder, "cpu", "float32", 0)


def test_values_are_those_that_the_service_computes() -> None:
    model = tiny_head()
    served = HeadModel(model)
    prompts, responses = [pair.prompt_P for pair in PAIRS], [pair.answer_T for pair in PAIRS]
    found = head_values(model, prompts, responses)
    for prompt_P, ids_T, value_T in zip(prompts, responses, found.values_BT, strict=True):
        expected = served.values(prompt_P.tolist(), ids_T.tolist())
        assert value_T[: len(ids_T)].tolist() == pytest.approx(expected, abs=1e-5)
    assert found.last_B.tolist() == pytest.approx(
        [served.values(p.prompt_P.tolist(), p.answer_T.tolist())[-1] for p in PAIRS], abs=1e-5
    )


def test_a_new_head_has_the_layers_of_its_language_model_and_values_of_0(tokenizer: PreTrainedTokenizerBase) -> None:
    language_model = tiny_model(dtype=torch.float32)
    head = new_head(language_model, tokenizer)
    assert head.config.num_labels == 1
    assert head.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert head.score.bias is None
    kept = dict(language_model.base_model.named_parameters())
    for name, parameter in head.base_model.named_parameters():
        assert torch.equal(parameter, kept[name])
    assert not head_values(head, [ids_of(1)], [ids_of(2, 3)]).values_BT.any()
    with torch.no_grad():
        next(head.base_model.parameters()).add_(1.0)
    assert torch.equal(next(language_model.base_model.parameters()), next(iter(kept.values()))), "a copy"


def test_padding_that_is_the_end_of_turn_is_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    assert new_head(tiny_model(dtype=torch.float32), tokenizer).config.pad_token_id is None


def test_an_architecture_without_a_reward_model_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(CheckpointError, match="transformers has no reward model"):
        new_head(tiny_model("granite", dtype=torch.float32), tokenizer)


def manual_loss(model: HeadModel, pair: AnswerPair, loss: HeadLoss) -> float:
    demonstration, answer = (
        model.values(pair.prompt_P.tolist(), ids_T.tolist()) for ids_T in (pair.demonstration_T, pair.answer_T)
    )
    if loss == "terminal":
        return log(1 + np.exp(answer[-1] - demonstration[-1]))
    first, width = pair.first_difference, max(len(demonstration), len(answer))
    assert first is not None
    both = [side + [side[-1]] * (width - len(side)) for side in (demonstration, answer)]
    return float(np.mean([log(1 + np.exp(b - a)) for a, b in list(zip(*both, strict=True))[first:]]))


@pytest.mark.parametrize("loss", ["aligned", "terminal"])
def test_the_loss_of_a_batch_is_the_mean_of_the_formula(loss: HeadLoss) -> None:
    model = tiny_head()
    served = HeadModel(model)
    expected = np.mean([manual_loss(served, pair, loss) for pair in PAIRS])
    assert float(pair_loss(model, PAIRS, loss).detach()) == pytest.approx(expected, abs=1e-5)
    found = judge(model, [*PAIRS, AnswerPair(ids_of(1), ids_of(2), ids_of(2))], loss, 16)
    assert found is not None
    assert found.pairs == 3
    assert found.loss == pytest.approx(expected, abs=1e-5)


def test_the_terminal_loss_is_that_of_trl(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """On the same ids: TRL's collator pads, and its model finds the last token by the padding."""
    model = tiny_head()
    end = tokenizer.eos_token_id
    pairs = [
        AnswerPair(
            p.prompt_P, np.append(p.demonstration_T, end).astype(np.int32), np.append(p.answer_T, end).astype(np.int32)
        )
        for p in PAIRS
    ]
    off = checkpointing(False)
    arguments = RewardConfig(output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to="none", **off)
    rows = [
        {
            "chosen_ids": [*map(int, pair.prompt_P), *map(int, pair.demonstration_T)],
            "rejected_ids": [*map(int, pair.prompt_P), *map(int, pair.answer_T)],
        }
        for pair in pairs
    ]
    trainer = RewardTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    theirs = trainer.compute_loss(model, trainer.data_collator(rows))
    assert float(pair_loss(model, pairs, "terminal").detach()) == pytest.approx(float(theirs.detach()), abs=1e-5)


def losses_of(log_file: MetricsLog) -> list[float]:
    return [line["loss"] for line in log_file.read() if line.get("loss") is not None]  # type: ignore[misc]


@pytest.mark.parametrize("loss", ["aligned", "terminal"])
def test_training_starts_at_log_2_and_tells_the_pairs_apart(
    loss: HeadLoss, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = new_head(tiny_model(dtype=torch.float32), tokenizer)
    options = HeadOptions(
        loss=loss,
        epochs=30,
        batch_size=3,
        gradient_accumulation=1,
        learning_rate=1e-3,
        warmup_steps=0,
        log_every_steps=1,
    )
    log_file = MetricsLog(tmp_path / "log.jsonl")
    train_head(model, PAIRS, options, place(tmp_path), log_file)
    losses = losses_of(log_file)
    assert losses[0] == pytest.approx(log(2), abs=1e-5)
    assert losses[-1] < 0.5
    found = judge(model, PAIRS, loss, 1000)
    assert found is not None
    assert found.accuracy == 1.0
    assert not model.training


def test_accumulated_batches_give_the_loss_and_step_of_one(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    ends: list[Sequence[float]] = []
    for batch, accumulation in ((2, 1), (1, 2)):
        model = new_head(tiny_model(dtype=torch.float32), tokenizer)
        options = HeadOptions(
            epochs=3, batch_size=batch, gradient_accumulation=accumulation, learning_rate=1e-3, warmup_steps=0
        )
        log_file = MetricsLog(tmp_path / f"{batch}.jsonl")
        train_head(model, PAIRS[:2], options.model_copy(update={"log_every_steps": 1}), place(tmp_path), log_file)
        ends.append(losses_of(log_file))
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)


def test_a_warm_up_that_never_ends_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="warmup_steps is 50, but 3 pairs make only 1 steps: lower it"):
        train_head(tiny_head(), PAIRS, HeadOptions(), place(tmp_path), MetricsLog(tmp_path / "log.jsonl"))


def test_rewards_are_the_last_value_from_a_zero_and_the_log_probs_of_the_sft_model() -> None:
    head, sft = HeadModel(tiny_head()), tiny_policy()
    rollouts = [Rollout(ids_of(1, 2), ids_of(3, 4, 5), True), Rollout(ids_of(6), ids_of(7), False)]
    rewards = HeadRewards(head, sft, 1000).with_zero_at_mean(rollouts)
    values = [head.values(r.prompt_P.tolist(), r.response_T.tolist())[-1] for r in rollouts]
    assert rewards.zero == pytest.approx(np.mean(values), abs=1e-5)
    scored = rewards.score(rollouts)
    for rollout, value, found in zip(rollouts, values, scored, strict=True):
        assert found.signal_T[:-1].tolist() == [0.0] * (len(rollout.response_T) - 1)
        assert found.signal_T[-1] == pytest.approx(value - np.mean(values), abs=1e-5)
        assert len(found.sft_logprob_T) == len(rollout.response_T)
        assert (found.sft_logprob_T < 0).all()
    with pytest.raises(ValueError, match="no candidates"):
        rewards.score(rollouts, [ids_of(1)])
