"""Which prompts are trained on, in which order, and which are refused before anything is computed."""

import json
from collections import Counter
from pathlib import Path

import pytest
from dense_reward.engines.fake import FakeTokenizer
from dense_reward.text.encode import Encoder
from dense_reward_trainer.data.sources import DataError, DataSource
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.rl.prompts import (
    check_disjoint,
    check_room_at_service,
    held_out_rows,
    prompts_of_step,
    prompts_sha256,
    training_prompts,
)
from hypothesis import given
from hypothesis import strategies as st
from tiny_policy import ids_of

ENCODER = Encoder.of(FakeTokenizer(), "plain")
LONG = "x" * 90


def source_in(folder: Path, *prompts: str, **options: object) -> DataSource:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "response": "#### 1"}) + "\n" for p in prompts))
    return DataSource.model_validate({"source": str(path), "held_out_fraction": 0.0, **options})


def ignore(_: str) -> None:
    """A report that no test reads."""


def test_prompts_are_rendered_as_in_training_and_each_counts_once(tmp_path: Path) -> None:
    prompts = training_prompts(source_in(tmp_path, "a", "b", "a"), ENCODER, 128, 16, ignore)
    assert [prompt.tolist() for prompt in prompts] == [ENCODER.prompt("a").tolist(), ENCODER.prompt("b").tolist()]


def test_only_the_training_side_of_the_split_is_taken(tmp_path: Path) -> None:
    names = [f"prompt {i}" for i in range(40)]
    whole = training_prompts(source_in(tmp_path, *names), ENCODER, 128, 16, ignore)
    part = training_prompts(source_in(tmp_path, *names, held_out_fraction=0.5), ENCODER, 128, 16, ignore)
    assert 0 < len(part) < len(whole) == 40


def test_a_prompt_that_leaves_no_room_is_refused_with_its_line_or_left_out_and_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"prompts.jsonl:2: .* set max_new_tokens to at most 36"):
        training_prompts(source_in(tmp_path, "a", LONG), ENCODER, 128, 64, ignore)
    reports: list[str] = []
    prompts = training_prompts(source_in(tmp_path, "a", LONG, skip_bad=True), ENCODER, 128, 64, reports.append)
    assert len(prompts) == 1
    assert "left out 1 lines" in reports[1]


def test_what_was_read_and_what_was_not_is_reported_for_prompts_and_for_what_is_measured_on(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a", "response": "b", "id": 7}) + "\n")
    reports: list[str] = []
    training_prompts(DataSource(source=str(path), held_out_fraction=0.0), ENCODER, 128, 16, reports.append)
    held_out_rows(path, ENCODER, 128, 16, reports.append)
    assert reports == 2 * [f"{path}: 1 rows read as prompt+response\ncolumns not read: id"]


def test_prompts_need_no_response(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    ask = [{"role": "user", "content": "a"}]
    path.write_text(json.dumps({"prompt": ask, "reward_model": {"ground_truth": "1"}}) + "\n")
    (prompt_P,) = training_prompts(DataSource(source=str(path), held_out_fraction=0.0), ENCODER, 128, 16, ignore)
    assert prompt_P.tolist() == ENCODER.prompt("a").tolist()
    with pytest.raises(DataError, match="no response to learn"):
        held_out_rows(path, ENCODER, 128, 16, ignore)


def test_nothing_left_to_train_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prompt is left"):
        training_prompts(source_in(tmp_path, LONG, skip_bad=True), ENCODER, 128, 64, ignore)


def test_held_out_prompts_that_are_trained_on_are_refused(tmp_path: Path) -> None:
    prompts = training_prompts(source_in(tmp_path, "a", "b"), ENCODER, 128, 16, ignore)
    held_out = held_out_rows(Path(source_in(tmp_path, "b", "c").source), ENCODER, 128, 16, ignore)
    with pytest.raises(DataError, match=r"1 of 2 held-out prompts are also trained on, .*:1"):
        check_disjoint(prompts, held_out)
    check_disjoint(prompts, held_out[1:])


def test_a_held_out_prompt_that_leaves_no_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"set held_out_options.max_new_tokens to at most 36"):
        held_out_rows(Path(source_in(tmp_path, LONG).source), ENCODER, 128, 64, ignore)


def test_rollouts_longer_than_the_service_takes_are_refused() -> None:
    check_room_at_service(10, [ids_of(1, 2)], 8)
    with pytest.raises(JobError, match="can have 11 tokens with their prompts, the reward service takes 10"):
        check_room_at_service(10, [ids_of(1, 2), ids_of(1, 2, 3)], 8)


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 3))
def test_every_prompt_comes_once_an_epoch_whatever_the_step_size(prompts: int, per_step: int, seed: int) -> None:
    stock = [ids_of(i) for i in range(prompts)]
    steps = 3 * prompts
    drawn = [int(p[0]) for step in range(1, steps + 1) for p in prompts_of_step(stock, step, per_step, seed)]
    epochs = [drawn[start : start + prompts] for start in range(0, len(drawn), prompts)]
    assert len(drawn) == steps * per_step
    assert all(Counter(epoch) == Counter(range(prompts)) for epoch in epochs[:-1])


def test_the_order_follows_from_seed_and_epoch() -> None:
    stock = [ids_of(i) for i in range(50)]
    first, again, other_seed = (prompts_of_step(stock, 1, 50, seed) for seed in (0, 0, 1))
    next_epoch = prompts_of_step(stock, 2, 50, 0)
    assert [p.tolist() for p in first] == [p.tolist() for p in again]
    assert [p.tolist() for p in first] not in ([p.tolist() for p in other] for other in (other_seed, next_epoch))


def test_the_hash_of_prompts_tells_where_one_ends() -> None:
    assert prompts_sha256([ids_of(1, 2), ids_of(3)]) != prompts_sha256([ids_of(1), ids_of(2, 3)])
    assert prompts_sha256([ids_of(1, 2)]) == prompts_sha256([ids_of(1, 2)])
