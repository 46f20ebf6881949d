"""Columns of a Parquet output: whatever the input holds, the file is complete at the end and holds the same values."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bulk_runs import FakeScorer, a_job, run, run_fake, sums_file, write_rows
from dense_reward.bulk import job as job_module
from dense_reward.bulk.outputs import open_output

VALUES: dict[str, list[object]] = {
    "integer_that_no_float_holds": [2**60 + 1, 1.5],
    "same_in_an_object": [{"a": 2**60 + 1}, {"a": 1.5}],
    "unsigned_and_signed": [2**63 + 1, -1],
    "object_without_keys": [{}, {}],
    "object_without_keys_first": [{}, {"a": 1}],
    "object_without_keys_inside": [{"a": {}}, {"a": {"b": 1}}],
    "objects_in_lists": [[{}], []],
    "keys_that_differ": [{"a": 1, "b": 2}, {"b": 3}],
    "depth": [json.loads("[" * 60 + "]" * 60), 1],
    "truth_and_numbers": [True, 1],
    "surrogates": ["\ud800", "b"],
    "surrogates_in_keys": [{"\ud800": 1}, {"a": 2}],
    "empty_lists": [[], ["a"]],
    "text_after_a_list": [["a"], "bc"],
    "a_list_after_text": ["bc", ["a"]],
    "text_after_an_empty_list": [[], "bc"],
}


@pytest.mark.parametrize("parts", ["one_part", "two_parts"])
@pytest.mark.parametrize("name", VALUES)
def test_kept_values_come_back(tmp_path: Path, name: str, parts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "SYNC_TOKENS", 0)  # a part for each window
    prompt = "a" * (200 if parts == "two_parts" else 2)  # a window for each row
    rows = [{"prompt": prompt, "response": "b", "kept": value} for value in VALUES[name]]
    run(a_job(write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.parquet"), FakeScorer())
    table = pq.read_table(tmp_path / "out.parquet")
    found = table.column("kept").to_pylist()
    if table.schema.field("kept").metadata:
        found = list(map(json.loads, found))
    assert list(map(json.dumps, map(without_null_keys, found))) == list(map(json.dumps, VALUES[name]))


def without_null_keys(value: object) -> object:
    """Objects in Parquet have all keys of the column."""
    if isinstance(value, dict):
        return {key: without_null_keys(entry) for key, entry in value.items() if entry is not None}
    return list(map(without_null_keys, value)) if isinstance(value, list) else value


def test_json_text_has_no_nan(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "b", "kept": value} for value in (float("nan"), "x")]
    for suffix in ("parquet", "jsonl"):
        run(a_job(write_rows(tmp_path / "in.jsonl", rows), tmp_path / f"out.{suffix}"), FakeScorer())
    assert pq.read_table(tmp_path / "out.parquet").column("kept").to_pylist() == ["null", '"x"']
    big = [{"prompt": "a", "response": "b", "kept": float("nan"), "big": 2**70}]
    run(a_job(write_rows(tmp_path / "in.jsonl", big), tmp_path / "big.jsonl"), FakeScorer())
    assert "NaN" not in (tmp_path / "big.jsonl").read_text()


def test_a_name_that_is_not_unicode_is_escaped(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "b", "\ud800": 1}]
    run(a_job(write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.parquet"), FakeScorer())
    assert pq.read_table(tmp_path / "out.parquet").column("\\ud800").to_pylist() == [1]


def test_an_output_without_rows_has_the_columns_of_others(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n  \n")
    run(a_job(tmp_path / "in.jsonl", tmp_path / "none.parquet"), FakeScorer())
    pq.write_table(
        pa.table({"prompt": pa.array([], pa.large_string()), "row": pa.array([], pa.int8())}), tmp_path / "a.parquet"
    )
    run(a_job(tmp_path / "a.parquet", tmp_path / "typed.parquet"), FakeScorer())
    run(a_job(sums_file(tmp_path, 1), tmp_path / "one.parquet"), FakeScorer())
    none, typed, one = (pq.read_schema(tmp_path / f"{name}.parquet") for name in ("none", "typed", "one"))
    own = {"row", "response_index", "error", "reward", "tokens", "token_ids", "sum", "mean", "min", "length"}
    assert own <= set(none.names)
    assert all(one.field(name).type == none.field(name).type for name in set(one.names) & set(none.names))
    assert (str(typed.field("prompt").type), str(typed.field("input_row").type)) == ("large_string", "int8")


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.large_list(pa.large_string())], ids=str)
def test_a_response_of_a_typed_list_stays_one_text(tmp_path: Path, kind: pa.DataType) -> None:
    responses = pa.array([["four", "five"], ["six"]], pa.list_(pa.string())).cast(kind)
    pq.write_table(pa.table({"prompt": ["2+2", "3+3"], "responses": responses}), tmp_path / "in.parquet")
    out = tmp_path / "out.parquet"
    run_fake(a_job(tmp_path / "in.parquet", out))
    assert pq.read_table(out).column("responses").to_pylist() == ["four", "five", "six"]


def test_several_dimensions_are_lists(tmp_path: Path) -> None:
    import numpy as np  # noqa: PLC0415

    values = np.arange(4, dtype=np.int32).reshape(2, 2)
    output = open_output(tmp_path / "out.parquet", None, ["offsets"])
    output.begin({})
    output.add([{"offsets": values, "candidate_reward": values.astype(np.float32)}])
    output.sync()
    output.finish({})
    row = pq.read_table(tmp_path / "out.parquet").to_pylist()[0]
    assert row["offsets"] == row["candidate_reward"] == [[0, 1], [2, 3]]
