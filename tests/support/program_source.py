"""Parts of other programs, imported from a copy of their source without what they need on a GPU.

`make test-frameworks` fetches the copies into .frameworks and names them in the environment. Nothing of them is in this
repository.
"""

import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import pytest

URL = os.environ.get("DENSE_REWARD_URL", "")
SFT = os.environ.get("DENSE_REWARD_SFT", "")


def source(name: str) -> Path:
    """Puts the source of a program on the path of imports. Skips the file of tests where there is none."""
    folder = os.environ.get(f"FRAMEWORK_SOURCE_{name.upper()}", "")
    if not (URL and SFT and folder):
        pytest.skip(f"needs the source of {name} and a service: make test-frameworks", allow_module_level=True)
    sys.path.insert(0, folder)
    return Path(folder)


def without_init(folder: Path, *packages: str) -> None:
    """Lets modules of these packages be imported without running the packages' own __init__."""
    for name in packages:
        package = ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package


class StandIn(ModuleType):
    """A module of which every name exists; used where a test runs none of it."""

    __path__: list[str]

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        found = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, found)
        return found


class StandIns(MetaPathFinder, Loader):
    """Imports these programs, which need a GPU, and all their modules as stand-ins."""

    def __init__(self, *programs: str) -> None:
        self._programs = programs

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        del path, target
        program = fullname.partition(".")[0]
        return ModuleSpec(fullname, self, is_package=True) if program in self._programs else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def stand_ins(*programs: str) -> None:
    """Puts stand-ins in the place of these programs, also if they are installed."""
    sys.meta_path.insert(0, StandIns(*programs))
