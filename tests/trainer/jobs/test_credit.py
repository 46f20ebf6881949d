"""The credit job with a real service: planted errors, sampled answers, labelled solutions, and refusals."""

import json
import re
import signal
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import get_args

import killed_job
import pytest
from dense_reward import Client, Scored
from dense_reward.client.requests import ItemToScore
from dense_reward.schemas import ArrayName
from dense_reward_trainer.cli import main
from dense_reward_trainer.configs.credit import CreditConfig
from dense_reward_trainer.configs.signals import Aggregate
from dense_reward_trainer.credit.answer_ranking import rank
from dense_reward_trainer.credit.error_localisation import (
    localise,
    messages_of,
    planted_errors,
)
from dense_reward_trainer.credit.judged_answers import AGGREGATES, JudgedAnswers
from dense_reward_trainer.credit.references import References
from dense_reward_trainer.data.corruption import Corrupter, ErrorKind
from dense_reward_trainer.data.sources import ChatMessage, DataSource, Demonstration, load
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.rl.policy import load_policy
from dense_reward_trainer.rl.reward_service import PinnedPair, ServiceAddress, pinned_pair
from dense_reward_trainer.rl.sampling import Sampling, sample
from served_pair import ServedPair, environment

pytestmark = pytest.mark.slow
HAS_Z = "varentropy" in get_args(ArrayName)
ONE_MODEL = [name for name in ("sft_logprob", "entropy_corrected", "z_score", "margin") if name != "z_score" or HAS_Z]
COLUMNS = [*ONE_MODEL, "reward:default", "centred:default"]


def answer(response: str) -> Demonstration:
    return Demonstration((ChatMessage("user", "?"), ChatMessage("assistant", response)), None, "here:1")


def config(**changes: object) -> CreditConfig:
    return CreditConfig.model_validate({"output_dir": "run", "data": {"source": "arithmetic"}, **changes})


