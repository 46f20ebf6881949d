"""An example chat in a terminal: its tokens stay apart, in colour and without, and no escape sequence passes."""

import re

import pytest
from dense_reward.heatmap.example import ExampleTokens, render_example
from dense_reward.heatmap.visible import cells

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
EXAMPLE = ExampleTokens(("<|user|>", "Hi", " there", "\n", "<|bot|>"), ("O", "slo", "."), ("<|end|>",))


def test_without_colour_a_mark_ends_each_token() -> None:
    assert render_example(EXAMPLE, colour=False).splitlines() == [
        "prompt (context, not scored):",
        "  <|user|>|Hi|␣there|⏎|",
        "  <|bot|>|",
        "response (scored):",
        "  O|slo|.|",
        "end of turn (scored):",
        "  <|end|>|",
    ]


def test_in_colour_neighbours_differ_and_so_do_prompt_response_and_end() -> None:
    lines = render_example(EXAMPLE, colour=True).splitlines()
    assert [ESCAPES.sub("", line).strip() for line in lines] == [
        "prompt (context, not scored):",
        "<|user|>Hi there⏎",
        "<|bot|>",
        "response (scored):",
        "Oslo.",
        "end of turn (scored):",
        "<|end|>",
    ]
    prompt, response, end = (re.findall(r"((?:\x1b\[[0-9;]+m)+)[^\x1b]+\x1b\[0m", lines[at]) for at in (1, 4, 6))
    assert prompt[0] != prompt[1] == prompt[3]
    assert response[0] != response[1]
    assert not {*prompt, *response} & {*end}
    assert not {*prompt} & {*response}


def test_a_chat_without_an_end_of_turn_says_so() -> None:
    assert render_example(ExampleTokens(("a",), ("b",), ()), colour=False).splitlines()[-1] == "  none"


@pytest.mark.parametrize("colour", [True, False])
def test_lines_fit_and_the_text_cannot_control_the_terminal(colour: bool) -> None:
    hostile = ExampleTokens(("\x1b[2J", "long" * 20, "数学" * 9), ("\r", "\u202e"), ("\x07",))
    text = ESCAPES.sub("", render_example(hostile, columns=24, colour=colour))
    assert all(cells(line) <= 24 for line in text.splitlines())
    assert text.isprintable() or all(line.isprintable() for line in text.splitlines())
    with pytest.raises(ValueError, match="too few"):
        render_example(hostile, columns=19, colour=colour)
