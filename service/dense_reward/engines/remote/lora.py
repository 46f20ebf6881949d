"""Refuses LoRA adapters that change the output layer: vLLM ignores such a change in the log-probs of prompts.

Reads the adapter's configuration only: its weights need not be on this machine.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dense_reward.errors import CheckpointError

OUTPUT_LAYERS = frozenset({"lm_head", "embed_tokens"})


def refuse_output_layer(adapter: Path) -> None:
    """Raises CheckpointError if the adapter's configuration changes the output layer or cannot be read."""
    file = adapter / "adapter_config.json"
    try:
        config = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{file}, which lists the layers that the adapter changes, cannot be read: {error}"
        ) from None
    refuse_modules(adapter, {name for name in OUTPUT_LAYERS if _changes(config, name)})


def refuse_modules(adapter: Path, modules: set[str]) -> None:
    """Raises CheckpointError if the output layer is among the modules, given by the last parts of their names."""
    if touched := sorted(modules & OUTPUT_LAYERS):
        raise CheckpointError(
            f"{adapter} changes {', '.join(touched)}, which vLLM ignores in the log-probs of prompts: "
            "merge it into its base, or serve it with --engine torch"
        )


def _changes(config: Mapping[str, Any], name: str) -> bool:
    """Reads `target_modules`, a list or a regular expression of full names. "all-linear" excludes the output layer."""
    targets, saved = config.get("target_modules") or [], config.get("modules_to_save") or []
    if isinstance(targets, str):
        by_pattern = any(re.fullmatch(targets, full) for full in (name, f"model.{name}"))
        return by_pattern or name in {module.rpartition(".")[2] for module in saved}
    return name in {module.rpartition(".")[2] for module in [*targets, *saved]}
