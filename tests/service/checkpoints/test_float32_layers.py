"""A checkpoint of 16-bit weights is measured in float32, bit for bit, and its weights stay as they are on disk."""

from pathlib import Path

import pytest
import torch
from dense_reward.checkpoints.float32_layers import load_float32
from dense_reward.engines.torch.model import load_model
from tiny_models import write_checkpoint

COMPUTED = ("gemma2", "gemma3")  # their embeddings' factor is computed when they are loaded, in the weights' dtype


ARCHITECTURES = ("llama", "qwen2", "gpt2", "phi3", "mixtral", "gpt-oss", "deepseek-v3", "lfm2", *COMPUTED)


@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", torch.float16), *((name, torch.bfloat16) for name in ARCHITECTURES)]
)
def test_the_numbers_are_those_of_float32(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    manifest = write_checkpoint(folder := tmp_path / "a", architecture=name, dtype=dtype)
    plain = load_model(folder, manifest, dtype="float32", device="cpu")
    small = load_float32(folder, manifest, device="cpu")
    for _ in range(2):
        assert small.logprobs([5, 6, 7], [8, 9, 10]) == plain.logprobs([5, 6, 7], [8, 9, 10])
    dtypes = {weight.dtype for weight in small.transformers_model.parameters()}
    assert dtypes == ({torch.float32} if name in COMPUTED else {dtype})


def test_a_layer_that_fails_leaves_its_weights_as_they_were(tmp_path: Path) -> None:
    manifest = write_checkpoint(tmp_path / "a", dtype=torch.bfloat16)
    model = load_float32(tmp_path / "a", manifest, device="cpu")
    with pytest.raises(IndexError):
        model.logprobs([5, 6], [10**6])
    assert {weight.dtype for weight in model.transformers_model.parameters()} == {torch.bfloat16}


def test_float32_stays_float32(tmp_path: Path) -> None:
    manifest = write_checkpoint(tmp_path / "a", dtype=torch.float32)
    model = load_float32(tmp_path / "a", manifest, device="cpu")
    assert model.dtype is torch.float32
