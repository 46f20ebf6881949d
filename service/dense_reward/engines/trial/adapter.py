"""An adapter's configuration, before peft acts on it: only what is plain, and as large as its file."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from dense_reward.engines.trial.run import TrialError, check_by_trial
from dense_reward.engines.weight_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    model_files,
    read_json,
    stored_in,
    tensors_of,
)
from dense_reward.errors import CheckpointError

REFUSED = ("layer_replication", "megatron_config", "arrow_config", "corda_config", "eva_config", "lora_ga_config")
"""Options with which peft repeats layers, imports modules or reads other files."""
SIZES = ("r", "rank", "rank_pattern")
_LITERAL = re.compile(r"[\w.-]*")


def check_adapter_config(files: Path, base: Path) -> None:
    """Raises CheckpointError, with the cure, if peft could compute for ever, fill the memory or read other files."""
    path = files / ADAPTER_CONFIG
    config = read_json(path)
    for name in REFUSED:
        if config.get(name):
            raise CheckpointError(
                f"{path} sets {name}, which is not loaded here: merge the adapter into its base where it was trained "
                "(merge_and_unload), and adopt the merged model"
            )
    stored = files / ADAPTER_WEIGHTS
    largest = stored_in([stored]).largest if stored.is_file() else 0
    for name in SIZES:
        if stored.is_file() and any(size > largest for size in _sizes(config.get(name))):
            raise CheckpointError(
                f"{path} states {name} {config[name]}, larger than anything in {ADAPTER_WEIGHTS}: copy both from one "
                "adapter"
            )
    patterns = (*_patterns(config),)
    if patterns:
        modules = {name.rpartition(".")[0] for shard in model_files(base) for name in tensors_of(shard)}
        names = tuple(sorted(modules))
        try:
            check_by_trial(patterns=patterns, names=names)
        except TrialError as error:
            raise CheckpointError(
                f"{path} chooses modules by a pattern that cannot be matched ({error}): list their names instead"
            ) from None


def _sizes(value: object) -> Iterator[int]:
    values = value.values() if isinstance(value, Mapping) else [value]
    yield from (each for each in values if isinstance(each, int))


def _patterns(config: Mapping[str, object]) -> Iterator[str]:
    """The regular expressions that peft makes of a configuration, without plain names."""
    for name in ("target_modules", "exclude_modules"):
        if isinstance(value := config.get(name), str) and not _LITERAL.fullmatch(value):
            yield value
    layers = config.get("layers_pattern")
    for each in layers if isinstance(layers, list) else [layers]:
        if isinstance(each, str) and not _LITERAL.fullmatch(each):
            yield rf".*\.{each}\.(\d+)\..*"
    for name in ("rank_pattern", "alpha_pattern"):
        value = config.get(name)
        for each in value if isinstance(value, Mapping) else ():
            if not _LITERAL.fullmatch(str(each)):
                yield rf"(.*\.)?({each})$"
