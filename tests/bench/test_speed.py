"""The speed benchmark counts only necessary work, scores the same ids each time, and reuses finished rounds."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import plain_logprobs, tiny_model

from bench.speed import contestants, conversations, report
from bench.speed.contestants import Launcher, Run, ServiceRun
from bench.speed.processes import Group
from bench.speed.results import (
    E_CELLS,
    Circumstances,
    Measured,
    Peak,
    Results,
    Round,
    Rounding,
    Timed,
    figures,
    read_results,
    write_results,
)
from bench.speed.runner import DisagreementError, Ledger, compared
from bench.speed.worker_transformers import best, plain
from bench.speed.workload import (
    SHAPES,
    Shape,
    Target,
    Workload,
    causal_pairs,
    cells_of,
    draw,
    flops_of,
    gsm8k_lengths,
    read,
    same_lengths,
    write,
)
from bench.tables import block_of

KEYS = {
    "a_05b_vs_vllm",
    "a_05b_vs_transformers",
    "a_05b_vs_transformers_best",
    "a_40m_vs_transformers",
    "a_40m_vs_transformers_best",
    "logprob_error_ratio",
    "c_05b_vs_vllm",
    "c_05b_vs_transformers",
    "peak_share_a_05b",
    "peak_share_b_05b",
    "peak_share_min_e",
    "outside_model_share_40m",
    "peak_extra_mb_b",
}
HERE = Circumstances(commit="c0ffee", dtype="float32", device="cpu", processor="abacus")


def a_round(service_s: float, others: dict[str, float], peak: float = 1e9) -> Round:
    return Round(
        service=Timed(latencies_s=(service_s,), compute_s=0.9 * service_s),
        peaks=(Peak(flops_per_s=peak, shape="1x1x1"), Peak(flops_per_s=3 * peak, shape="1x1x1")),
        others={name: Timed(latencies_s=(seconds,), rms_nats=0.0) for name, seconds in others.items()},
        extra_mb=service_s,
        reward_std_nats=1.0,
    )


def measured(*rounds: Round, flops: int = 10**9) -> Measured:
    return Measured(shape="40m", prompts=1, response_tokens=8, flops=flops, rounds=rounds)


def test_operations_are_those_counted_by_hand() -> None:
    shape = Shape(hidden=4, layers=2, heads=2, key_value_heads=1, intermediate=3, vocab_size=10)
    weights = 4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 3 * 4 * 3  # query, key, value, output, MLP
    assert shape.layer_weights == weights
    # a prompt of 2, responses of 2 and 3: 2 + 1 + 2 positions, 1 + 1 + 2 rows, 3 + (2 + 1) + (2 * 2 + 3) pairs
    assert causal_pairs(2, (2, 3)) == 13
    one_model = 2 * 2 * weights * 5 + 2 * 4 * 10 * 4 + 2 * 4 * 2 * 2 * 13
    assert flops_of(shape, ((2, (2, 3)),)) == 2 * one_model


def test_the_last_token_of_a_response_costs_nothing() -> None:
    shape = SHAPES["40m"]
    assert flops_of(shape, ((5, (1,)),)) == flops_of(shape, ((5, (1, 1)),))


def test_parameters_are_those_of_the_models_that_shapes_are_named_after() -> None:
    half, seven = SHAPES["05b"], SHAPES["7b"]
    assert half.layers * half.layer_weights + half.hidden * half.vocab_size == pytest.approx(0.494e9, rel=0.01)
    assert seven.layers * seven.layer_weights + 2 * seven.hidden * seven.vocab_size == pytest.approx(7.6e9, rel=0.01)


def test_a_workload_is_the_same_each_time_and_another_in_each_round(tmp_path: Path) -> None:
    lengths = ((3, (2, 5)), (4, (1, 1)))
    drawn = draw("a", lengths, 1000, 0)
    assert drawn == draw("a", lengths, 1000, 0) == read(write(drawn, tmp_path / "workload.json"))
    assert drawn != draw("a", lengths, 1000, 1)
    assert [(len(i.prompt_ids), tuple(map(len, i.response_ids))) for i in drawn.items] == list(lengths)


def test_ids_come_from_the_whole_vocabulary() -> None:
    workload = draw("a", same_lengths(1, 2, 500, 500), 16, 0)
    assert {i for item in workload.items for ids in item.sequences for i in ids} == set(range(16))


def test_a_sequential_workload_is_one_request_for_each_prompt() -> None:
    items = draw("d", same_lengths(3, 1, 2, 2), 10, 0).items
    assert [len(request) for request in Workload(items, sequential=True).requests] == [1, 1, 1]
    assert [len(request) for request in Workload(items).requests] == [3]


def test_the_lengths_of_gsm8k_are_32_sensible_pairs() -> None:
    lengths = gsm8k_lengths()
    assert len(lengths) == 32
    assert all(20 < prompt < 400 and 20 < response < 400 for prompt, (response,) in lengths)


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_cells_have_names_of_their_own_and_shapes_stay_together(target: Target) -> None:
    cells = cells_of(target)
    assert len({cell.name for cell in cells}) == len(cells)
    shapes = [cell.shape_name for cell in cells]
    assert shapes == sorted(shapes, key=shapes.index), "a shape's contestants are loaded once"
    assert target == "gpu" or {cell.name for cell in cells} >= set(E_CELLS)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_both_ways_through_transformers_give_the_log_probs_of_the_model(batch: int) -> None:
    model = tiny_model("qwen2", dtype=torch.float32)
    items = draw("a", ((7, (5, 1)), (3, (9, 2)), (12, (4,))), model.config.vocab_size, 0).items
    sequences = [(ids, len(item.prompt_ids)) for item in items for ids in item.sequences]
    expected = [
        plain_logprobs(model, np.array(item.prompt_ids), np.array(ids))[range(len(ids)), ids]
        for item in items
        for ids in item.response_ids
    ]
    for method in (plain, best):
        np.testing.assert_allclose(method(model, sequences, batch), torch.cat(expected).numpy(), atol=1e-3)


def test_every_figure_is_there_and_null_where_it_was_not_measured() -> None:
    found = figures("cpu", Results(circumstances=HERE, settings={}))
    assert found.keys() >= KEYS
    assert set(found.values()) == {None}


def test_figures_are_medians_of_what_was_paired(tmp_path: Path) -> None:
    rounds = [a_round(1.0, {"vllm": 2.0, "transformers_8": 9.0}), a_round(4.0, {"vllm": 12.0, "transformers_8": 4.0})]
    rounds.append(a_round(2.0, {"vllm": 20.0, "transformers_8": 6.0}))
    cells = {name: measured(*rounds) for name in ("a_05b", "a_40m", "b_05b", *E_CELLS)}
    rounding = Rounding(tokens=1, service_rms_nats=0.5, transformers_rms_nats=1.0)
    results = Results(circumstances=HERE, settings={}, cells=cells, rounding=rounding)
    found = figures("cpu", results)
    assert (found["a_05b_vs_vllm"], found["a_05b_vs_transformers"]) == (3.0, 3.0)
    assert found["a_05b_vs_transformers_best"] is None
    assert found["peak_share_a_05b"] == found["peak_share_min_e"] == pytest.approx(1 / 6)
    assert found["outside_model_share_40m"] == pytest.approx(0.1)
    assert (found["peak_extra_mb_b"], found["logprob_error_ratio"]) == (4.0, 0.5)
    write_results(tmp_path / "cpu.json", found, results)
    assert json.loads((tmp_path / "cpu.json").read_text()).keys() >= KEYS
    assert read_results(tmp_path / "cpu.json") == results


def test_the_faster_batch_size_counts() -> None:
    assert measured(a_round(1.0, {"transformers_8": 3.0, "transformers_32": 2.0})).ratio("transformers") == 2.0


def test_a_contestant_that_computes_something_else_fails_the_run() -> None:
    rewards_N = np.linspace(-1, 1, 9, dtype=np.float32)
    service = ServiceRun([1.0], 0.9, rewards_N)
    assert compared("vllm", Run([2.0], rewards_N + np.float32(1e-5)), service, "float32").seconds == 2.0
    with pytest.raises(DisagreementError, match="vllm differ"):
        compared("vllm", Run([2.0], np.roll(rewards_N, 1)), service, "float32")
    with pytest.raises(DisagreementError):
        compared("vllm", Run([2.0], rewards_N * np.nan), service, "bfloat16")


def test_what_a_commit_has_measured_is_taken_up_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "float32.jsonl"
    Ledger(file, "one", fresh=False).put("a", 0, {"x": 1})
    with file.open("a") as cut_off:
        cut_off.write('{"commit": "one", "cell"')
    Ledger(file, "one", fresh=False).put("a", 1, {"x": 2})
    assert [Ledger(file, "one", fresh=False).get("a", round_) for round_ in (0, 1, 2)] == [{"x": 1}, {"x": 2}, None]
    assert Ledger(file, "another", fresh=False).get("a", 0) is None
    assert Ledger(file, "one", fresh=True).get("a", 0) is None


def test_a_paused_group_is_stopped_with_its_children_and_ends_with_its_block(tmp_path: Path) -> None:
    with Group(["sh", "-c", "sleep 600 & wait"], log=tmp_path / "log", environment={}, pipes=True) as group:
        group.pause()
        _, status = os.waitpid(group.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        assert os.WSTOPSIG(status) == signal.SIGSTOP
        with group.awake():
            _, status = os.waitpid(group.process.pid, os.WCONTINUED)
            assert os.WIFCONTINUED(status)
    assert group.process.returncode is not None
    stdin, stdout = group.process.stdin, group.process.stdout
    assert stdin is not None
    assert stdout is not None
    with stdin, stdout:
        assert stdout.read() == "", "stdout ends only after the child that shares it has ended"


def test_vllm_runs_in_the_environment_of_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "vllm").touch()
    found: list[dict[str, str]] = []
    monkeypatch.setattr(contestants, "Worker", lambda _, *, log, environment: found.append(environment))
    launcher = Launcher("cpu", "float32", 0, tmp_path)
    launcher.vllm(tmp_path, "sft")
    launcher.vllm(tmp_path, "sft", VLLM_CPU_OMP_THREADS_BIND="auto")
    assert found[0]["VLLM_CPU_OMP_THREADS_BIND"] != "auto"
    assert found[1] == found[0] | {"VLLM_CPU_OMP_THREADS_BIND": "auto"}


def test_the_page_holds_the_tables_of_the_results() -> None:
    assert block_of(report.PAGE, report.BLOCK) == report.block(report.read()), "run `python -m bench.speed report`"


def test_the_distinct_tokens_of_conversations_are_those_that_can_be_told_apart() -> None:
    seen = set()
    for at in range(conversations.REQUESTS):
        for item in conversations._items(at, 32_000):
            ids = np.array([*item["prompt_ids"], *item["response_ids"][0][:-1]], dtype=np.int32)  # type: ignore[misc,index]
            seen |= {hash(ids[: end + 1].tobytes()) for end in range(len(ids))}
    assert len(seen) == conversations.distinct_tokens()
