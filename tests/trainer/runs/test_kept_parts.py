"""Parts of a result that are kept: read again if they are of the same inputs, else measured again with the reason."""

import math
from dataclasses import dataclass
from pathlib import Path

from dense_reward_trainer.runs.kept_parts import KeptParts


@dataclass(frozen=True, slots=True)
class Figures:
    values: tuple[float, ...]


FIRST = Figures((0.1, 1 / 3, math.inf))


def fail() -> Figures:
    raise AssertionError("it is kept already")


def test_a_part_is_measured_once_and_read_with_every_digit(tmp_path: Path) -> None:
    said: list[str] = []
    parts = KeptParts(tmp_path / "parts", said.append, {"seed": "0"})
    assert parts.get("one", Figures, lambda: FIRST) == FIRST
    assert parts.get("one", Figures, fail) == FIRST
    assert not said


def test_other_inputs_or_a_damaged_file_are_measured_again_with_the_reason(tmp_path: Path) -> None:
    said: list[str] = []
    KeptParts(tmp_path, said.append, {"seed": "0"}).get("one", Figures, lambda: FIRST)
    later = KeptParts(tmp_path, said.append, {"seed": "1"})
    second = Figures((2.0,))
    assert later.get("one", Figures, lambda: second) == second
    assert said == ["one is measured again: seed changed"]
    assert later.get("one", Figures, lambda: FIRST, {"the pair": "b"}) == FIRST
    assert said[-1] == "one is measured again: the pair changed"
    (tmp_path / "one.json").write_text("{")
    assert later.get("one", Figures, lambda: second) == second
    assert said[-1].endswith("one.json cannot be read")


def test_without_a_folder_nothing_is_kept() -> None:
    parts, second = KeptParts(None, print), Figures((2.0,))
    assert parts.get("one", Figures, lambda: FIRST) == FIRST
    assert parts.get("one", Figures, lambda: second) == second
