"""An interrupt at the worst moment: rows are written, and their counts are not yet."""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from bulk_runs import FakeScorer, a_job, run, sums_file
from dense_reward.bulk.job import Writing, opened
from dense_reward.bulk.outputs import JsonLinesOutput
from dense_reward.bulk.records import Cells, Scored
from dense_reward.bulk.run_state import state_of
from dense_reward.bulk.windows import Shard, WindowSize, score_window, windows


def scored_windows(writer: Writing) -> list[Scored]:
    job, scorer = writer.job, FakeScorer()
    writer.check_model(scorer.identity)
    cut = windows(job.source, writer.state.position, Shard(), WindowSize(5, 10_000))
    return [asyncio.run(score_window(window, job.columns, scorer)) for window in cut]


def test_an_interrupt_inside_a_step_saves_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out, whole = sums_file(tmp_path, 20), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    run(a_job(file, whole), FakeScorer())
    add, calls = JsonLinesOutput.add, 0

    def interrupted(output: JsonLinesOutput, rows: Sequence[Cells]) -> None:
        nonlocal calls
        add(output, rows)
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    def put_all() -> None:
        with opened(a_job(file, out), lambda rows, tokens: None) as writer:
            for scored in scored_windows(writer):
                writer.put(scored)
                writer.sync()

    with monkeypatch.context() as patched:
        patched.setattr(JsonLinesOutput, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            put_all()
    state = state_of(out)
    assert state is not None
    assert (state.rows, state.position.row) == (10, 10)
    run(a_job(file, out), FakeScorer())
    assert out.read_bytes() == whole.read_bytes()


def test_the_last_save_waits_for_a_step_of_another_thread_and_no_step_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, add = tmp_path / "out.jsonl", JsonLinesOutput.add
    inside, go_on = threading.Event(), threading.Event()

    def slow(output: JsonLinesOutput, rows: Sequence[Cells]) -> None:
        add(output, rows)
        inside.set()
        assert go_on.wait(30)

    def interrupted_inside_a_step() -> None:
        with opened(a_job(sums_file(tmp_path, 20), out), lambda rows, tokens: None) as writer:
            first, second, *_ = scored_windows(writer)
            step = threading.Thread(target=writer.put, args=(first,))
            step.start()
            assert inside.wait(30)
            last = threading.Thread(target=writer.end)
            last.start()
            go_on.set()
            step.join()
            last.join()
            writer.put(second)
            raise KeyboardInterrupt

    monkeypatch.setattr(JsonLinesOutput, "add", slow)
    with pytest.raises(KeyboardInterrupt):
        interrupted_inside_a_step()
    state = state_of(out)
    assert state is not None
    assert (state.rows, state.position.row) == (5, 5)
    assert state.written == {"bytes": out.stat().st_size}
    assert len(out.read_text().splitlines()) == 5
