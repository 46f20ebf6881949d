"""What an adapter changes, as its configuration tells: the weights need not be there."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dense_reward.errors import CheckpointError

ENDS = frozenset({"lm_head", "embed_tokens"})


def refuse_ends(adapter: Path) -> None:
    """Raises CheckpointError where it changes the output layer: vLLM leaves that out of the log-probs of prompts."""
    file = adapter / "adapter_config.json"
    try:
        config = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file} tells which layers the adapter changes, and cannot be read: {error}") from None
    refuse_named(adapter, {name for name in ENDS if _changes(config, name)})


def refuse_named(adapter: Path, modules: set[str]) -> None:
    """As `refuse_ends`, by the last names of the modules that it changes."""
    if touched := sorted(modules & ENDS):
        raise CheckpointError(
            f"{adapter} changes {', '.join(touched)}, which vLLM leaves out of the log-probs of prompts: "
            "merge it into its base, or serve it with --engine torch"
        )


def _changes(config: Mapping[str, Any], name: str) -> bool:
    """`target_modules` is a list, or a pattern of full names; "all-linear" leaves the ends out."""
    targets, saved = config.get("target_modules") or [], config.get("modules_to_save") or []
    if isinstance(targets, str):
        by_pattern = any(re.fullmatch(targets, full) for full in (name, f"model.{name}"))
        return by_pattern or name in {module.rpartition(".")[2] for module in saved}
    return name in {module.rpartition(".")[2] for module in [*targets, *saved]}
