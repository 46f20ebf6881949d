"""TRL's trainer on our pairs: its loss and gradient are ours, its reference is the model at the start of the round."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_reward.engines.fake import EOS_ID
from dense_reward_trainer.configs.irft import IrftConfig, LossName
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.rl.policy import Policy, policy_logprobs
from dense_reward_trainer.selfplay.losses import loss_at_start, pair_losses
from dense_reward_trainer.selfplay.pairs import Pair
from dense_reward_trainer.selfplay.plan import RoundPlan
from dense_reward_trainer.selfplay.trainer import PairTrainer, make_trainer, merged, training_arguments
from dense_reward_trainer.sft.from_scratch import train_tokenizer
from tiny_policy import tiny_llama
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

VOCABULARY = 270
PAIRS = [
    ((5, 6, 7), (11, 12, 3), (13, 3)),
    ((9,), (21, 3), (22, 23, 24, 25)),
    ((1, 2, 3, 4), (31, 32, 3), (31, 32, 3)),
    ((8, 8), (41, 3), (42,)),
]


def pairs() -> list[Pair]:
    shared = {"place": 0, "source": "a:1", "finished": True, "demonstration": "", "generated": ""}
    names = ("prompt_ids", "demonstration_ids", "generated_ids")
    return [Pair.model_validate(shared | dict(zip(names, pair, strict=True))) for pair in PAIRS]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["one two three"], VOCABULARY)


def trainer_of(
    folder: Path, tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM, **changes: object
) -> PairTrainer:
    values: dict[str, object] = {
        "output_dir": folder,
        "policy": "unused",
        "data": {"source": "arithmetic"},
        "batch_size": 4,
        "learning_rate": 1e-2,
        "optimiser": "adamw",
        "beta": 0.5,
        "warmup_fraction": 0.0,
        "log_every_steps": 1,
        "device": "cpu",
    }
    config = IrftConfig.model_validate(values | changes)
    steps = config.steps or 1
    return make_trainer(config, RoundPlan(1, (), 4, steps, 4 * steps, 0, 0), model, tokenizer, pairs())


def log_ratios(model: LlamaForCausalLM, old: LlamaForCausalLM) -> tuple[Tensor, Tensor]:
    """D and D' of the pairs, by the trainer's own log-probs of rl/policy."""
    prompts = [np.array(prompt, dtype=np.int32) for prompt, _, _ in PAIRS]
    sums = []
    for side in (1, 2):
        responses = [np.array(pair[side], dtype=np.int32) for pair in PAIRS]
        new, before = (policy_logprobs(Policy(m, EOS_ID, VOCABULARY), prompts, responses) for m in (model, old))
        sums.append((new - before.detach()).sum(1))
    return sums[0], sums[1]


def moved(model: LlamaForCausalLM) -> None:
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))


@pytest.mark.parametrize(("loss", "b"), [("sigmoid", 0.0), ("bernoulli", 0.0), ("bernoulli", 2.0)])
def test_loss_and_gradient_are_those_of_the_formula(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, loss: LossName, b: float
) -> None:
    model = tiny_llama(vocab_size=VOCABULARY)
    old, own = copy.deepcopy(model), copy.deepcopy(model)
    trainer = trainer_of(tmp_path, tokenizer, model, loss=loss, bernoulli_b=b)
    moved(model)
    moved(own)
    trainer._verified = True  # the model is no longer its reference
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(PAIRS))])
    found = trainer._compute_loss(model, batch, False)
    torch.autograd.backward(found)
    expected = pair_losses(loss, *log_ratios(own, old), 0.5, b).mean()
    torch.autograd.backward(expected)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert abs(float(expected.detach()) - loss_at_start("sigmoid")) > 0.01, "the model has moved"
    for (name, one), other in zip(model.named_parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)
    rewards = trainer._metrics["eval"]["rewards/chosen"][-1]
    assert rewards == pytest.approx(0.5 * float(log_ratios(own, old)[0].mean().detach()), abs=1e-4)


@pytest.mark.parametrize(
    ("loss", "b", "first"),
    [("sigmoid", 0.0, math.log(2)), ("bernoulli", 0.0, 2 * math.log(2)), ("bernoulli", 2, 2.25386)],
)
def test_the_first_loss_is_known_and_the_next_ones_are_lower(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, loss: str, b: float, first: float
) -> None:
    trainer = trainer_of(tmp_path, tokenizer, tiny_llama(vocab_size=VOCABULARY), loss=loss, bernoulli_b=b, steps=4)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(first, abs=1e-5)
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 1), (10, 1), (11, 2)])
def test_a_short_round_has_a_step_that_trains(tmp_path: Path, steps: int, warmup: int) -> None:
    values = {"output_dir": tmp_path, "policy": "unused", "data": {"source": "arithmetic"}, "device": "cpu"}
    plan = RoundPlan(1, (), 4, steps, 4 * steps, 0, 0)
    assert training_arguments(IrftConfig.model_validate(values), plan).warmup_steps == warmup


def test_rows_reach_the_model_as_they_are(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = trainer_of(tmp_path, tokenizer, tiny_llama(vocab_size=VOCABULARY))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    assert batch["input_ids"][0].tolist() == [5, 6, 7, 11, 12, 3]
    kept = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)]
    assert kept == [[11, 12, 3], [21, 3], [13, 3], [22, 23, 24, 25]], "no end of turn is appended to a cut-off answer"


def test_a_model_with_dropout_is_trained_without_it(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_llama(vocab_size=VOCABULARY)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    trainer = trainer_of(tmp_path, tokenizer, model)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert model.config.attention_dropout == 0.0


@pytest.mark.parametrize("loss", ["sigmoid", "bernoulli"])
def test_a_reference_that_is_not_the_model_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, loss: str
) -> None:
    model = tiny_llama(vocab_size=VOCABULARY)
    trainer = trainer_of(tmp_path, tokenizer, model, loss=loss)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)
    with pytest.raises(JobError, match="the model in training is not its reference"):
        trainer.train()


def test_adapters_are_trained_from_the_same_start_and_merged(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = tiny_llama(vocab_size=VOCABULARY)
    old = copy.deepcopy(model)
    trainer = trainer_of(tmp_path, tokenizer, model, lora={"r": 2, "alpha": 4}, steps=3)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    result = merged(trainer)
    assert isinstance(result, LlamaForCausalLM)
    assert set(result.state_dict()) == set(old.state_dict())
    moved_by = (result.model.layers[0].mlp.up_proj.weight - old.model.layers[0].mlp.up_proj.weight).abs().max()
    assert float(moved_by.detach()) > 1e-4
    assert torch.equal(result.lm_head.weight, old.lm_head.weight)
