"""QLoRA and Liger: the configuration, and what is refused without a GPU. No run: that needs a GPU."""

from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from dense_reward_trainer.configs.base import load_config
from dense_reward_trainer.configs.sft import SftConfig
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.jobs import sft
from dense_reward_trainer.recipe_files import config_path
from dense_reward_trainer.sft.quantised import four_bits

pytestmark = pytest.mark.slow


def config_of(recipe: str, *overrides: str) -> SftConfig:
    return load_config(SftConfig, config_path(recipe), ["device=cpu", *overrides])


@pytest.mark.parametrize(
    ("overrides", "library"),
    [(["lora.quantise=4bit"], "bitsandbytes"), (["liger=true"], "liger-kernel")],
    ids=["qlora", "liger"],
)
def test_an_option_without_its_library_or_without_a_gpu_is_refused(
    overrides: list[str], library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of("sft_lora_tiny", *overrides)
    monkeypatch.setattr(sft, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"pip install {library}"):
        sft.check_options(config)
    monkeypatch.setattr(sft, "find_spec", lambda name: ModuleSpec(name, None))
    with pytest.raises(ConfigError, match="needs a GPU"):
        sft.check_options(config)


def test_nothing_is_needed_if_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft, "find_spec", lambda name: None)
    sft.check_options(config_of("sft_lora_tiny"))


def test_the_base_is_held_in_doubly_quantised_nf4_and_computes_in_the_type_of_the_run() -> None:
    given = four_bits(torch.bfloat16)
    assert (given.load_in_4bit, given.bnb_4bit_quant_type, given.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert given.bnb_4bit_compute_dtype == torch.bfloat16


def test_only_four_bits_are_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora\.quantise: Input should be '4bit'"):
        config_of("sft_lora_tiny", "lora.quantise=8bit")
