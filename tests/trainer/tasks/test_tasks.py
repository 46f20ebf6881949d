"""Tasks: what their data hold, and that no test problem is trained on."""

import json
from collections import Counter
from pathlib import Path

import pytest
from dense_reward_trainer.data.final_answers import final_answer
from dense_reward_trainer.data.records import DataError, Demonstration
from dense_reward_trainer.data.sources import DataSource, load
from dense_reward_trainer.tasks.nuisance_entropy import VERBS, pseudo_words
from dense_reward_trainer.tasks.records import TaskData, share_right
from dense_reward_trainer.tasks.write import AnyTask, TaskFiles, write_task
from pydantic import TypeAdapter, ValidationError

TASKS: dict[str, dict[str, object]] = {
    "additions": {"name": "additions", "digits": 2, "demonstrations": 60, "test": 20},
    "noisy": {"name": "additions", "digits": 2, "demonstrations": 60, "test": 20, "label_noise": 0.5},
    "few": {"name": "additions", "digits": 2, "demonstrations": 30, "prompts": 60, "test": 20},
    "unseen_digits": {"name": "additions", "digits": [1, 2], "demonstrations": 40, "prompt_digits": [2, 3], "test": 20},
    "other_kind": {"name": "additions", "digits": 1, "demonstrations": 40, "prompt_kind": "two_step", "test": 20},
    "two_step": {"name": "two_step", "digits": 1, "demonstrations": 60, "test": 20},
    "mixed_demonstrators": {
        "name": "mixed_demonstrators",
        "base_demonstrations": 100,
        "demonstrations": 50,
        "test": 20,
    },
    "nuisance_entropy": {"name": "nuisance_entropy", "digits": 2, "demonstrations": 60, "test": 20},
}


def data_of(options: dict[str, object], seed: int = 0) -> TaskData:
    found: TaskData = TypeAdapter(AnyTask).validate_python(options).data(seed)
    return found


def prompts_of(rows: tuple[Demonstration, ...]) -> list[str]:
    return [row.prompt_messages[0].content for row in rows]


@pytest.mark.parametrize("name", TASKS)
def test_no_test_problem_is_trained_on_and_every_test_answer_is_right(name: str) -> None:
    data = data_of(TASKS[name])
    trained = {*prompts_of(data.base), *prompts_of(data.train), *prompts_of(data.prompts)}
    tested = prompts_of(data.test)
    assert len(set(tested)) == len(tested) == 20
    assert not trained & set(tested)
    assert share_right(data.test, final_answer) == 1.0


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_decides_the_data(name: str) -> None:
    assert data_of(TASKS[name], 3) == data_of(TASKS[name], 3)
    assert data_of(TASKS[name], 3) != data_of(TASKS[name], 4)


def test_novices_forget_the_carry_in_the_stated_share_of_the_answers() -> None:
    data = data_of(TASKS["mixed_demonstrators"] | {"base_novices": 0.9, "sft_novices": 0.6})
    assert share_right(data.base, final_answer) == pytest.approx(0.1)
    assert share_right(data.train, final_answer) == pytest.approx(0.4)
    wrong = next(row for row in data.train if final_answer(row.response) != row.answer)
    assert wrong.response.split("\n")[1].split("=")[0].endswith("+0"), "the carry of the units is taken as 0"
    assert not set(prompts_of(data.base)) & set(prompts_of(data.train))


def test_noise_is_in_the_demonstrations_only() -> None:
    data, clean = data_of(TASKS["noisy"]), data_of(TASKS["noisy"] | {"label_noise": 0.0})
    changed = sum(one.response != other.response for one, other in zip(data.train, clean.train, strict=True))
    assert changed == 30
    assert [row.answer for row in data.train] == [row.answer for row in clean.train]
    assert data.test == clean.test


def test_prompts_can_be_more_or_others_than_the_demonstrations() -> None:
    few = data_of(TASKS["few"])
    assert (len(few.train), len(few.prompts)) == (30, 60)
    assert not set(prompts_of(few.train)) & set(prompts_of(few.prompts))
    digits = Counter(len(prompt.split()[1]) for prompt in prompts_of(data_of(TASKS["unseen_digits"]).prompts))
    assert set(digits) == {2, 3}
    assert all("How many" in prompt for prompt in prompts_of(data_of(TASKS["other_kind"]).prompts))


def test_neighbouring_seeds_do_not_share_their_problems() -> None:
    task = TASKS["few"] | {"digits": 3, "demonstrations": 100, "prompts": 100}
    first, second = data_of(task, 20), data_of(task, 21)
    shared = set(prompts_of(first.prompts)) & set(prompts_of(second.train))
    assert len(shared) < 5, "the problems of one seed are nearly independent of those of the next"


def test_nuisance_words_surround_the_working_and_leave_the_answer_alone() -> None:
    for row in data_of(TASKS["nuisance_entropy"]).train:
        *lines, answer = row.response.split("\n")
        assert answer == f"#### {row.answer}"
        for line in lines:
            name, verb, *_ = line.split(" ")
            assert name.istitle()
            assert verb in VERBS
            assert " , " in line
    words = pseudo_words(300, seed=12)
    assert len(set(words)) == 300
    names = Counter(row.response.split(" ")[0] for row in data_of(TASKS["nuisance_entropy"]).train)
    assert names.most_common(1)[0][1] > 60 / len(names), "frequent names are more frequent than rare ones"


