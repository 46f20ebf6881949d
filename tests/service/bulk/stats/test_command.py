"""The command `stats`, on files of known rewards."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bulk_runs import FakeScorer, Json, a_job, run, sums_file, write_rows
from dense_reward.bulk.stats.arguments import add_stats
from dense_reward.bulk.stats.command import print_stats
from dense_reward.bulk.windows import Shard
from dense_reward.errors import BulkError, SettingsError


def stats(*arguments: str) -> Json:
    """The numbers that the command writes."""
    parser = argparse.ArgumentParser()
    add_stats(parser)
    numbers = Path(arguments[0]).parent / "numbers.json"
    assert print_stats(parser.parse_args([*arguments, "--json", str(numbers)])) == 0
    found: Json = json.loads(numbers.read_text("utf-8"))
    return found


def scored(folder: Path, name: str, rewards: list[list[float]]) -> Path:
    rows = [
        {
            "row": n,
            "response_index": 0,
            "error": None,
            "reward": reward,
            "tokens": [f" t{i}"[:2] for i in range(len(reward))],
        }
        for n, reward in enumerate(rewards)
    ]
    return write_rows(folder / name, rows)


def test_values_are_grouped_by_position_and_length(tmp_path: Path) -> None:
    one = scored(tmp_path, "one.jsonl", [[1.0, 2.0, 3.0, 4.0]])
    other = scored(tmp_path, "other.jsonl", [[-5.0], []])
    found = stats(str(one), str(other), "--no-plot")
    assert found["responses"] == 3
    assert {name: group["mean"] for name, group in found["by_position"].items()} == {"0": -2.0, "1-2": 2.5, "3-6": 4.0}
    assert {name: group["mean"] for name, group in found["by_length"].items()} == {"1": -5.0, "4-7": 2.5}
    assert (found["sums"]["min"], found["sums"]["max"]) == (-5.0, 10.0)
    assert found["by_class"]["word start"]["count"] == 5


def test_the_lowest_spans_are_found_and_shown_in_their_context(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [[0.0] * 6 for _ in range(30)]
    rows[17][3:5] = [-8.0, -4.0]
    rows[9][0] = -2.0
    found = stats(str(scored(tmp_path, "one.jsonl", rows)), "--no-plot", "--lowest", "2", "--span", "2")
    places = [(span["row"], span["start"], span["end"], span["mean"]) for span in found["lowest"]]
    assert places == [(17, 3, 5, -6.0), (9, 0, 2, -1.0)]
    assert "row 17, response 0, tokens 3-4:  t t t« t t» t" in capsys.readouterr().out


def test_it_reads_what_score_writes_and_draws(tmp_path: Path) -> None:
    for suffix in ("jsonl", "parquet"):
        run(a_job(sums_file(tmp_path, 40), tmp_path / f"out.{suffix}"), FakeScorer())
    jsonl, parquet = (stats(str(tmp_path / f"out.{suffix}")) for suffix in ("jsonl", "parquet"))
    assert jsonl["responses"] == 40
    assert jsonl["by_class"] == parquet["by_class"]
    assert (tmp_path / "out.stats.png").read_bytes().startswith(b"\x89PNG")


def test_an_output_that_is_not_complete_is_read_as_far_as_it_is_safe(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(BulkError):
        run(a_job(sums_file(tmp_path, 60), out), FakeScorer(40, BulkError("gone")))
    with out.open("ab") as end:
        end.write(b'{"prompt": "cut')
    assert 0 < stats(str(out), "--no-plot")["responses"] < 60


def test_rows_with_an_error_are_counted_apart(tmp_path: Path) -> None:
    rows: list[Json] = [{"row": 0, "error": "too long"}, {"row": 1, "reward": [1.0], "error": None}]
    found = stats(str(write_rows(tmp_path / "out.jsonl", rows)), "--no-plot")
    assert (found["responses"], found["errors"]) == (1, 1)


@pytest.mark.parametrize("bad", [float("nan"), None, float("inf")], ids=["nan", "null", "inf"])
def test_rewards_that_are_not_finite_are_counted_apart_and_named(
    tmp_path: Path, bad: float | None, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[Json] = [{"row": n, "error": None, "reward": [1.0, value]} for n, value in enumerate([3.0, bad, 5.0])]
    file = write_rows(tmp_path / "out.jsonl", rows)
    found = stats(str(file), "--no-plot")
    assert (found["responses"], found["not_finite"], found["tokens"]["mean"]) == (2, 1, 2.5)
    assert f"the first is {file} row 1" in capsys.readouterr().out


def test_sums_of_long_responses_have_right_quantiles(tmp_path: Path) -> None:
    found = stats(str(scored(tmp_path, "one.jsonl", [[-9_000.0] * 3, [-9_000.0] * 5, [0.0]])), "--no-plot")
    assert found["sums"]["p50"] == pytest.approx(-27_000, rel=0.006)


OTHERS = {
    "other": ('{"a": 1}\n', "has no rewards"),
    "cut": ('{"row": 0, "rew', "is cut or no JSON"),
    "list": ("[1]\n", "no JSON object"),
    "number": ('{"row": 0, "reward": 1.5, "tokens": ["a"]}\n', "rewards are lists"),
    "name": ('{"row": "a", "reward": [1.5]}\n', "rewards are lists"),
    "texts": ('{"row": 0, "reward": ["a"]}\n', "not a list of numbers"),
    "lists": ('{"row": 0, "reward": [[1.0], [2.0]]}\n', "not a list of numbers"),
    "tokens": ('{"row": 0, "reward": [1.0], "tokens": "a"}\n', "not a list of texts"),
    "deep": ('{"row": ' + "[" * 9000, "is cut or no JSON"),
}


@pytest.mark.parametrize(("content", "reason"), OTHERS.values(), ids=OTHERS)
def test_other_files_are_refused(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(BulkError, match=reason):
        stats(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("damage", ["columns", "types", "cut", "page"])
def test_other_parquet_files_are_refused(tmp_path: Path, damage: str) -> None:
    columns = {"columns": {"a": [1]}, "types": {"row": [0], "reward": [1.0]}}
    table = pa.table(columns.get(damage, {"row": list(range(500)), "reward": [[float(n)] for n in range(500)]}))
    file = tmp_path / "a.parquet"
    pq.write_table(table, file, compression="none", write_page_checksum=True)
    content = bytearray(file.read_bytes())
    if damage == "page":
        content[300] ^= 0xFF
    if damage == "cut":
        del content[1000:]
    file.write_bytes(content)
    with pytest.raises(BulkError, match=r"has no rewards|rewards are lists|cannot be read as Parquet"):
        stats(str(file), "--no-plot")


def test_a_file_named_twice_is_refused(tmp_path: Path) -> None:
    file = scored(tmp_path, "one.jsonl", [[1.0]])
    with pytest.raises(SettingsError, match="named twice"):
        stats(str(file), f"{tmp_path}/../{tmp_path.name}/one.jsonl")


def test_results_are_not_written_over_the_input_or_where_there_is_no_folder(tmp_path: Path) -> None:
    file = scored(tmp_path, "one.jsonl", [[1.0]])
    before = file.read_bytes()
    with pytest.raises(SettingsError, match=r"--plot .* is a FILE"):
        stats(str(file), "--plot", str(file))
    for name in ("none/a.png", "a.nothing"):
        with pytest.raises(BulkError, match="name another file with --plot"):
            stats(str(file), "--plot", str(tmp_path / name))
    assert file.read_bytes() == before


def test_an_output_that_is_not_complete_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for suffix in ("jsonl", "parquet"):
        with pytest.raises(BulkError, match="gone"):
            run(a_job(sums_file(tmp_path, 60), tmp_path / f"out.{suffix}"), FakeScorer(40, BulkError("gone")))
    found = stats(str(tmp_path / "out.jsonl"), "--no-plot")
    assert f"not complete: the statistics are of its first {found['responses']} rows" in capsys.readouterr().out
    with pytest.raises(BulkError, match="is not complete: run its dense-reward score command again"):
        stats(str(tmp_path / "out.parquet"), "--no-plot")


def test_outputs_that_do_not_belong_together_are_refused_or_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sums_file(tmp_path, 200)
    for index in (1, 3):
        job = a_job(file, tmp_path / f"{index}.jsonl", shard=Shard(index, 3))
        run(replace(job, options={**job.options, "shard": f"{index}/3"}), FakeScorer())
    run(a_job(file, tmp_path / "other.jsonl"), FakeScorer(revision="other"))
    run(a_job(file, tmp_path / "twice.jsonl"), FakeScorer(revision="other"))
    shards = [str(tmp_path / f"{index}.jsonl") for index in (1, 3)]
    stats(*shards, "--no-plot")
    assert "Shards 2/3 of the input are not among the files." in capsys.readouterr().out
    stats(*shards, str(tmp_path / "other.jsonl"), "--no-plot")
    assert "of different models" in capsys.readouterr().out
    with pytest.raises(BulkError, match="hold the same rows"):
        stats(str(tmp_path / "other.jsonl"), str(tmp_path / "twice.jsonl"), "--no-plot")
