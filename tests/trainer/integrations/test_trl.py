"""TRL's GRPOTrainer with token advantages from a real service: the gradient of the dpr job, refusals, a few steps."""

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import trl_processes
from datasets import Dataset
from dense_reward import Client
from dense_reward_trainer.configs.dpr import DprConfig
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.integrations.trl import (
    DenseReward,
    DenseRewardGRPOTrainer,
    check_dropout,
    check_processes,
    check_rendering,
)
from dense_reward_trainer.rl.advantages import action_advantages
from dense_reward_trainer.rl.learner import Learner, flat_gradient
from dense_reward_trainer.rl.policy import load_policy
from dense_reward_trainer.rl.reward_service import ServiceAddress, connected
from dense_reward_trainer.runs.timer import Timer
from pydantic import ValidationError
from served_pair import ServedPair, environment, free_port
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, RLOOConfig

# TRL 1.16 uses names that transformers 5.24 has deprecated.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")]

GROUP, PROMPTS, NEW_TOKENS = 4, 2, 12
TEXTS = [f"Add {n} and {2 * n}.\n" for n in range(11, 11 + PROMPTS)]


def arguments(folder: Path, **changes: object) -> GRPOConfig:
    values: dict[str, object] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": GROUP * PROMPTS,
        "num_generations": GROUP,
        "max_completion_length": NEW_TOKENS,
        "max_steps": 1,
        "beta": 0.0,
        "loss_type": "dr_grpo",
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return GRPOConfig(**(values | changes))


def trainer_of(
    served: ServedPair, folder: Path, dense_reward: DenseReward | None = None, **changes: object
) -> DenseRewardGRPOTrainer:
    others = {name: changes.pop(name) for name in ("reward_funcs", "tools") if name in changes}
    sft = served.folder / "sft"
    return DenseRewardGRPOTrainer(
        str(sft),
        dense_reward or DenseReward(service_url=served.url),
        arguments(folder, **changes),
        processing_class=AutoTokenizer.from_pretrained(sft, padding_side="left"),
        train_dataset=Dataset.from_list([{"prompt": text} for text in TEXTS]),
        **others,
    )


@contextmanager
def closing(trainer: DenseRewardGRPOTrainer) -> Iterator[DenseRewardGRPOTrainer]:
    try:
        yield trainer
    finally:
        trainer.close()


def dpr(served: ServedPair, **changes: object) -> DprConfig:
    values: dict[str, object] = {
        "output_dir": "unused",
        "policy": served.folder / "sft",
        "prompts": {"source": "unused"},
        "service_url": served.url,
        "steps": 1,
        "prompts_per_step": PROMPTS,
        "group_size": GROUP,
        "max_new_tokens": NEW_TOKENS,
    }
    return DprConfig.model_validate(values | changes)


OPTIONS = {
    "plain": {"baseline": "none", "kl_coefficient": 0.2},
    "leave_one_out": {"gamma": 0.9},
    "min": {"returns": "min"},
    "immediate": {"returns": "immediate", "baseline": "kl", "signal": "centred"},
    "whitened total": {"returns": "total", "whiten": True, "reward_clip": 0.5, "kl_coefficient": 0.0},
}


# normalise of dpr -> loss_type of TRL, and the factor between the two
LOSSES = {"sequences": ("dr_grpo", NEW_TOKENS), "tokens": ("dapo", 1)}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("normalise", LOSSES)
def test_the_loss_and_its_gradient_are_those_of_the_dpr_job_on_the_same_samples(
    options: dict[str, object],
    normalise: str,
    served: ServedPair,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    config, (loss_type, factor) = dpr(served, normalise=normalise, **options), LOSSES[normalise]
    checkpoint = load_policy(config.policy, precision="float32", device="cpu")
    learner = Learner.of(config, checkpoint.policy)
    trainer = trainer_of(
        served, tmp_path, DenseReward.model_validate({"service_url": served.url, **options}), loss_type=loss_type
    )
    prompts = [np.asarray(ids, dtype=np.int32) for ids in trainer.processing_class(text=TEXTS)["input_ids"]]
    address, sha256 = ServiceAddress.of(config.service_url, config), checkpoint.manifest.tokenizer_sha256
    with connected(address, sha256, print, signal=config.signal, with_kl=config.baseline == "kl") as rewards:
        batch = learner.sample_batch(1, prompts, rewards, Timer())
    actions = action_advantages(batch, config, config.kl_coefficient)
    expected = learner.gradient(batch)
    with closing(trainer):
        texts = [text for text in TEXTS for _ in range(GROUP)]
        sampled = {rollout.prompt_P.tobytes() for rollout in batch.rollouts[:GROUP]}
        if prompts[0].tobytes() not in sampled:
            texts.reverse()
        output, loss = step(trainer, texts, [r.response_T.tolist() for r in batch.rollouts])
    own_BT = actions.advantage_BTM[..., 0]
    torch.testing.assert_close(output["advantages"][:, : own_BT.shape[1]], own_BT.float(), rtol=1e-4, atol=1e-4)
    found = flat_gradient(trainer.accelerator.unwrap_model(trainer.model)) * factor
    assert float(expected.norm()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.norm()))
    divisor = len(own_BT) if normalise == "sequences" else float(batch.mask_BT.sum())
    own_loss = -float((own_BT * batch.mask_BT).sum()) / divisor
    difference = abs(float(loss) * factor - own_loss) / max(1.0, abs(own_loss))
    record_property("trl_loss_difference", difference)
    assert difference <= 1e-5


