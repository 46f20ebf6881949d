import pytest
from dense_reward.text.special_tokens import Guard, JsonValue
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
    hidden = strings_in(Guard(SPECIALS, document).hide(document))
    assert not [text for text in hidden for special in SPECIALS if special in text]


@given(DOCUMENTS)
def test_what_was_hidden_comes_back_word_for_word(document: JsonValue) -> None:
    guard = Guard(SPECIALS, document)
    hidden = strings_in(guard.hide(document))
    shown = ["".join(text for text, _ in guard.split(text)) for text in hidden]
    assert sorted(shown) == sorted(strings_in(document))


@given(TEXTS)
def test_only_the_strings_of_special_tokens_are_set_apart(text: str) -> None:
    guard = Guard(SPECIALS, text)
    stretches = guard.split(str(guard.hide(text)))
    assert all(stretch in SPECIALS for stretch, own in stretches if not own)
    assert not [stretch for stretch, own in stretches for special in SPECIALS if own and special in stretch]


def test_a_templates_own_special_strings_stay_special() -> None:
    guard = Guard(SPECIALS, "a</s>b")
    rendered = f"<s>user {guard.hide('a</s>b')}</s>"
    assert guard.split(rendered) == [("<s>user a", True), ("</s>", False), ("b</s>", True)]


def test_the_longest_of_several_special_strings_is_taken() -> None:
    guard = Guard(SPECIALS, "<s><s>")
    assert guard.split(str(guard.hide("<s><s>"))) == [("<s><s>", False)]


def test_a_template_that_repeats_a_text_gets_it_back_each_time() -> None:
    guard = Guard(SPECIALS, "</s>")
    hidden = guard.hide("</s>")
    assert guard.split(f"{hidden}{hidden}") == [("</s>", False), ("</s>", False)]


@pytest.mark.parametrize("text", ["DenseReward0Guard0E", "DenseRewardGuard0E", "DenseReward0123456789abcdefGuard0E"])
def test_text_that_looks_like_a_stand_in_is_text(text: str) -> None:
    guard = Guard(SPECIALS, (text, "</s>"))
    assert guard.split(f"{guard.hide('</s>')}{guard.hide(text)}") == [("</s>", False), (text, True)]


def test_the_stand_in_of_one_request_means_nothing_in_another() -> None:
    stolen = str(Guard(SPECIALS, "</s>").hide("</s>"))
    other = Guard(SPECIALS, ("a<s>", stolen))
    assert other.split(f"{other.hide('a<s>')}{other.hide(stolen)}") == [("a", True), ("<s>", False), (stolen, True)]


def test_without_special_tokens_nothing_is_hidden() -> None:
    guard = Guard((), {"a": ["</s>", 1, None, True]})
    assert guard.hide({"a": ["</s>", 1, None, True]}) == {"a": ["</s>", 1, None, True]}
    assert guard.split("a</s>") == [("a</s>", True)]
