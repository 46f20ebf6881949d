"""What a killed training run needs to go on: weights, optimiser and step in one file that is whole or absent.

Everything random in a run follows from its seed and the step, so no random state is kept. Must not know what a step
does.
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

KEPT = 2
_NAME = re.compile(r"step-([0-9]+)\.pt")


@dataclass(frozen=True, slots=True)
class TrainingStates:
    """A folder of states, of which the newest two are kept."""

    folder: Path

    def save(self, step: int, model: nn.Module, optimiser: Optimizer) -> None:
        """Writes the state after `step` and then removes the older ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / ".partial"
        with partial.open("wb") as file:
            torch.save({"step": step, "model": model.state_dict(), "optimiser": optimiser.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.folder / f"step-{step:08d}.pt")
        for old in self._newest_first()[KEPT:]:
            old.unlink()

    def restore(self, model: nn.Module, optimiser: Optimizer) -> int:
        """Loads the newest state in place and gives its step; 0, and nothing is loaded, where there is none."""
        newest = self._newest_first()[:1]
        for path in newest:
            state = torch.load(path, map_location="cpu", weights_only=True)
            model.load_state_dict(state["model"])
            optimiser.load_state_dict(state["optimiser"])
            return int(state["step"])
        return 0

    def remove(self) -> None:
        """Forgets all states: a finished run is not taken up again, and each state is three times its weights."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _newest_first(self) -> list[Path]:
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((path for path in paths if _NAME.fullmatch(path.name)), reverse=True)