def step(
    trainer: DenseRewardGRPOTrainer, texts: Sequence[str], completions: list[list[int]]
) -> tuple[dict[str, Tensor], Tensor]:
    """The output and loss of a step with given samples; the gradient is in the model."""
    trainer._generate_single_turn = lambda *_, **__: (completions, None)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    output = trainer._generate_and_score_completions([{"prompt": text} for text in texts])
    loss = cast(Tensor, trainer._compute_loss(trainer.model, output))
    torch.autograd.backward(loss)
    return output, loss.detach()


def test_three_steps_run_and_their_metrics_are_those_of_the_token_rewards(served: ServedPair, tmp_path: Path) -> None:
    with closing(trainer_of(served, tmp_path, max_steps=3, num_iterations=2, temperature=0.8)) as trainer:
        before = flat(trainer)
        trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert len(logged) == 3
    for line in logged[::2]:  # each batch of samples gives two steps
        assert {"dense_reward/reward_sum", "dense_reward/kl_to_sft", "dense_reward/truncated"} <= line.keys()
        assert not {"reward", "frac_reward_zero_std"} & line.keys()
    assert all(line["grad_norm"] > 0 for line in logged)
    assert not torch.equal(before, flat(trainer))


def flat(trainer: DenseRewardGRPOTrainer) -> Tensor:
    return torch.cat([weight.detach().flatten().clone() for weight in trainer.model.parameters()])


def test_scalar_rewards_of_the_user_are_added_to_every_token(served: ServedPair, tmp_path: Path) -> None:
    def length(completion_ids: list[list[int]], **_: object) -> list[float]:
        return [float(len(ids)) for ids in completion_ids]

    completions = [[5] * n for n in range(1, GROUP * PROMPTS + 1)]
    texts = [text for text in TEXTS for _ in range(GROUP)]
    with closing(trainer_of(served, tmp_path, scale_rewards="none")) as alone:
        dense = step(alone, texts, completions)[0]["advantages"]
    with closing(trainer_of(served, tmp_path, scale_rewards="none", reward_funcs=length)) as both:
        output = step(both, texts, completions)[0]
    centred = torch.tensor([-1.5, -0.5, 0.5, 1.5]).repeat(PROMPTS)[:, None]
    torch.testing.assert_close(output["advantages"], dense + centred * output["completion_mask"], rtol=0, atol=1e-4)
    assert "reward" in both._metrics["train"]


def test_an_evaluation_with_other_groups_has_the_metrics_too(served: ServedPair, tmp_path: Path) -> None:
    changes = {"num_generations_eval": 1, "per_device_eval_batch_size": 3}
    with closing(trainer_of(served, tmp_path, None, **changes)) as trainer:
        found = trainer.evaluate(
            eval_dataset=Dataset.from_list([{"prompt": f"Add {n} and 1.\n"} for n in range(11, 14)])
        )
    assert {"eval_dense_reward/reward_sum", "eval_dense_reward/kl_to_sft"} <= found.keys()


