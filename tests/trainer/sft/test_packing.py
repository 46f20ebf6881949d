"""Packed rows: nothing is cut, the samples of each step are counted exactly, and the loss is that without packing."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from dense_reward.manifest import load_manifest
from dense_reward_trainer.cli import main
from dense_reward_trainer.configs.sft import SftConfig
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.runs.run_folder import MetricsLog
from dense_reward_trainer.sft.milestones import PackedSchedule
from dense_reward_trainer.sft.packing import check_packing, packed_rows
from dense_reward_trainer.sft.row_order import shuffled_order
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file
from tiny_configs import CONFIGS, MAX_LENGTH_TOKENS, VOCABULARY
from transformers import PreTrainedConfig, RwkvConfig

pytestmark = pytest.mark.slow

SHORT = (
    "threads=1",
    "data={source: arithmetic, arithmetic: {demonstrations: 18, digits: 2}}",
    "eval_every_steps=null",
    "log_every_steps=1",
    "learning_rate=0.01",
    "warmup_steps=0",
)


def trained(folder: Path, *overrides: str) -> Path:
    assert main(["sft", "arithmetic_sft_tiny", f"output_dir={folder}", *SHORT, *overrides]) == 0
    return folder


def logged(folder: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "checkpoints" / "sft" / "model.safetensors"))


def test_no_token_is_cut_and_each_demonstration_is_whole_in_one_row() -> None:
    rows = [[100 * i + t for t in range(n)] for i, n in enumerate((7, 3, 5, 2, 8, 4, 8, 1))]
    packed = packed_rows(Dataset.from_dict({"input_ids": rows, "labels": rows}), 8)
    found = []
    for row, lengths in zip(packed.dataset["input_ids"], packed.dataset["seq_lengths"], strict=True):
        assert len(row) == sum(lengths) <= 8
        ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
        found += [row[end - n : end] for end, n in zip(ends, lengths, strict=True)]
    assert sorted(found) == rows
    assert packed.samples == tuple(map(len, packed.dataset["seq_lengths"]))
    assert len(packed.samples) == 5, "38 tokens need no more than five rows of 8"


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 7), st.integers(1, 40))
def test_samples_of_packed_rows_are_counted_row_by_row(samples: list[int], per_step: int, steps: int) -> None:
    order = shuffled_order(len(samples), seed=3)
    schedule = PackedSchedule.of(samples, order, per_step, steps)
    totals, epoch, waiting = [0], 0, order(0)
    while len(totals) <= steps:
        totals.append(totals[-1] + sum(samples[row] for row in waiting[:per_step]))
        waiting = waiting[per_step:]
        if not waiting:
            epoch += 1
            waiting = order(epoch)
    assert [schedule.samples_processed(step) for step in range(steps + 1)] == totals
    assert schedule.unique_samples(steps) == min(totals[-1], sum(samples))
    assert schedule.step_at(0.5) == next(step for step in range(steps + 1) if 2 * totals[step] >= totals[-1])


def test_a_packed_step_has_the_loss_and_the_gradient_of_the_same_demonstrations_alone(tmp_path: Path) -> None:
    one_step = ["batch_size=18", "max_steps=1", "milestones={}"]
    alone = trained(tmp_path / "alone", *one_step)
    packed = trained(tmp_path / "packed", *one_step, "packing=true")
    assert logged(packed, "num_tokens") == logged(alone, "num_tokens")
    assert logged(packed, "loss") == pytest.approx(logged(alone, "loss"), rel=1e-6)
    assert logged(packed, "grad_norm") == pytest.approx(logged(alone, "grad_norm"), rel=1e-5)
    off = torch.cat([(weights(packed)[name] - weight).abs().flatten() for name, weight in weights(alone).items()])
    # Adam's first step is the sign of the gradient, so rounding of a gradient near 0 can move a weight.
    assert float((off > 1e-5).float().mean()) < 2e-3


def test_a_packed_run_counts_demonstrations_and_resumes_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["packing=true", "batch_size=1", "gradient_accumulation=2", "epochs=3", "save_every_steps=1"]
    unbroken = trained(tmp_path / "unbroken", *given)
    sft, reference = (load_manifest(unbroken / "checkpoints" / name) for name in ("sft", "reference"))
    assert (sft.samples_processed, sft.samples_total, sft.unique_samples) == (51, 51, 17)
    assert reference.samples_processed is not None
    assert 26 <= reference.samples_processed < 31, "the first step at or past half"
    tokens = logged(unbroken, "num_tokens")
    assert tokens[-1] == 3 * tokens[len(tokens) // 3 - 1], "each epoch has each demonstration once"

    append = MetricsLog.append

    def interrupted(log: MetricsLog, step: int, values: Mapping[str, float | None]) -> None:
        if step == len(tokens) // 2 + 1:
            raise KeyboardInterrupt
        append(log, step, values)

    folder = tmp_path / "broken"
    with monkeypatch.context() as patched:
        patched.setattr(MetricsLog, "append", interrupted)
        assert main(["sft", "arithmetic_sft_tiny", f"output_dir={folder}", *SHORT, *given]) == 130
    trained(folder, *given)
    assert logged(folder, "loss") == logged(unbroken, "loss")
    for name, weight in weights(unbroken).items():
        assert torch.equal(weights(folder)[name], weight), name


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "gemma2", "gemma3", "gpt2", "phi3", "mixtral"])
def test_architectures_whose_attention_reads_restarting_positions_are_packed(name: str) -> None:
    check_packing(CONFIGS[name])


RWKV = RwkvConfig(vocab_size=VOCABULARY, context_length=MAX_LENGTH_TOKENS, hidden_size=32, num_hidden_layers=2)
MIXING: dict[str, PreTrainedConfig] = {name: CONFIGS[name] for name in ("lfm2", "bloom", "mpt", "roberta")} | {
    "rwkv": RWKV
}


@pytest.mark.parametrize("name", MIXING)
def test_architectures_that_mix_packed_demonstrations_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"packing: .*set packing=false"):
        check_packing(MIXING[name])


def test_packing_and_batches_by_length_exclude_each_other() -> None:
    given = {"output_dir": "run", "data": {"source": "arithmetic"}, "scratch": {}}
    with pytest.raises(ValidationError, match="packing leaves no padding"):
        SftConfig.model_validate(given | {"packing": True, "group_by_length": True})
