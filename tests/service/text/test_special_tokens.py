"""Special-token strings in users' text are escaped while a template renders, and restored after it."""

import pytest
from dense_reward.text.special_tokens import JsonValue, SpecialTokenEscaper
from hypothesis import given
from hypothesis import strategies as st

SPECIALS = ("<s>", "</s>", "<|im_end|>", "<|im|>", "<s><s>")
TEXTS = st.lists(st.sampled_from([*SPECIALS, "<", "|>", "DenseReward", "Guard0E"]) | st.text(max_size=3)).map("".join)
DOCUMENTS = st.recursive(
    TEXTS | st.integers() | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


def strings_in(value: JsonValue) -> list[str]:
    """Every string of a document, keys included."""
    match value:
        case str():
            return [value]
        case dict():
            return [s for key, entry in value.items() for s in (key, *strings_in(entry))]
        case list():
            return [s for entry in value for s in strings_in(entry)]
        case _:
            return []


@given(DOCUMENTS)
def test_no_special_string_is_left_in_what_a_template_sees(document: JsonValue) -> None:
    escaped = strings_in(SpecialTokenEscaper(SPECIALS, document).escape(document))
    assert not [text for text in escaped for special in SPECIALS if special in text]


@given(DOCUMENTS)
def test_what_was_escaped_comes_back_word_for_word(document: JsonValue) -> None:
    escaper = SpecialTokenEscaper(SPECIALS, document)
    escaped = strings_in(escaper.escape(document))
    shown = ["".join(text for text, _ in escaper.split(text)) for text in escaped]
    assert sorted(shown) == sorted(strings_in(document))


@given(TEXTS)
def test_only_the_strings_of_special_tokens_are_set_apart(text: str) -> None:
    escaper = SpecialTokenEscaper(SPECIALS, text)
    stretches = escaper.split(str(escaper.escape(text)))
    assert all(stretch in SPECIALS for stretch, own in stretches if not own)
    assert not [stretch for stretch, own in stretches for special in SPECIALS if own and special in stretch]


def test_a_templates_own_special_strings_stay_special() -> None:
    escaper = SpecialTokenEscaper(SPECIALS, "a</s>b")
    rendered = f"<s>user {escaper.escape('a</s>b')}</s>"
    assert escaper.split(rendered) == [("<s>user a", True), ("</s>", False), ("b</s>", True)]


def test_the_longest_of_several_special_strings_is_taken() -> None:
    escaper = SpecialTokenEscaper(SPECIALS, "<s><s>")
    assert escaper.split(str(escaper.escape("<s><s>"))) == [("<s><s>", False)]


def test_a_template_that_repeats_a_text_gets_it_back_each_time() -> None:
    escaper = SpecialTokenEscaper(SPECIALS, "</s>")
    escaped = escaper.escape("</s>")
    assert escaper.split(f"{escaped}{escaped}") == [("</s>", False), ("</s>", False)]


@pytest.mark.parametrize("text", ["DenseReward0Guard0E", "DenseRewardGuard0E", "DenseReward0123456789abcdefGuard0E"])
def test_text_that_looks_like_a_stand_in_is_text(text: str) -> None:
    escaper = SpecialTokenEscaper(SPECIALS, (text, "</s>"))
    assert escaper.split(f"{escaper.escape('</s>')}{escaper.escape(text)}") == [("</s>", False), (text, True)]


def test_the_stand_in_of_one_request_means_nothing_in_another() -> None:
    stolen = str(SpecialTokenEscaper(SPECIALS, "</s>").escape("</s>"))
    other = SpecialTokenEscaper(SPECIALS, ("a<s>", stolen))
    assert other.split(f"{other.escape('a<s>')}{other.escape(stolen)}") == [("a", True), ("<s>", False), (stolen, True)]


def test_without_special_tokens_nothing_is_escaped() -> None:
    escaper = SpecialTokenEscaper((), {"a": ["</s>", 1, None, True]})
    assert escaper.escape({"a": ["</s>", 1, None, True]}) == {"a": ["</s>", 1, None, True]}
    assert escaper.split("a</s>") == [("a</s>", True)]
