"""The picture of one answer: every token is drawn once, on the line where it stands."""

from pathlib import Path

import numpy as np
from dense_reward_trainer.credit.example import MAX_CHARACTERS, Example, ShownAnswer, drawn_pieces, plot_example


def shown(text: str, tokens: list[str], lowest: int | None = None) -> ShownAnswer:
    ends = np.cumsum([len(token) for token in tokens]).tolist()
    values_T = np.full(len(tokens), 0.1, np.float32)
    if lowest is not None:
        values_T[lowest] = -4.0
    return ShownAnswer(text, list(zip([0, *ends[:-1]], ends, strict=True)), {"reward:base": values_T})


def test_each_token_stands_on_its_line_and_a_line_break_is_not_drawn() -> None:
    pieces, lengths = drawn_pieces(shown("1+1=2\n#### 2", ["1+1", "=2", "\n####", " 2"]))
    assert pieces == [(0, 0, 0, "1+1"), (1, 0, 3, "=2"), (2, 1, 0, "####"), (3, 1, 4, " 2")]
    assert lengths == [5, 6]


def test_long_lines_are_wrapped() -> None:
    pieces, lengths = drawn_pieces(shown("abc" * 30, ["abc"] * 30))
    assert len(pieces) == 30
    assert max(lengths) <= MAX_CHARACTERS
    assert sum(lengths) == 90


def test_the_picture_is_written_in_both_formats_also_with_signs_of_formulas(tmp_path: Path) -> None:
    right = shown("costs $3$", ["costs", " $3", "$"])
    wrong = shown("costs $4$", ["costs", " $4", "$"], lowest=1)
    plot_example(Example(right, wrong, 1), tmp_path / "example_digit")
    assert (tmp_path / "example_digit.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "example_digit.svg").read_text().startswith("<?xml")
