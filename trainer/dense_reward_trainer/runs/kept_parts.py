"""Parts of a result, each in a file that is written whole: a stopped job measures only what is missing.

A file also names what the part depends on. If that has changed, the part is measured again, with the reason.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward.records import Report
from pydantic import TypeAdapter

from dense_reward_trainer.configs.base import JobConfig

Part = TypeVar("Part")


@dataclass(frozen=True, slots=True)
class KeptParts:
    """The parts of a job in a folder; nothing is kept if it is None. `inputs`: what all parts depend on, by name."""

    folder: Path | None
    report: Report
    inputs: Mapping[str, str] = field(default_factory=dict)

    def get(
        self, name: str, kind: type[Part], measure: Callable[[], Part], inputs: Mapping[str, str] | None = None
    ) -> Part:
        """The part that an earlier start has kept, of the same inputs; else measures it, and keeps it.

        `kind`: its type, a dataclass, list or dict of plain values. `inputs`: what this part depends on beside the
        inputs of all.
        """
        if self.folder is None:
            return measure()
        path, wanted, adapter = self.folder / f"{name}.json", {**self.inputs, **(inputs or {})}, TypeAdapter(kind)
        found = _read(path)
        if found is not None:
            reason = _reason(path, found, wanted)
            if reason is None:
                try:
                    return adapter.validate_python(found["part"])
                except ValueError:
                    reason = f"{path} cannot be read"
            self.report(f"{name} is measured again: {reason}")
        part = measure()
        content = json.dumps({"inputs": wanted, "part": adapter.dump_python(part, mode="json")})
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.encode() + b"\n")
        return part


def inputs_of_config(config: JobConfig) -> dict[str, str]:
    """The keys of a configuration that decide the result, and their values as JSON."""
    values = config.model_dump(mode="json", exclude=set(config.resume_may_change))
    return {name: json.dumps(value) for name, value in values.items()}


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read(path: Path) -> dict[str, object] | None:
    """What a file holds; None if there is none. One that cannot be read holds nothing."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _reason(path: Path, found: Mapping[str, object], wanted: Mapping[str, str]) -> str | None:
    """Why a part must be measured again; None if it is of the same inputs."""
    inputs = found.get("inputs")
    if not isinstance(inputs, dict) or "part" not in found:
        return f"{path} cannot be read"
    changed = [name for name in {**inputs, **wanted} if inputs.get(name) != wanted.get(name)]
    return f"{' and '.join(changed)} changed" if changed else None