def credit(served: ServedPair, run: Path, *overrides: str) -> int:
    """Runs the command and returns its exit code; without a policy, unless an override names one."""
    data = [
        f"data.source={served.folder / 'held_out.jsonl'}",
        "answers=3",
        "policy=null",
        "corruptions=[digit, number]",
    ]
    return main(["credit", "arithmetic_credit", f"output_dir={run}", f"service_url={served.url}", *data, *overrides])


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_without_a_policy_the_job_measures_planted_errors_and_leaves_the_table_in_its_folder(
    served: ServedPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert credit(served, tmp_path / "run") == 0
    result = json.loads((tmp_path / "run" / "credit.json").read_text())["result"]
    assert set(result["localisation"]) == {"digit", "number"}
    for found in result["localisation"].values():
        assert list(found) == COLUMNS
        for one in found.values():
            assert all(0 <= x["low"] <= x["value"] <= x["high"] <= 1 for x in (one["auroc"], one["hit"]))
    for kind in ("digit", "number"):
        assert list(result["planted_ranking"][kind]) == COLUMNS
        assert list(result["planted_ranking"][kind]["reward:default"]) == list(AGGREGATES)
    assert result["ranking"] is None
    assert result["verdict"] is None
    assert result["references"] == {"default": str(served.folder / "reference")}
    assert (tmp_path / "run" / "credit.png").stat().st_size > 10_000
    reported = capsys.readouterr().err
    assert f"waiting for {served.url}, up to 900 s" in reported
    assert "corrupted digit against the other tokens of its answer, 3 answers" in reported


@pytest.mark.parametrize("request_tokens", [1, 100, 100_000])
def test_answers_are_asked_in_requests_of_the_size_that_is_configured(
    served: ServedPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_tokens: int
) -> None:
    demonstrations = load(DataSource(source=str(served.folder / "held_out.jsonl"))).demonstrations
    chats = [messages_of(demonstration) for demonstration in demonstrations]
    requested: list[int] = []
    settings = config(output_dir=tmp_path, service_request_tokens=request_tokens)
    with pinned_pair(ServiceAddress.of(served.url, settings), ignore) as pinned:
        whole = pinned.score([{"messages": chat} for chat in chats], ["reward"]).results
        score = PinnedPair.score

        def counted(
            pair: PinnedPair, items: Sequence[ItemToScore], include: Collection[ArrayName], top_k: int
        ) -> Scored:
            requested.append(len(items))
            return score(pair, items, include, top_k)

        monkeypatch.setattr(PinnedPair, "score", counted)
        found = list(pinned.score_chats(chats, ["reward"]))
    assert [one.length for one in found] == [one.length for one in whole]
    assert sum(requested) == len(chats)
    assert len(requested) == len(chats) if request_tokens == 1 else len(requested) < len(chats)
    assert (len(requested) == 1) == (request_tokens == 100_000)


@pytest.mark.parametrize("kind", ["digit", "number", "word", "step"])
def test_a_corrupted_answer_has_as_many_tokens_as_the_right_one_and_differs_in_its_span_alone(
    served: ServedPair, tmp_path: Path, kind: ErrorKind
) -> None:
    demonstrations = load(DataSource(source=str(served.folder / "held_out.jsonl"))).demonstrations
    corrupter = Corrupter.of(kind, [one.response for one in demonstrations])
    with pinned_pair(ServiceAddress.of(served.url, config(output_dir=tmp_path)), ignore) as pinned:
        found = list(planted_errors(References((pinned,)), demonstrations, corrupter, seed=0))
    assert found
    with Client(served.url) as client:
        for planted_one, right_answer, wrong_answer in found:
            right, corruption = planted_one.demonstration.response, planted_one.corruption
            prompt = planted_one.demonstration.messages[0].content
            (scored,) = client.score(prompt=prompt, response=right).results
            assert wrong_answer.scored.length == right_answer.scored.length == scored.length
            assert scored.reward is not None
            assert right_answer.signals["reward:default"] == pytest.approx(scored.reward, abs=1e-3)
            assert corruption.text != right
            assert corruption.text[: corruption.start] == right[: corruption.start]
            assert corruption.text[corruption.end :] == right[corruption.end :]


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("digit", "only 1 answers can hold an error of kind digit, but answers is 2: set answers to at most 1"),
        (
            "step",
            "only 0 answers can hold .*: leave step out of corruptions. Such an answer has a line before its last",
        ),
    ],
)
def test_more_answers_than_hold_such_an_error_are_refused(
    served: ServedPair, tmp_path: Path, kind: ErrorKind, complaint: str
) -> None:
    demonstrations = [answer("none at all"), answer("one 1")]
    with (
        pinned_pair(ServiceAddress.of(served.url, config(output_dir=tmp_path)), ignore) as pinned,
        pytest.raises(ConfigError, match=complaint),
    ):
        localise(
            References((pinned,)),
            demonstrations,
            Corrupter.of(kind, []),
            count=2,
            against="tokens",
            window=8,
            seed=0,
        )


