"""The memory estimate: hand-computed parts, the advice, and what is refused. bench/memory_estimate.py measures it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset
from dense_reward_trainer.configs.base import load_config
from dense_reward_trainer.configs.sft import LoraOptions, ScratchOptions, SftConfig
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.recipe_files import config_path
from dense_reward_trainer.sft import memory_check
from dense_reward_trainer.sft.from_scratch import random_model, train_tokenizer
from dense_reward_trainer.sft.memory import ModelSizes, StepShape, advice, estimate, in_words, which_fits
from dense_reward_trainer.sft.milestones import MilestoneSchedule
from dense_reward_trainer.sft.training_rows import TrainingRows
from peft import LoraConfig, get_peft_model
from transformers import MambaConfig, MambaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

SEVEN_B = ModelSizes(
    trained=7_000_000_000,
    frozen=0,
    layers=28,
    hidden=3584,
    query=3584,
    keys=512,
    intermediate=18944,
    vocabulary=152064,
)
STEP = StepShape(tokens=8 * 2048, learnt=4096, accumulation=4, bfloat16=True, checkpointing=True, cuda=True)


def test_weights_gradients_and_moments_are_counted_in_float32_with_a_short_copy() -> None:
    needs = estimate(SEVEN_B, STEP)
    assert needs.weights == 7_000_000_000 * (4 + 2)
    assert (needs.gradients, needs.moments) == (28_000_000_000, 56_000_000_000)
    assert needs.peak > 126_000_000_000


def test_sharing_divides_weights_gradients_and_moments_but_not_activations() -> None:
    alone, shared = estimate(SEVEN_B, STEP), estimate(SEVEN_B, replace(STEP, sharing=8))
    assert shared.gradients == alone.gradients / 8
    assert shared.moments == alone.moments / 8
    assert shared.weights == pytest.approx(28e9 / 8 + 2 * 2 * 7e9 / 28)
    assert (shared.activations, shared.logits) == (alone.activations, alone.logits)


def test_ddp_keeps_a_second_copy_of_the_gradients() -> None:
    assert estimate(SEVEN_B, replace(STEP, replicas=True)).gradients == 2 * 28_000_000_000


def test_an_adapter_needs_its_frozen_base_in_the_type_it_is_held_in() -> None:
    model = replace(SEVEN_B, trained=80_000_000, frozen=7_000_000_000)
    short, four_bits = (estimate(model, replace(STEP, frozen_bytes=size)).weights for size in (2, 0.52))
    assert short == 14_000_000_000 + 80_000_000 * 6
    assert short - four_bits == pytest.approx(7e9 * 1.48)


def test_checkpointing_keeps_the_inputs_of_layers_only() -> None:
    kept = estimate(SEVEN_B, STEP).activations
    assert kept == 8 * 2048 * 4 * 3584 * (28 + 4)
    assert estimate(SEVEN_B, replace(STEP, checkpointing=False)).activations > 10 * kept


def test_the_advice_is_the_cheapest_option_that_fits() -> None:
    step = replace(STEP, checkpointing=False)
    needs = [each.needs.peak for each in advice(SEVEN_B, step, rows=8, gpus=1)]
    options = [each.option for each in advice(SEVEN_B, step, rows=8, gpus=1)]
    assert options[0] == "gradient_checkpointing=true"
    assert any("batch_size=1" in option for option in options)
    assert options[-1].endswith("lora={r: 16}")
    assert needs[0] < estimate(SEVEN_B, step).peak
    fits = which_fits(advice(SEVEN_B, step, rows=8, gpus=1), 80_000_000_000)
    assert fits is not None
    assert "--launch 2 --strategy fsdp2" in fits.option
    assert fits.needs.peak <= 80_000_000_000
    assert which_fits(advice(SEVEN_B, step, rows=8, gpus=1), 1_000_000) is None


def test_sizes_are_said_in_units_that_people_read() -> None:
    assert (in_words(61_234_000_000), in_words(310_400_000)) == ("61.2 GB", "310 MB")


def tiny() -> PreTrainedModel:
    options = ScratchOptions(vocabulary=270, hidden_size=16, layers=2, heads=2, intermediate_size=32)
    return random_model(options, train_tokenizer(["Add 1."], 270), 0)


def test_the_parameters_of_an_adapter_are_those_that_peft_makes() -> None:
    for modules in ("all-linear", ("q_proj", "v_proj"), r".*\.1\..*_proj"):
        lora = LoraOptions(r=4, target_modules=modules)
        sizes = memory_check.model_sizes(tiny(), lora)
        targets = modules if isinstance(modules, str) else list(modules)
        adapted = get_peft_model(tiny(), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
        assert sizes is not None
        made = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        whole = sum(p.numel() for p in adapted.parameters())
        assert (sizes.trained, sizes.frozen) == (made, whole - made)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
def test_an_adapter_of_fused_experts_is_counted() -> None:
    config = MixtralConfig(
        vocab_size=270,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_local_experts=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts_per_tok=2,
    )
    lora = LoraOptions(r=4)
    sizes = memory_check.model_sizes(MixtralForCausalLM(config), lora)
    adapted = get_peft_model(MixtralForCausalLM(config), LoraConfig(r=4, target_modules="all-linear"))
    assert sizes is not None
    assert sizes.trained == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert sizes.trained > 4 * 4 * (16 + 16), "the attention is not all"


def test_layers_that_peft_cannot_adapt_are_refused_by_the_name_of_the_key() -> None:
    with pytest.raises(ConfigError, match=r"lora\.target_modules: peft cannot adapt these layers: .*nope"):
        memory_check.model_sizes(tiny(), LoraOptions(r=4, target_modules=("nope",)))


def test_a_model_without_attention_trains_without_an_estimate() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=270, hidden_size=8, num_hidden_layers=1, state_size=4))
    config = load_config(SftConfig, config_path("arithmetic_sft_tiny"))
    rows = TrainingRows(Dataset.from_dict({"input_ids": [[1]], "labels": [[1]]}), None, MilestoneSchedule(1, 1, 1), 1)
    reported: list[str] = []
    memory_check.check_memory(config, model, rows, reported.append, processes=1, sharing=1)
    assert reported == ["memory: no estimate, because mamba has no attention heads: watch the first steps"]


def test_free_memory_of_a_cpu_is_what_a_service_would_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dense_reward.engines.torch.memory.free_bytes", lambda: 7)
    assert memory_check.free_bytes("cpu") == 7, "with what the system only caches, and the limit of a container"


def checked(config: SftConfig, free: int, monkeypatch: pytest.MonkeyPatch, device: str) -> list[str]:
    ids = [list(range(20)), list(range(9))]
    rows = TrainingRows(Dataset.from_dict({"input_ids": ids, "labels": ids}), None, MilestoneSchedule(2, 1, 2), 20)
    monkeypatch.setattr(memory_check, "free_bytes", lambda _: free)
    monkeypatch.setattr(memory_check, "chosen_device", lambda _: device)
    reported: list[str] = []
    memory_check.check_memory(config, tiny(), rows, reported.append, processes=1, sharing=1)
    return reported


def test_a_gpu_with_too_little_memory_is_refused_and_a_cpu_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(SftConfig, config_path("arithmetic_sft_tiny"))
    (line,) = checked(config, 10**12, monkeypatch, "cuda")
    assert line.startswith("memory: needs ")
    assert "AdamW" in line
    assert "per GPU" in line
    with pytest.raises(ConfigError, match=r"no option of sft would fit.*allow_memory=true"):
        checked(config, 1000, monkeypatch, "cuda")
    anyway = config.model_copy(update={"allow_memory": True})
    assert checked(anyway, 1000, monkeypatch, "cuda")[-1].startswith("warning: needs ")
    assert checked(config, 1000, monkeypatch, "cpu")[-1].startswith("warning: needs ")


def test_the_measured_error_is_below_a_tenth() -> None:
    measured = json.loads(Path("bench/results/memory_estimate.json").read_text())
    assert len({row["parameters"] for row in measured["rows"]}) == 3
    assert measured["memory_estimate_error"] < 0.1
    for row in measured["rows"]:
        assert row["estimate"]["peak"] / row["measured_peak"] - 1 == pytest.approx(row["relative_error"])
