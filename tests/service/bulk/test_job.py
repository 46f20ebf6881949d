"""A job in this process: what is written, and how it goes on after every kind of end."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from bulk_runs import FakeScorer, Json, a_job, expected_reward, rows_of, run, run_fake, sums_file, write_rows
from dense_reward.bulk import job as job_module
from dense_reward.bulk.local_scorer import ScoreTerms
from dense_reward.bulk.run_state import locked, state_file, state_of
from dense_reward.bulk.windows import Shard
from dense_reward.errors import BulkError, SettingsError
from dense_reward.schemas import Item


def test_every_row_gets_its_own_rewards_in_order(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run_fake(a_job(sums_file(tmp_path, 30), out), ScoreTerms(("token_ids", "tokens", "reward"), add_eos=False))
    rows = rows_of(out)
    assert [row["row"] for row in rows] == list(range(30))
    for row in rows:
        assert row["response"] == "".join(row["tokens"])
        assert row["length"] == len(row["reward"])
        assert row["sum"] == pytest.approx(sum(row["reward"]), abs=1e-5)
    assert state_of(out) is not None


def test_jsonl_and_parquet_hold_the_same(tmp_path: Path) -> None:
    file = sums_file(tmp_path, 20)
    run_fake(a_job(file, tmp_path / "out.jsonl"))
    run_fake(a_job(file, tmp_path / "out.parquet"))
    table = pq.read_table(tmp_path / "out.parquet")
    for one, other in zip(rows_of(tmp_path / "out.jsonl"), table.to_pylist(), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            same = np.float32(one[name]) == np.float32(other[name]) if name in ARRAYS else one[name] == other[name]
            assert np.all(same), name
    assert str(table.schema.field("reward").type) == "list<element: float>"
    assert json.loads(table.schema.metadata[b"dense_reward"])["model"]["revision"] == "fake"
    assert not list(tmp_path.glob("*.parts"))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_run_goes_on_where_it_ended(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out, whole = sums_file(tmp_path, 60), tmp_path / f"out.{suffix}", tmp_path / f"whole.{suffix}"
    run(a_job(file, whole), FakeScorer())
    for place in (25, 10, 5):
        with pytest.raises(BulkError, match="gone"):
            run(a_job(file, out), FakeScorer(place, BulkError("gone")))
    before = state_of(out)
    assert before is not None
    assert 0 < before.position.row < 60
    last = FakeScorer()
    run(a_job(file, out), last)
    assert last.seen == 60 - before.position.row
    assert content(out) == content(whole)


def content(out: Path) -> object:
    return out.read_bytes() if out.suffix == ".jsonl" else pq.read_table(out).to_pylist()


@pytest.mark.parametrize("behind", [b'{"prompt": "cut', b"\0" * 500, b'{"row": 3}\n'], ids=["cut", "zeros", "doubled"])
def test_what_the_state_does_not_count_is_dropped(tmp_path: Path, behind: bytes) -> None:
    file, out, whole = sums_file(tmp_path, 60), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    run(a_job(file, whole), FakeScorer())
    with pytest.raises(BulkError):
        run(a_job(file, out), FakeScorer(20, BulkError("gone")))
    with out.open("ab") as end:
        end.write(behind)
    run(a_job(file, out), FakeScorer())
    assert out.read_bytes() == whole.read_bytes()


def test_rows_that_are_scored_twice_count_once(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": f"{n}+1", "response": f"{n + 1}"} for n in range(10)]
    rows[6] = {"prompt": "without a response"}
    file, out = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    with pytest.raises(BulkError, match="row 6"):
        run_fake(a_job(file, out))
    state = state_of(out)
    assert state is not None
    assert (state.rows, state.tokens) == (6, sum(row["length"] for row in rows_of(out)))
    state = run_fake(a_job(file, out, on_error="keep")).state
    assert (state.rows, state.errors, state.tokens) == (10, 1, sum(row.get("length", 0) for row in rows_of(out)))


def test_a_finished_output_stays_as_it_is(tmp_path: Path) -> None:
    file, out = sums_file(tmp_path, 5), tmp_path / "out.jsonl"
    run(a_job(file, out), FakeScorer())
    before = out.read_bytes()
    again = FakeScorer()
    assert run(a_job(file, out), again).state.rows == 5
    assert again.seen == 0
    assert out.read_bytes() == before
    with pytest.raises(SettingsError, match='revision: "fake" then, "other" now'):
        run(a_job(file, out), FakeScorer(revision="other"))
    assert out.read_bytes() == before


def test_changed_inputs_options_and_models_are_refused_with_what_changed(tmp_path: Path) -> None:
    file, out = sums_file(tmp_path, 60), tmp_path / "out.jsonl"
    with pytest.raises(BulkError):
        run(a_job(file, out), FakeScorer(20, BulkError("gone")))
    with pytest.raises(SettingsError, match=r"options\.columns\.prompt: null then, \"response\" now"):
        run(a_job(file, out, {"prompt": "response", "response": "prompt"}), FakeScorer())
    with pytest.raises(SettingsError, match='revision: "fake" then, "other" now'):
        run(a_job(file, out), FakeScorer(revision="other"))
    file.write_text(file.read_text() + '{"prompt": "a", "response": "b"}\n')
    with pytest.raises(SettingsError, match=r"input\.sha256"):
        run(a_job(file, out), FakeScorer())


def test_an_output_without_its_state_and_a_state_without_its_output_are_refused(tmp_path: Path) -> None:
    file, out = sums_file(tmp_path, 5), tmp_path / "out.jsonl"
    out.write_text("mine\n")
    with pytest.raises(SettingsError, match="--overwrite"):
        run(a_job(file, out), FakeScorer())
    assert out.read_text() == "mine\n"
    out.unlink()
    run(a_job(file, out), FakeScorer())
    out.unlink()
    with pytest.raises(SettingsError, match="is gone"):
        run(a_job(file, out), FakeScorer())


def test_two_processes_cannot_write_one_output(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with locked(out), pytest.raises(SettingsError, match="another process writes"), locked(out):
        pass
    with locked(out):
        assert out.with_name(".out.jsonl.lock").exists()
    assert not out.with_name(".out.jsonl.lock").exists()


def test_a_full_disk_is_named_and_what_was_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out, whole = sums_file(tmp_path, 60), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    run(a_job(file, whole), FakeScorer())
    room, write = 3000, os.write

    def small_disk(descriptor: int, data: bytes) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(descriptor, bytes(data[:room]))
        room -= written
        return written

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", small_disk)
        with pytest.raises(BulkError, match=r"the disk is full\. free space and run the same command again"):
            run(a_job(file, out), FakeScorer())
    state = state_of(out)
    assert state is not None
    assert state.rows == state.position.row > 0
    run(a_job(file, out), FakeScorer())
    assert out.read_bytes() == whole.read_bytes()


ARRAYS = ("reward", "sft_logprob", "reference_logprob")
BAD: list[Json] = [{"prompt": "a", "response": "b"}, {"prompt": "a"}, {"prompt": "c", "response": "d"}]


def test_a_bad_row_stops_the_run_behind_the_rows_before_it_and_can_be_kept_later(tmp_path: Path) -> None:
    file, out = write_rows(tmp_path / "in.jsonl", BAD), tmp_path / "out.jsonl"
    with pytest.raises(BulkError, match=r"(?s)row 1 .*--on-error keep"):
        run(a_job(file, out), FakeScorer())
    assert [row["row"] for row in rows_of(out)] == [0]
    writer = run(a_job(file, out, on_error="keep"), FakeScorer())
    assert (writer.state.rows, writer.state.errors) == (3, 1)
    rows = rows_of(out)
    assert [row["row"] for row in rows] == [0, 1, 2]
    assert "a prompt together with either response or responses" in rows[1]["error"]
    assert rows[2]["reward"] == pytest.approx(expected_reward(Item.model_validate(BAD[2])), abs=1e-6)


def test_a_run_that_wrote_no_row_does_not_bind_the_next_one(tmp_path: Path) -> None:
    """Wrong columns are noticed at the first row: the right ones need no --overwrite."""
    rows: list[Json] = [{"question": "a", "answer": "b"}]
    for suffix in (".jsonl", ".parquet"):
        file, out = write_rows(tmp_path / "in.jsonl", rows), tmp_path / f"out{suffix}"
        with pytest.raises(BulkError, match=r"(?s)--columns.*No row is written yet"):
            run(a_job(file, out), FakeScorer(revision="other"))
        writer = run(a_job(file, out, {"prompt": "question", "response": "answer"}), FakeScorer())
        assert (writer.state.done, writer.state.rows, writer.state.errors) == (True, 1, 0)


def test_faults_that_the_service_finds_belong_to_their_rows(tmp_path: Path) -> None:
    rows: list[Json] = [
        {"prompt_ids": [1], "response_ids": [2]},
        {"prompt_ids": [1], "response_ids": [9999]},
        {"text": "ab"},
    ]
    out = tmp_path / "out.jsonl"
    run_fake(a_job(write_rows(tmp_path / "in.jsonl", rows), out, on_error="keep"))
    found = rows_of(out)
    assert [row["error"] is None for row in found] == [True, False, True]
    assert "unknown_token_id" in found[1]["error"]


def test_shards_hold_all_rows_together(tmp_path: Path) -> None:
    file = sums_file(tmp_path, 200)
    outs = [tmp_path / f"out{index}.jsonl" for index in (1, 2, 3)]
    for index, out in enumerate(outs, 1):
        run(a_job(file, out, shard=Shard(index, 3)), FakeScorer())
    assert sorted(row["row"] for out in outs for row in rows_of(out)) == list(range(200))


def test_columns_without_a_common_type_become_json_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "SYNC_TOKENS", 0)  # a part for each window
    values = [1, "x", None, {"a": 2}, 2**70, [1, "y"]]
    rows: list[Json] = [
        {"prompt": "a" * 200, "response": "b", "mixed": value, "n": n} for n, value in enumerate(values)
    ]
    out = tmp_path / "out.parquet"
    run(a_job(write_rows(tmp_path / "in.jsonl", rows), out), FakeScorer())
    table = pq.read_table(out)
    found = table.column("mixed").to_pylist()
    assert [None if value is None else json.loads(value) for value in found] == values
    assert table.schema.field("mixed").metadata == {b"json": b"1"}
    assert table.column("n").to_pylist() == list(range(6))


def test_types_of_a_parquet_input_stay(tmp_path: Path) -> None:
    import datetime  # noqa: PLC0415

    import pyarrow as pa  # noqa: PLC0415

    days = [datetime.date(2024, 1, day) for day in (1, 2)]
    columns = {"prompt": ["a", "b"], "response": ["c", "d"], "small": pa.array([1, 2], pa.int8()), "day": days}
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    run(a_job(tmp_path / "in.parquet", tmp_path / "out.parquet"), FakeScorer())
    table = pq.read_table(tmp_path / "out.parquet")
    assert str(table.schema.field("small").type) == "int8"
    assert table.column("day").to_pylist() == days
    run(a_job(tmp_path / "in.parquet", tmp_path / "out.jsonl"), FakeScorer())
    assert rows_of(tmp_path / "out.jsonl")[1]["day"] == "2024-01-02"


def test_what_no_float_holds_is_kept_in_jsonl(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "b", "big": 2**70, "odd": "\ud800"}]
    out = tmp_path / "out.jsonl"
    run(a_job(write_rows(tmp_path / "in.jsonl", rows), out), FakeScorer())
    assert (rows_of(out)[0]["big"], rows_of(out)[0]["odd"]) == (2**70, "\ud800")


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    file, out = sums_file(tmp_path, 5), tmp_path / "out.jsonl"
    run(a_job(file, out), FakeScorer())
    state_file(out).write_text("{}")
    with pytest.raises(SettingsError, match="cannot be read"):
        run(a_job(file, out), FakeScorer())
