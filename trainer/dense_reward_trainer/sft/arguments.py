"""Arguments of transformers' trainers and of peft, and a warning that their versions cause."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from peft import LoraConfig
from transformers import TrainingArguments

from dense_reward_trainer.configs.sft import LoraOptions


def checkpointing(wanted: bool) -> dict[str, bool]:
    """Whether activations are recomputed: newer versions renamed the argument, and warn about the older name."""
    names = ("activation_checkpointing", "gradient_checkpointing")
    return {next(name for name in names if hasattr(TrainingArguments, name)): wanted}


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warning that TRL 1.16 and peft 0.21 cause in transformers 5.24, which renamed an attribute."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def lora_config(lora: LoraOptions) -> LoraConfig:
    modules = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    return LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=modules, task_type="CAUSAL_LM"
    )
