"""The states from which a killed training run resumes: one file after a step, complete or absent.

All random numbers of a run follow from its seed and the step, so a state holds no random generators.
"""

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

KEPT = 2
_NAME = re.compile(r"step-([0-9]+)\.pt")


@dataclass(frozen=True, slots=True)
class TrainingStates:
    """A folder of states; only the newest two are kept."""

    folder: Path

    def save(self, step: int, state: Mapping[str, object]) -> None:
        """Writes the state after `step` (plain values and tensors), then removes the oldest ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / ".partial"
        with partial.open("wb") as file:
            torch.save({"step": step, "state": dict(state)}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.folder / f"step-{step:08d}.pt")
        for old in self._newest_first()[KEPT:]:
            old.unlink()

    def newest(self) -> tuple[int, Any] | None:
        """The newest step and the state after it; None without states."""
        for path in self._newest_first()[:1]:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            return int(saved["step"]), saved["state"]
        return None

    def newest_step(self) -> int:
        """The step of the newest state; 0 without states. Reads no file."""
        return max((int(_NAME.fullmatch(path.name)[1]) for path in self._newest_first()), default=0)  # type: ignore[index]

    def remove(self) -> None:
        """Removes all states: a finished run needs none, and each is three times as large as the weights."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _newest_first(self) -> list[Path]:
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((path for path in paths if _NAME.fullmatch(path.name)), reverse=True)