def test_means_over_processes_count_tokens_where_they_are_means_over_tokens(served: ServedPair, tmp_path: Path) -> None:
    other = torch.tensor([[4.0 * 6, 6.0]]), torch.tensor([[4.0 * 2, 2.0]])  # of a process with 2 responses of 3 tokens
    with closing(trainer_of(served, tmp_path)) as trainer:
        for name, theirs in zip(("entropy", "reward_sum"), other, strict=True):
            trainer.accelerator.gather = lambda own, theirs=theirs: torch.cat([own, theirs])
            trainer._log_means("train", {"length_mean": 1.0, name: 2.0} if name == "entropy" else {name: 2.0}, 2)
    logged = trainer._metrics["train"]
    assert logged["dense_reward/entropy"] == [pytest.approx((2 * 2 + 4 * 6) / 8)]
    assert logged["dense_reward/reward_sum"] == [pytest.approx(3.0)]


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "vespo": ({"loss_type": "vespo"}, "loss_type vespo reads one advantage of a whole response"),
    "off-policy mask": ({"off_policy_mask_threshold": 1.0}, "off_policy_mask_threshold reads one advantage"),
    "truncated": ({"mask_truncated_completions": True}, "mask_truncated_completions hides responses"),
    "tools": ({"tools": [print]}, "tools: tokens that the policy did not write"),
}


@pytest.mark.parametrize(("changes", "complaint"), REFUSED.values(), ids=REFUSED)
def test_options_under_which_token_advantages_would_be_wrong_are_refused(
    changes: dict[str, object], complaint: str, served: ServedPair, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        trainer_of(served, tmp_path, None, **changes)


def test_a_group_that_two_processes_share_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args.per_device_train_batch_size = 2
    with pytest.raises(ConfigError, match=r"is 2, not a multiple of num_generations \(4\)"):
        DenseRewardGRPOTrainer("unused", DenseReward(), args)


def test_rloo_is_refused_because_it_broadcasts_wrongly(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a GRPOConfig, not RLOOConfig"):
        DenseRewardGRPOTrainer("unused", DenseReward(), RLOOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"candidates": 4}, "TRL's loss uses only sampled ids"),
        ({"kl_penalty": "loss_k2"}, "set beta of GRPOConfig"),
        ({"group_size": 8}, "set num_generations of GRPOConfig"),
        ({"gamma": 0.9, "returns": "total"}, "gamma only discounts"),
    ],
)
def test_what_trl_cannot_do_is_refused(values: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        DenseReward.model_validate(values)


def test_statistics_over_a_part_of_the_batch_are_refused() -> None:
    check_processes(DenseReward(whiten=True), 1)
    for dense_reward, name in ((DenseReward(whiten=True), "whiten"), (DenseReward(baseline="batch"), "baseline batch")):
        with pytest.raises(ConfigError, match=f"{name} needs all responses of a step"):
            check_processes(dense_reward, 2)


def test_chats_that_trl_would_render_otherwise_are_refused(served: ServedPair) -> None:
    with Client(served.url) as client:
        card = client.models()[0]
    check_rendering(card, {})
    thinking = card.model_copy(update={"template_kwargs": {"enable_thinking": False}})
    check_rendering(thinking, {"enable_thinking": False})
    with pytest.raises(ConfigError, match="set chat_template_kwargs of GRPOConfig"):
        check_rendering(thinking, {})
    with pytest.raises(ConfigError, match="which TRL does not write"):
        check_rendering(card.model_copy(update={"response_prefix": "<think>"}), {})


def test_dropout_is_refused() -> None:
    check_dropout(torch.nn.Dropout(0.0))
    with pytest.raises(ConfigError, match="set disable_dropout"):
        check_dropout(torch.nn.Sequential(torch.nn.Dropout(0.1)))


def test_another_tokenizer_than_that_of_the_service_is_refused(served: ServedPair, tmp_path: Path) -> None:
    sft = served.folder / "sft"
    tokenizer = AutoTokenizer.from_pretrained(sft, padding_side="left")
    tokenizer.add_tokens(["another"])
    data = Dataset.from_list([{"prompt": text} for text in TEXTS])
    with pytest.raises(JobError, match="the reward service cannot be used"):
        DenseRewardGRPOTrainer(
            str(sft),
            DenseReward(service_url=served.url),
            arguments(tmp_path),
            processing_class=tokenizer,
            train_dataset=data,
        )


def test_two_processes_train_what_one_does(served: ServedPair, tmp_path: Path) -> None:
    several = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    for name, launcher, rows in (("one", [], 2 * GROUP), ("two", several, GROUP)):
        (tmp_path / name).mkdir()
        place = [str(served.folder / "sft"), served.url, str(tmp_path / name), str(rows)]
        command = [sys.executable, *launcher, trl_processes.__file__, *place]
        done = subprocess.run(
            command, env=environment() | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / name / "weights.pt") for name in ("one", "two"))
    start = AutoModelForCausalLM.from_pretrained(served.folder / "sft", dtype=torch.float32).state_dict()
    assert max(float((one[key] - start[key]).abs().max()) for key in start) > 1e-3
    for key, weight in one.items():
        torch.testing.assert_close(two[key], weight, rtol=0, atol=1e-5, msg=key)
