"""Checkpoints with weights in common, as they are trained: adapters over one base, and frozen layers."""

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dense_reward.checkpoints.probe import probe_of_texts
from dense_reward.checkpoints.write_manifest import ManifestFacts, write_manifest
from dense_reward.engines.torch import load
from dense_reward.engines.torch.load import LoadContext, LoadedModels, ServingOptions, load_pair
from dense_reward.engines.torch.pair import PairEngine
from dense_reward.manifest import Role
from dense_reward.records import Wants
from peft import LoraConfig, get_peft_model
from shared_models import ALL, LAYERS, TRUNKS, assert_same_bits, changed, counted, llama, upper
from tiny_models import write_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

SERVING = ServingOptions(max_batch_tokens=1000)
MB = 1e6


def finish(folder: Path, role: Role, step: int, base: Path | None = None) -> Path:
    write_tokenizer(folder)
    facts = ManifestFacts(role=role, run_id="run", renderer="plain", optimiser_step=step, adapter_base=base)
    write_manifest(folder, facts, probe_of_texts)
    return folder


def write_model(folder: Path, model: PreTrainedModel, role: Role, step: int) -> Path:
    model.save_pretrained(folder)
    return finish(folder, role, step)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    return write_model(folder, changed(llama(), ["weight"]), "reference", 0)


def write_adapter(folder: Path, base: Path, role: Role, seed: int, **options: object) -> Path:
    """An adapter with random weights, as peft saves it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | options
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    adapted.save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))
    return finish(folder, role, 10 * seed, base)


def write_adapters(folder: Path, base: Path, **options: object) -> tuple[Path, Path]:
    return (
        write_adapter(folder / "sft", base, "sft", 2, **options),
        write_adapter(folder / "reference", base, "reference", 1, **options),
    )


def loaded(
    pair: tuple[Path, Path], models: LoadedModels | None = None, **changes: object
) -> tuple[PairEngine, list[str]]:
    reports: list[str] = []
    context = LoadContext(reports.append, models=LoadedModels() if models is None else models)
    return load_pair(*pair, replace(SERVING, **changes), context)[0], reports  # type: ignore[arg-type]


@pytest.fixture
def without_sharing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def switch_off() -> None:
        monkeypatch.setattr(load, "hold_once", lambda *_: 0)
        monkeypatch.setattr(load, "layers_computed_once", lambda *_, **__: 0)

    return switch_off


@pytest.mark.parametrize(
    "changes", [{}, {"dtype": "bfloat16", "norm_dtype": "float32", "head_dtype": "float32"}], ids=["plain", "mixed"]
)
def test_adapters_of_the_upper_layers_compute_the_base_below_them_once(
    base: Path, tmp_path: Path, changes: dict[str, str], without_sharing: Callable[[], None]
) -> None:
    pair = write_adapters(tmp_path, base, layers_to_transform=[2, 3])
    engine, reports = loaded(pair, None, **changes)
    assert "layers 0 to 1 of 4 equal in both models: computed once" in reports
    own = [n for n, w in engine.models[1].weights.items() if w.data_ptr() != engine.models[0].weights[n].data_ptr()]
    assert own == [f"model.layers.{i}.{m}.weight" for i in (2, 3) for m in ("self_attn.q_proj", "mlp.down_proj")]
    scores = engine.score(TRUNKS, ALL)
    computed = counted(engine.models)
    engine.score(TRUNKS, Wants())
    assert computed == {(0, i): 1 for i in range(4)} | {(1, 2): 1, (1, 3): 1}

    without_sharing()
    plain, _ = loaded(pair, None, **changes)
    assert plain.info == engine.info  # the revision too
    assert_same_bits(scores, plain.score(TRUNKS, ALL))
    adapted = sum(engine.models[1].weights[name].nbytes for name in own)
    assert plain.weights_bytes == 2 * plain.models[0].weights_bytes
    assert engine.weights_bytes == plain.models[0].weights_bytes + adapted
    memory = f"memory: weights {engine.weights_bytes / MB:,.0f} MB"
    assert any(line.startswith(memory) for line in reports)


def test_adapters_of_all_layers_compute_nothing_once_and_hold_the_rest_once(base: Path, tmp_path: Path) -> None:
    engine, reports = loaded(write_adapters(tmp_path, base))
    assert not any("equal in both models" in line for line in reports)
    adapted = 4 * (32 * 32 + 32 * 48) * 4
    assert engine.weights_bytes == engine.models[0].weights_bytes + adapted
    assert f"weights: {(engine.models[0].weights_bytes - adapted) / MB:,.0f} MB of reference are equal to" in (
        "\n".join(reports)
    )


def test_an_adapter_and_its_base_share_the_layers_below_the_first_that_is_adapted(base: Path, tmp_path: Path) -> None:
    sft = write_adapter(tmp_path / "sft", base, "sft", 2, target_modules=r".*\.3\..*_proj")
    assert "layers 0 to 2 of 4 equal in both models: computed once" in loaded((sft, base))[1]


def test_full_fine_tuning_with_frozen_lower_layers_shares_them(tmp_path: Path) -> None:
    start = llama()
    models = [changed(start, [*upper(3), "lm_head", "model.norm"], seed=seed) for seed in (1, 2)]
    pair = (
        write_model(tmp_path / "sft", models[0], "sft", 20),
        write_model(tmp_path / "reference", models[1], "reference", 10),
    )
    engine, reports = loaded(pair)
    assert f"layers 0 to 2 of {LAYERS} equal in both models: computed once" in reports
    one, other = ({n: w.data_ptr() for n, w in model.weights.items()} for model in engine.models)
    assert {name for name in one if one[name] == other[name]} == {
        name for name in one if any(part in name for part in (".0.", ".1.", ".2.", "embed_tokens"))
    }


def test_pairs_served_together_hold_their_base_once_and_outlive_each_other(
    base: Path, tmp_path: Path, without_sharing: Callable[[], None]
) -> None:
    first = write_adapters(tmp_path / "first", base, layers_to_transform=[2, 3])
    third = write_adapter(tmp_path / "third", base, "reference", 1, layers_to_transform=[1])
    models = LoadedModels()
    engines = {
        name: loaded(pair, models)[0]
        for name, pair in {"a": first, "b": (first[0], base), "c": (first[0], third)}.items()
    }
    assert [engine.shared_layers for engine in engines.values()] == [2, 2, 1]
    assert len(models.in_use) == 4
    assert {model.weights["model.embed_tokens.weight"].data_ptr() for model in models.in_use} == {
        models.in_use[0].weights["model.embed_tokens.weight"].data_ptr()
    }
    expected = {name: engine.score(TRUNKS, ALL) for name, engine in engines.items()}
    del engines["a"], engines["b"]
    gc.collect()
    assert len(models.in_use) == 2
    again = loaded(first, models)[0]
    assert_same_bits(engines["c"].score(TRUNKS, ALL), expected["c"])
    assert_same_bits(again.score(TRUNKS, ALL), expected["a"])
    without_sharing()
    assert_same_bits(loaded((first[0], third))[0].score(TRUNKS, ALL), expected["c"])


def test_two_dtypes_share_nothing(base: Path, tmp_path: Path) -> None:
    models = LoadedModels()
    pair = write_adapters(tmp_path, base, layers_to_transform=[3])
    float32, _ = loaded(pair, models)
    float64, reports = loaded(pair, models, dtype="float64")
    pointers = [{w.data_ptr() for m in engine.models for w in m.weights.values()} for engine in (float32, float64)]
    assert pointers[0].isdisjoint(pointers[1])
    assert "layers 0 to 2 of 4 equal in both models: computed once" in reports