def test_files_are_what_a_job_reads(tmp_path: Path) -> None:
    task = TypeAdapter(AnyTask).validate_python(TASKS["mixed_demonstrators"])
    data, files = write_task(task, 0, tmp_path), TaskFiles(tmp_path)
    for path, rows in ((files.base, data.base), (files.train, data.train), (files.test, data.test)):
        read = load(DataSource(source=str(path), held_out_fraction=0.0)).demonstrations
        assert [(row.messages, row.answer) for row in read] == [(row.messages, row.answer) for row in rows]
    write_task(TypeAdapter(AnyTask).validate_python(TASKS["additions"]), 0, tmp_path / "plain")
    assert not TaskFiles(tmp_path / "plain").base.exists()


def a_file(path: Path, *problems: int) -> dict[str, object]:
    path.write_text("".join(json.dumps({"prompt": f"{n}?", "response": f"#### {n}"}) + "\n" for n in problems))
    return {"source": str(path), "held_out_fraction": 0.0}


def test_own_files_are_used_as_they_are_for_every_seed(tmp_path: Path) -> None:
    options: dict[str, object] = {
        "name": "files",
        "train": a_file(tmp_path / "train.jsonl", 1, 2, 3),
        "test": a_file(tmp_path / "test.jsonl", 4, 5),
    }
    data = data_of(options, 0)
    assert prompts_of(data.train) == prompts_of(data.prompts) == ["1?", "2?", "3?"]
    assert [row.answer for row in data.test] == ["4", "5"]
    assert data_of(options, 1) == data


def test_own_files_must_not_share_a_test_prompt(tmp_path: Path) -> None:
    options: dict[str, object] = {
        "name": "files",
        "train": a_file(tmp_path / "train.jsonl", 1, 2),
        "test": a_file(tmp_path / "test.jsonl", 2, 3),
    }
    with pytest.raises(DataError, match=r"1 of 2 test prompts are also in `train`, the first is .*test.jsonl:1"):
        data_of(options)


def test_labelled_problems_are_not_tested(tmp_path: Path) -> None:
    task = TypeAdapter(AnyTask).validate_python(TASKS["additions"])
    write_task(task, 0, tmp_path, labelled=8)
    files = TaskFiles(tmp_path)
    tested, labelled = (
        prompts_of(load(DataSource(source=str(path), held_out_fraction=0.0)).demonstrations)
        for path in (files.test, files.labelled)
    )
    assert (len(tested), len(labelled)) == (12, 8)
    assert not set(tested) & set(labelled)
    with pytest.raises(DataError, match="labelled is 20, but there are only 20 test problems: lower it"):
        write_task(task, 0, tmp_path, labelled=20)


def test_a_test_prompt_that_is_repeated_among_the_labelled_ones_is_refused(tmp_path: Path) -> None:
    train, test = a_file(tmp_path / "train.jsonl", 1, 2), a_file(tmp_path / "test.jsonl", 4, 5, 6, 5)
    task = TypeAdapter(AnyTask).validate_python({"name": "files", "train": train, "test": test})
    write_task(task, 0, tmp_path / "task")
    with pytest.raises(DataError, match="1 prompts of the last 2 test problems, which only the preview uses, are also"):
        write_task(task, 0, tmp_path / "task", labelled=2)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"name": "mixed_demonstrators", "demonstrations": 9000}, "only 3645 two-digit sums carry"),
        ({"name": "files", "train": {"source": "x.jsonl", "held_out_fraction": 0.0}}, "nothing to test on"),
        ({"name": "additions", "digit": 3}, "digit"),
        ({"name": "sums"}, "sums"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        data_of(options)


def test_more_problems_than_exist_are_refused_in_words() -> None:
    with pytest.raises(DataError, match="too many: only 81 problems"):
        data_of({"name": "additions", "digits": 1, "demonstrations": 80})


def test_a_share_of_own_demonstrations_learns_samples_of_another_model(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "response": "guess\n#### 0", "final_answer": str(n)} for n in range(1, 9)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, object] = {
        "name": "files",
        "train": a_file(tmp_path / "train.jsonl", *range(1, 11)),
        "test": a_file(tmp_path / "test.jsonl", 20),
        "samples": {"source": str(tmp_path / "samples.jsonl"), "held_out_fraction": 0.0},
    }
    data = data_of(options | {"sampled_share": 0.7})
    assert share_right(data.train, final_answer) == pytest.approx(0.3)
    assert [row.answer for row in data.train] == [str(n) for n in range(1, 11)], "the right answers stay"
    assert {row.response for row in data.train if final_answer(row.response) == "0"} == {"guess\n#### 0"}
    assert data_of(options | {"sampled_share": 0.7}, 1).train != data.train, "a seed decides who answers what"
    assert data_of(options).train == data_of(options, 1).train
    with pytest.raises(DataError, match="9 of 10 demonstrations, but only 8 of their prompts have a sample"):
        data_of(options | {"sampled_share": 0.9})
    with pytest.raises(ValidationError, match="set samples too"):
        data_of(options | {"samples": None, "sampled_share": 0.5})
