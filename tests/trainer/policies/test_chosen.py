"""One answer out of several samples: its accuracy, and what is not measured."""

import numpy as np
import pytest
from dense_reward_trainer.configs.dpr import HeldOutOptions
from dense_reward_trainer.configs.evaluate import ChooseOptions
from dense_reward_trainer.configs.signals import Aggregate
from dense_reward_trainer.data.sources import ChatMessage, Demonstration
from dense_reward_trainer.data.tokenised import TokenisedRow, encode_demonstrations
from dense_reward_trainer.policies.chosen import measure_chosen
from dense_reward_trainer.policies.signals import SampleSignals
from dense_reward_trainer.rl.held_out_metrics import Drawn
from dense_reward_trainer.rl.policy import PolicyCheckpoint, frozen_logprobs
from dense_reward_trainer.rl.records import Rollout
from dense_reward_trainer.rl.sampling import Sampling
from tiny_policy import tiny_checkpoint

OPTIONS = HeldOutOptions(max_new_tokens=12)
SAMPLES = {"1+1": ["#### 3", "#### 2", "so\n#### 2", "#### 5"], "2+2": ["#### 5", "#### 4", "#### 5", "#### 6"]}


def rows_of(checkpoint: PolicyCheckpoint) -> list[TokenisedRow]:
    demonstrations = [
        Demonstration((ChatMessage("user", prompt), ChatMessage("assistant", f"#### {answer}")), answer, prompt)
        for prompt, answer in {"1+1": "2", "2+2": "4"}.items()
    ]
    encoder = checkpoint.encoder
    return list(encode_demonstrations(demonstrations, encoder, every_turn=False, limit_tokens=128, skip_bad=False).rows)


def drawn_of(checkpoint: PolicyCheckpoint, rows: list[TokenisedRow], *, finished: bool = True) -> Drawn:
    rollouts = []
    for row, texts in zip(rows, SAMPLES.values(), strict=True):
        for text in texts:
            ids_T = checkpoint.encoder.response(text, add_eos=finished).ids_T
            rollouts.append(Rollout(row.encoded.prompt_P, ids_T, finished))
    return Drawn(rollouts, Sampling(12, 4))


def test_the_answer_of_the_majority_counts_and_its_first_sample_is_kept() -> None:
    checkpoint = tiny_checkpoint()
    rows = rows_of(checkpoint)
    result, samples = measure_chosen(
        checkpoint, rows, OPTIONS, drawn_of(checkpoint, rows), ChooseOptions(samples=4, by="majority")
    )
    assert [(sample.text, sample.right) for sample in samples] == [("#### 2", True), ("#### 5", False)]
    assert result.sampled_accuracy is not None
    assert (result.sampled_accuracy.value, result.sampled_accuracy.count) == (0.5, 2)
    assert result.length_tokens.value == len("#### 2") + 1
    assert (result.greedy_accuracy, result.nll_per_token, result.kl_to_sft) == (None, None, None)


def test_samples_that_were_cut_off_do_not_vote() -> None:
    checkpoint = tiny_checkpoint()
    rows = rows_of(checkpoint)
    drawn = drawn_of(checkpoint, rows, finished=False)
    result, samples = measure_chosen(checkpoint, rows, OPTIONS, drawn, ChooseOptions(samples=4, by="majority"))
    assert [sample.text for sample in samples] == ["#### 3", "#### 5"]
    assert result.truncated.value == 1.0


def test_a_high_power_takes_the_likeliest_sample() -> None:
    checkpoint = tiny_checkpoint()
    rows = rows_of(checkpoint)
    drawn = drawn_of(checkpoint, rows)
    _, samples = measure_chosen(checkpoint, rows, OPTIONS, drawn, ChooseOptions(samples=4, by="power", power=1e4))
    prompts, responses = [r.prompt_P for r in drawn.rollouts], [r.response_T for r in drawn.rollouts]
    best_P = frozen_logprobs(checkpoint.policy, prompts, responses, 4096).sum(1).reshape(2, 4).argmax(1).tolist()
    assert [sample.text for sample in samples] == [
        texts[best] for texts, best in zip(SAMPLES.values(), best_P, strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "window", "texts"),
    [("sum", 8, ["so\n#### 2", "#### 6"]), ("min", 8, ["#### 3", "#### 4"]), ("window_min", 2, ["#### 2", "#### 4"])],
)
def test_the_sample_with_the_best_aggregate_of_its_signal_is_chosen(
    name: Aggregate, window: int, texts: list[str]
) -> None:
    """Of four samples to each prompt the first two or all compete."""
    checkpoint = tiny_checkpoint()
    rows = rows_of(checkpoint)
    values = [[-2, -2], [0, -3], [9, 9], [9, 9], [-4, -4], [-1, -3], [-5, -5], [0, -3.5]]
    signals: SampleSignals = {"reward": [np.array(row, np.float32) for row in values]}
    size = 2 if name != "sum" else 4
    choose = ChooseOptions(samples=size, by="reward", aggregate=name, window=window)
    _, samples = measure_chosen(checkpoint, rows, OPTIONS, drawn_of(checkpoint, rows), choose, signals=signals)
    assert [sample.text for sample in samples] == texts


def test_fewer_samples_are_the_first_ones_of_each_prompt() -> None:
    checkpoint = tiny_checkpoint()
    rows = rows_of(checkpoint)
    drawn = drawn_of(checkpoint, rows)
    first = drawn.first(2)
    assert first.rollouts == [drawn.rollouts[b] for b in (0, 1, 4, 5)]
    assert first.sampling.group_size == 2
