"""The verdicts on chat templates, by templates of our own; and the page is what its command writes."""

from pathlib import Path

import pytest
from kinds_of_templates import KINDS
from tool_templates import TOOL_TEMPLATES

from bench.tables import block_of
from bench.templates import page, sources
from bench.templates.chats import CHATS, is_own, own_texts
from bench.templates.verdict import Verdict, verdict_on
from bench.templates.vocabulary import family_of, tokenizer_for


def verdicts(found: Verdict) -> set[str]:
    return {is_ for outcome in found.outcomes for is_ in outcome.chats.values()}


@pytest.mark.parametrize("kind", ["plain ChatML", "the date", "parts alone"])
def test_a_template_whose_renderings_agree_is_served(kind: str) -> None:
    found = verdict_on(KINDS[kind])
    assert (found.verdict, found.end_of_turn, found.date) == ("served", "<|im_end|>", kind == "the date")
    (outcome,) = found.outcomes
    assert [outcome.chats[name] for name in ("one turn", "several turns")] == ["equal"] * 2
    assert not found.different


@pytest.mark.parametrize("kind", ["an empty thought", "an opened thought", "a channel"])
def test_a_template_whose_renderings_differ_needs_a_decision_and_each_one_gives_right_ids(kind: str) -> None:
    found = verdict_on(KINDS[kind])
    assert found.verdict == "decision"
    assert found.outcomes[-1].flags == "--response-prefix ''"
    assert all(outcome.chats["one turn"] == "equal" for outcome in found.outcomes)
    assert not found.different


def test_a_template_without_an_end_of_turn_needs_its_name() -> None:
    found = verdict_on(KINDS["no end of turn"])
    assert (found.verdict, found.end_is_named) == ("decision", True)
    assert not found.different


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_no_kind_of_tool_calls_is_served_with_other_ids(name: str) -> None:
    found = verdict_on(TOOL_TEMPLATES[name].source)
    assert "equal" in verdicts(found)
    assert not found.different


@pytest.mark.parametrize("template", ["{% for m in messages %}", "{{ bos_token }}Hello", "{{ undefined.name }}"])
def test_a_template_that_cannot_render_a_chat_is_refused_in_words(template: str) -> None:
    found = verdict_on(template)
    assert found.verdict == "refused"
    assert "chat template" in found.reason
    assert not found.outcomes


def test_other_ids_are_noticed() -> None:
    template = KINDS["plain ChatML"]
    tokenizer = tokenizer_for(template, family_of(template))
    (text, *_) = own_texts(tokenizer, CHATS["one turn"], {})
    ids = tokenizer(text.rstrip("\n"), add_special_tokens=False)["input_ids"]
    assert is_own(tokenizer, text, ids)
    assert not is_own(tokenizer, text, [*ids[:-3], *ids[-2:]]), "one is missing"
    assert not is_own(tokenizer, text, [*ids[:-1], ids[0]]), "another end of turn"


def test_templates_are_read_from_a_folder(tmp_path: Path) -> None:
    for repository in sources.REPOSITORIES:
        (tmp_path / repository.short).mkdir()
        for name in repository.names:
            (tmp_path / repository.short / f"{name}.jinja").write_text("{% if a %}\n    b\n{% endif %}\n")
    found = list(sources.templates(tmp_path))
    assert len({(one.repository, one.name) for one in found}) == len(found) >= 30
    assert {one.source for one in found if one.repository == "chat_templates"} == {"{% if a %}b{% endif %}"}
    (tmp_path / "trl" / "qwen3.jinja").unlink()
    with pytest.raises(SystemExit, match=r"trl/qwen3\.jinja cannot be read"):
        list(sources.templates(tmp_path))


@pytest.mark.parametrize("name", ["templates", "rendering"])
def test_a_block_of_the_page_is_what_its_command_writes(name: str) -> None:
    assert block_of(page.PAGE, name) == page.blocks()[name].strip(), "run `python -m bench.templates page`"