def test_labelled_solutions_are_measured_step_against_step(served: ServedPair, tmp_path: Path) -> None:
    lines = [{"problem": "Add 1 and 2.", "steps": ["1+2=3", "3+1=5", "#### 5"], "label": 1}] * 3
    lines.append({"problem": "Add 1 and 2.", "steps": ["1+2=3"], "label": -1})
    (tmp_path / "solutions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert credit(served, tmp_path / "run", f"solutions={tmp_path / 'solutions.jsonl'}") == 0
    result = json.loads((tmp_path / "run" / "credit.json").read_text())["result"]
    assert result["solutions"] == 3
    with Client(served.url) as client:
        text = "1+2=3\n\n3+1=5\n\n#### 5"
        (scored,) = client.score(prompt="Add 1 and 2.", response=text).results
    assert scored.offsets is not None
    assert scored.reward is not None
    ends = scored.offsets[:, 1]
    right, wrong = scored.reward[ends <= 7].mean(), scored.reward[(ends > 7) & (ends <= 14)].mean()
    assert result["steps"]["reward:default"]["auroc"]["value"] == float(wrong < right)


def test_right_and_wrong_samples_are_told_apart_and_aggregated_as_the_service_pays_them(
    served: ServedPair, tmp_path: Path
) -> None:
    """A random model gives no right answers, so a text of even length counts as right."""
    settings = config(output_dir=tmp_path, service_request_tokens=200)
    checkpoint = load_policy(served.folder / "sft", precision="float32", device="cpu")
    demonstrations = load(DataSource(source=str(served.folder / "held_out.jsonl"))).demonstrations
    with pinned_pair(ServiceAddress.of(served.url, settings), ignore) as pinned:
        judged = rank(
            References((pinned,)),
            checkpoint,
            demonstrations,
            Sampling(40, batch_size=256),
            samples=120,
            window=4,
            seed=0,
            report=ignore,
            is_right=is_even,
        )

    each = -(-120 // len(demonstrations))
    prompts = [checkpoint.encoder.prompt(one.messages[0].content) for one in demonstrations]
    rollouts = sample(checkpoint.policy, prompts, Sampling(40, each, batch_size=256), seed=0)[:120]
    expected: list[tuple[bool, float, float, float]] = []
    with Client(served.url) as client:
        for rollout in rollouts:
            body = [int(i) for i in rollout.response_T[: len(rollout.response_T) - rollout.finished]]
            right = rollout.finished and len(checkpoint.encoder.tokenizer.text_and_spans(body)[0]) % 2 == 0
            scored = client.score_ids(rollout.prompt_P, [rollout.response_T]).results[0]
            assert scored.reward is not None
            windows = [scored.reward[i : i + 4].mean() for i in range(max(scored.length - 3, 1))]
            expected.append((right, float(scored.reward.sum()), float(scored.reward.min()), float(min(windows))))
    assert judged.right == [right for right, *_ in expected]
    assert judged.counts == (sum(judged.right), 120 - sum(judged.right))
    assert min(judged.counts) > 0
    places: tuple[tuple[int, Aggregate], ...] = ((1, "sum"), (2, "min"), (3, "window_min"))
    for place, name in places:
        assert judged.scores["reward:default"][name] == pytest.approx([one[place] for one in expected], abs=1e-3)
    assert judged.prompt == [index // each for index in range(120)]
    ranking = judged.ranking(0)
    assert list(ranking) == COLUMNS
    for one in (ranking[column][name] for column in COLUMNS for name in AGGREGATES):
        assert 0 <= one.auroc.low <= one.auroc.value <= one.auroc.high <= 1
        assert one.calibration is not None


def test_all_references_of_a_service_are_compared_in_one_table(
    served_run: ServedPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert credit(served_run, tmp_path / "all", "corruptions=[digit]") == 0
    record = json.loads((tmp_path / "all" / "credit.json").read_text())
    columns = [*ONE_MODEL, "reward:half", "centred:half", "reward:early", "centred:early"]
    assert list(record["result"]["localisation"]["digit"]) == columns
    assert record["result"]["references"] == {
        name: str(served_run.folder / folder) for name, folder in (("half", "reference"), ("early", "early"))
    }
    assert [model["name"] for model in record["models"]] == ["half", "early"]
    assert f"reference of the pair early: {served_run.folder / 'early'}" in capsys.readouterr().err
    assert credit(served_run, tmp_path / "one", "corruptions=[digit]", "service_pairs=[early]") == 0
    alone = json.loads((tmp_path / "one" / "credit.json").read_text())["result"]["localisation"]["digit"]
    assert list(alone) == [*ONE_MODEL, "reward:early", "centred:early"]
    assert alone == {column: record["result"]["localisation"]["digit"][column] for column in alone}


@pytest.mark.parametrize(("checker", "error"), [("final_answer", "add final_answer to the rows"), ("exact", None)])
def test_samples_are_judged_by_the_checker_that_is_set(
    served: ServedPair, tmp_path: Path, capsys: pytest.CaptureFixture[str], checker: str, error: str | None
) -> None:
    """Answers without `#### `: final_answer can judge none, and says so before anything is measured."""
    rows = [{"prompt": f"Add {n} and 1.", "response": f"{n}+1={n + 1}"} for n in range(4)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [f"data.source={tmp_path / 'own.jsonl'}", "corruptions=[]", f"checker={checker}"]
    sampled = [f"policy={served.folder / 'sft'}", "samples=4", "max_new_tokens=8"]
    assert credit(served, tmp_path / "run", *own, *sampled) == (0 if error is None else 2)
    printed = capsys.readouterr().err
    if error is None:
        assert "0 samples are right and 4 are wrong" in printed
    else:
        assert error in printed
        assert not (tmp_path / "run").exists()


def is_even(_: Demonstration, text: str) -> bool:
    return len(text) % 2 == 0


def ignore(_: str) -> None:
    """A report that is not checked."""


def test_solutions_without_a_right_step_before_a_wrong_one_are_refused(
    served: ServedPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"problem": "P", "steps": ["a", "b"], "label": label} for label in (-1, 0)]
    (tmp_path / "solutions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert credit(served, tmp_path / "run", f"solutions={tmp_path / 'solutions.jsonl'}") == 2
    assert "none of 2 has right steps before a wrong one" in last_line(capsys)


@pytest.mark.parametrize(("right", "wrong"), [(2, 0), (0, 2)])
def test_samples_that_are_all_right_or_all_wrong_cannot_be_ranked(right: int, wrong: int) -> None:
    count = right + wrong
    scores = {column: {name: [1.0] * count for name in AGGREGATES} for column in COLUMNS}
    judged = JudgedAnswers([True] * right + [False] * wrong, [0] * count, scores)
    with pytest.raises(ConfigError, match=f"{right} samples are right and {wrong} are wrong, .* policy=null"):
        judged.ranking(0)


def test_samples_of_one_kind_are_reported_at_once_and_the_other_figures_are_kept(
    served: ServedPair, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def score_rollouts(*_: object) -> None:
        raise AssertionError("samples that cannot be ranked are not scored")

    monkeypatch.setattr(References, "score_rollouts", score_rollouts)
    policy = f"policy={served.folder / 'sft'}"
    assert credit(served, tmp_path / "run", "corruptions=[digit]", policy, "samples=4", "max_new_tokens=8") == 0
    words = "0 samples are right and 4 are wrong, but ranking compares the two"
    assert capsys.readouterr().err.count(words) == 2, "once when it is known, and in the table"
    result = json.loads((tmp_path / "run" / "credit.json").read_text())["result"]
    assert (result["right"], result["wrong"], result["ranking"], result["verdict"]) == (0, 4, None, None)
    assert words in result["not_ranked"]
    assert list(result["localisation"]["digit"]) == COLUMNS


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["policy={sft}", "samples=4", "max_new_tokens=90"], "the reward service takes 96: lower max_new_tokens"),
        (["policy=missing"], "no such checkpoint folder"),
        (["corruptions=[]"], "corruptions is empty, so nothing is measured"),
        (["service_pair=other"], "'other' does not name one pair"),
        (["service_pairs=[default, other]"], "'other' does not name one pair"),
        (["service_pairs=[default, default]"], "service_pairs names default twice"),
        (["service_pairs=[default]", "service_pair=default"], "service_pair and service_pairs both name pairs"),
        (["service_url=nonsense"], "service_url: .* has no http"),
        (["service_url=http://127.0.0.1:9", "service_patience_s=0.1"], "cannot be used: gave up after 1 attempts"),
        (["data.source=missing.jsonl"], "there is no such file"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    served: ServedPair, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], complaint: str
) -> None:
    chosen = [override.format(sft=served.folder / "sft") for override in overrides]
    assert credit(served, tmp_path / "run", *chosen) == 2
    last = last_line(capsys)
    assert last.startswith("error: ")
    assert re.search(complaint, last), last
    assert not (tmp_path / "run" / "credit.json").exists()


def test_a_run_that_was_killed_keeps_what_it_measured_and_ends_alike(
    served: ServedPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [
        f"data.source={served.folder / 'held_out.jsonl'}",
        "answers=3",
        "policy=null",
        "corruptions=[digit, number]",
    ]
    arguments = [f"output_dir={tmp_path / 'run'}", f"service_url={served.url}", *data]
    command = killed_job.command(signal.SIGKILL, "planted_digit.json", "credit", "arithmetic_credit", *arguments)
    killed = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    kept = tmp_path / "run" / "parts" / "planted_digit.json"
    written = kept.stat().st_mtime_ns
    assert credit(served, tmp_path / "run") == 0
    assert kept.stat().st_mtime_ns == written
    assert "finished: " in last_line(capsys)
    assert credit(served, tmp_path / "unbroken") == 0
    results = [json.loads((tmp_path / run / "credit.json").read_text())["result"] for run in ("run", "unbroken")]
    assert results[0] == results[1]
