"""The real vLLM in this process: adapters of one base share an engine; what vLLM would compute wrong is refused."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_reward.checkpoints.adopt import adopt
from dense_reward.manifest import Role
from dense_reward.serving.loaders import loader
from dense_reward.settings import EngineName
from running_service import Served, served, wait_until, wait_until_ready
from safetensors.numpy import save_file
from served_pair import SIZES, write_pair
from transformers import AutoModelForCausalLM

START_S = 600.0
IDS = {"prompt_ids": [5, 6, 7], "response_ids": [[8, 9, 10], [9, 9]], "include": ["reward", "sft_logprob"]}
MODULES = ("q_proj", "v_proj")

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_pair(folder, sizes=SIZES.model_copy(update={"hidden_size": 64}))
    return folder / "sft"


def write_adapter(folder: Path, base: Path, role: Role, seed: int, *, head: bool = False) -> Path:
    """A LoRA adapter of a base, with random weights and a manifest."""
    random = np.random.default_rng(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    names = [f"model.layers.{layer}.self_attn.{module}" for layer in range(2) for module in MODULES]
    tensors = {}
    for name in [*names, *(["lm_head"] if head else [])]:
        rows, columns = model.get_submodule(name).weight.shape
        for side, shape in (("A", (8, columns)), ("B", (rows, 8))):
            values = random.normal(scale=0.3, size=shape).astype(np.float32)
            tensors[f"base_model.model.{name}.lora_{side}.weight"] = values
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    modules = [*MODULES, *(["lm_head"] if head else [])]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 8, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    for file in base.glob("*token*"):
        shutil.copy(file, folder)
    adopt(str(folder), role=role, run_id="adapters", renderer="plain")
    return folder


@contextmanager
def serving(sft: Path, reference: Path, engine: EngineName) -> Iterator[Served]:
    options = json.dumps({"enforce_eager": True})
    with served(
        loader(engine), ready=False, engine=engine, sft=sft, reference=reference, vllm_options=options
    ) as running:
        yield running


def test_two_adapters_of_one_base_are_served_by_one_engine(base: Path, tmp_path: Path) -> None:
    sft = write_adapter(tmp_path / "sft", base, "sft", seed=2)
    reference = write_adapter(tmp_path / "reference", base, "reference", seed=1)
    engines: list[EngineName] = ["vllm", "torch"]
    answers = []
    for engine in engines:
        with serving(sft, reference, engine) as running:
            wait_until_ready(running, START_S)
            answers.append(running.score(IDS).json()["results"])
    for found, expected in zip(*answers, strict=True):
        np.testing.assert_allclose(found["reward"], expected["reward"], atol=1e-4)
        np.testing.assert_allclose(found["sft_logprob"], expected["sft_logprob"], atol=1e-4)


def test_an_adapter_of_the_output_layer_is_refused(base: Path, tmp_path: Path) -> None:
    sft = write_adapter(tmp_path / "sft", base, "sft", seed=2, head=True)
    reference = write_adapter(tmp_path / "reference", base, "reference", seed=1)
    with serving(sft, reference, "vllm") as running:
        wait_until(lambda: bool(running.failures), START_S)
        assert "lm_head, which vLLM ignores" in running.service.progress
