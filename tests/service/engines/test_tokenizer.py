import json
from pathlib import Path

import pytest
from dense_reward.client.tokenizer import sha256_of
from dense_reward.engines import tokenizer as tokenizer_module
from dense_reward.engines.template_variables import variables_of
from dense_reward.engines.tokenizer import TransformersTokenizer, load_tokenizer
from dense_reward.errors import CheckpointError, RequestError
from dense_reward.text.offsets import monotone_spans
from dense_reward.text.special_tokens import JsonValue
from hypothesis import given, settings
from hypothesis import strategies as st
from offset_rules import assert_covering
from tiny_tokenizers import (
    CHATML,
    FAMILIES,
    FRAGMENTS,
    TEXTS,
    chatml,
    controls,
    llama_like,
    made,
    unigram,
)
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

families = pytest.mark.parametrize("family", FAMILIES)
ids_below = st.integers(0, 54)  # of the smallest vocabulary


def wrap(backend: Backend, **options: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def small_backend(*words: str) -> Backend:
    backend = Backend(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


@families
@given(text=TEXTS, special=st.booleans())
@settings(deadline=None)
def test_spans_cover_every_text(family: str, text: str, special: bool) -> None:
    pieces = made(family).encode(text, special=special)
    spans = monotone_spans(pieces.offsets, len(text))
    assert len(spans) == len(pieces.ids)
    if pieces.ids:
        assert_covering(spans, len(text))


@pytest.mark.parametrize("family", ["byte-level", "byte-level that adds BOS", "fake"])
@given(text=TEXTS | st.sampled_from(["<eos>", "<|im_end|>", "<|begin_of_text|>"]), special=st.booleans())
@settings(deadline=None)
def test_no_token_holds_more_than_the_longest(family: str, text: str, special: bool) -> None:
    tokenizer = made(family)
    assert len(text.encode()) <= len(tokenizer.encode(text, special=special).ids) * tokenizer.longest_token_bytes


def test_a_token_longer_than_others_have_is_counted_whole() -> None:
    assert TransformersTokenizer(wrap(small_backend("<unk>", "é" * 200))).longest_token_bytes == 400
    assert TransformersTokenizer(wrap(small_backend("<unk>", "a"))).longest_token_bytes == 128


# The bytes of U+FFFD itself, repeated, look like bytes that are no character.
@families
@given(text=TEXTS.filter(lambda text: "\ufffd\ufffd" not in text), special=st.booleans())
@settings(deadline=None)
def test_spans_from_ids_are_those_from_their_text(family: str, text: str, special: bool) -> None:
    tokenizer = made(family)
    pieces = tokenizer.encode(text, special=special)
    decoded, spans = tokenizer.text_and_spans(pieces.ids)
    if decoded == text:
        assert spans == monotone_spans(pieces.offsets, len(text))
    assert len(spans) == len(pieces.ids)
    assert_covering(spans, len(decoded))


@pytest.mark.parametrize("family", ["byte-level", "byte-level that adds BOS", "fake"])
@given(text=TEXTS, special=st.booleans())
@settings(deadline=None)
def test_ids_of_a_byte_level_tokenizer_decode_to_their_text(family: str, text: str, special: bool) -> None:
    tokenizer = made(family)
    assert tokenizer.text_and_spans(tokenizer.encode(text, special=special).ids)[0] == text


@families
@given(ids=st.lists(ids_below | st.integers(55, 257), max_size=12))
@settings(deadline=None)
def test_any_ids_have_a_text_and_spans(family: str, ids: list[int]) -> None:
    tokenizer = made(family)
    ids = [i for i in ids if i < tokenizer.vocab_size]
    text, spans = tokenizer.text_and_spans(ids)
    assert len(spans) == len(ids) == len(tokenizer.pieces(ids))
    if ids:
        assert_covering(spans, len(text))


@pytest.mark.parametrize("family", ["byte-level", "byte-level that adds BOS", "SentencePiece BPE", "fake"])
@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_a_fragment_ends_with_its_last_token(family: str, fragment: str) -> None:
    pieces = made(family).encode(f"{fragment}x", special=False)
    spans = monotone_spans(pieces.offsets, len(fragment) + 1)
    assert spans[-1] == (len(fragment), len(fragment) + 1)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("byte-level", ["<|im_end|>"]),
        ("byte-level that adds BOS", []),
        ("SentencePiece BPE", ["<eos>"]),
        ("SentencePiece Unigram", ["</s>", "</s>"]),
        ("fake", ["<eos>"]),
    ],
)
def test_strings_of_special_tokens_are_special_only_when_asked(family: str, expected: list[str]) -> None:
    tokenizer = made(family)
    text = "a <|im_end|> </s><eos> </s>"
    assert controls(tokenizer, tokenizer.encode(text, special=True).ids) == expected
    assert controls(tokenizer, tokenizer.encode(text, special=False).ids) == []


@families
@given(text=TEXTS)
@settings(deadline=None)
def test_no_text_becomes_a_special_token(family: str, text: str) -> None:
    tokenizer = made(family)
    strings = "".join(tokenizer.special_strings)
    for whole in (text, strings + text, text + strings + text):
        assert controls(tokenizer, tokenizer.encode(whole, special=False).ids) == []


@pytest.mark.parametrize("text", ["</s>", "a</s></s>b", "<s></s>", "＜s＞", "<s>" * 300])
def test_a_unigram_model_that_knows_its_special_tokens_as_pieces_takes_them_for_text(text: str) -> None:
    tokenizer = unigram()
    pieces = tokenizer.encode(text, special=False)
    assert controls(tokenizer, pieces.ids) == []
    assert_covering(monotone_spans(pieces.offsets, len(text)), len(text))


def test_offsets_behind_what_was_cut_still_count_from_the_start_of_the_text() -> None:
    text = "the</s> fox"
    pieces = unigram().encode(text, special=False)
    assert [text[start:end] for start, end in pieces.offsets][-3:] == ["f", "o", "x"]


def test_a_unigram_model_still_gives_unknown_characters_its_unknown_token() -> None:
    tokenizer = unigram()
    pieces = tokenizer.encode("数学", special=False)
    assert tokenizer.pieces(pieces.ids).count("<unk>") == 1
    assert pieces == tokenizer.encode("数学", special=True)


@pytest.mark.parametrize("family", ["byte-level", "SentencePiece BPE"])
def test_strings_of_special_tokens_are_tokenised_like_any_other_text(family: str) -> None:
    tokenizer = made(family)
    text = "a<eos><|im_end|>b"
    assert tokenizer.text_and_spans(tokenizer.encode(text, special=False).ids)[0] == text


def test_spaces_belong_to_the_tokens_that_hold_them() -> None:
    pieces = llama_like().encode("  Hello  the", special=False)
    assert llama_like().pieces(pieces.ids) == [" ", " ", "Hello", " ", " the"]
    assert pieces.offsets == ((0, 1), (1, 2), (2, 7), (7, 8), (8, 12))


@pytest.mark.parametrize(
    ("family", "bos"),
    [
        ("byte-level", None),
        ("byte-level that adds BOS", "<|begin_of_text|>"),
        ("SentencePiece BPE", "<bos>"),
        ("SentencePiece Unigram", None),  # it has a BOS, which it does not add
    ],
)
def test_bos_is_known_only_where_the_tokenizer_itself_adds_one(family: str, bos: str | None) -> None:
    tokenizer = made(family)
    assert tokenizer.bos_id == (None if bos is None else tokenizer.encode(bos, special=True).ids[0])
    assert controls(tokenizer, tokenizer.encode("Hello", special=True).ids) == []


def test_pieces_are_ids_decoded_one_by_one() -> None:
    tokenizer = chatml()
    ids = tokenizer.encode("Hello☃<|im_end|>", special=True).ids
    assert tokenizer.pieces(ids) == ["Hello", "\ufffd", "\ufffd", "\ufffd", "<|im_end|>"]


def test_a_tokenizer_that_truncates_and_pads_does_neither_here() -> None:
    backend = small_backend("?", "a")
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    assert TransformersTokenizer(wrap(backend)).encode("a a a", special=False).ids == (1, 1, 1)
    assert len(backend.encode("a a a").ids) == 8, "the caller's tokenizer must stay as it was"


def test_the_vocabulary_reaches_to_the_highest_id() -> None:
    backend = Backend(models.WordLevel({"?": 0, "a": 1, "far": 9}, unk_token="?"))
    tokenizer = TransformersTokenizer(wrap(backend))
    assert tokenizer.vocab_size == 10
    assert tokenizer.text_and_spans([1, 5, 1]) == ("a a", ((0, 1), (1, 1), (1, 3)))


def render(tokenizer: TransformersTokenizer, **template_kwargs: JsonValue) -> str:
    return tokenizer.render_chat(
        [{"role": "user", "content": "Hi"}], generation_prompt=False, template_kwargs=template_kwargs
    )


def test_variables_of_callers_reach_the_template() -> None:
    tokenizer = chatml("{{ mood }}: {{ messages[0].content }} {{ documents[0].title }}")
    assert render(tokenizer, mood="calm", documents=[{"title": "A"}]) == "calm: Hi A"


@pytest.mark.parametrize(
    "name",
    [
        *("chat_template", "tools", "conversation", "add_generation_prompt", "continue_final_message", "tokenize"),
        *("sanitize_control_tokens", "return_assistant_tokens_mask", "eos_token", "messages", "conversations", "self"),
    ],
)
def test_callers_replace_neither_the_template_nor_what_it_is_given(name: str) -> None:
    with pytest.raises(RequestError) as refused:
        render(chatml(), **{name: "{{ 1 }}"})
    assert (refused.value.code, refused.value.faults[0].param) == ("bad_template", "template_kwargs")


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ missing.name.other }}",
        "{{ '%d' | format('x') }}",
        "{{ '{0}{1}'.format('x') }}",
        "{{ 'abc'.index('x') }}",
        "{{ messages.append(1) }}",
        "{% for",
        None,
    ],
)
def test_a_template_that_fails_refuses_the_messages(template: str | None) -> None:
    with pytest.raises(RequestError, match="the chat template refuses") as refused:
        render(chatml(template))
    assert refused.value.code == "bad_template"


def test_a_template_that_ends_for_one_chat_and_not_for_another_is_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenizer_module, "RENDERING_S", 0.5)
    loop = "{% for i in range(90000) %}"
    endless = "{% if messages | length > 1 %}" + loop * 4 + "{% endfor %}" * 4 + "{% endif %}{{ messages[0].content }}"
    tokenizer = TransformersTokenizer(chatml(endless).transformers_tokenizer)
    user = {"role": "user", "content": "a"}
    assert tokenizer.render_chat([user], generation_prompt=True) == "a"
    with pytest.raises(RequestError, match="not finished after"):
        tokenizer.render_chat([user, user], generation_prompt=True)
    assert tokenizer.render_chat([user], generation_prompt=True) == "a"


def test_a_saved_tokenizer_is_the_same_when_loaded(tmp_path: Path) -> None:
    saved = wrap(small_backend("?", "a", "<s>"), eos_token="<s>")
    saved.chat_template = CHATML
    saved.save_pretrained(tmp_path)
    loaded, made_here = load_tokenizer(tmp_path), TransformersTokenizer(saved)
    assert loaded.sha256() == made_here.sha256()
    assert loaded.template_sha256("chat") == made_here.template_sha256("chat")
    assert loaded.has_chat_template


def test_a_client_computes_the_same_hash_from_the_tokenizer_that_it_holds() -> None:
    backend = small_backend("?", "Hello", "world", "!")
    assert TransformersTokenizer(wrap(backend)).sha256() == sha256_of(wrap(backend)) == sha256_of(backend)


def test_hashes_tell_what_would_change_the_ids() -> None:
    one, other = (TransformersTokenizer(wrap(small_backend(*words))) for words in (("?", "a"), ("?", "b")))
    split_otherwise = small_backend("?", "a")
    split_otherwise.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("+")
    assert len({one.sha256(), other.sha256(), TransformersTokenizer(wrap(split_otherwise)).sha256()}) == 3
    assert chatml().sha256() == chatml("{{ 1 }}").sha256(), "the template is no part of the tokenizer"


def test_hashes_of_renderers_tell_their_names_and_templates() -> None:
    hashes = [chatml().template_sha256(name) for name in ("chat", "plain", "instruction")]
    assert len({*hashes, chatml("{{ 1 }}").template_sha256("chat")}) == 4
    assert chatml("{{ 1 }}").template_sha256("plain") == hashes[1], "plain rendering ignores the chat template"


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% if not thinking %}{% set thinking = false %}{% endif %}{{ thinking }}", {"thinking"}),
        ("{% set thinking = thinking or false %}{{ thinking }}", {"thinking"}),
        ("{% if effort is defined %}{{ effort }}{% endif %}", {"effort"}),
        ("{% if messages %}{% set turns = messages %}{% else %}{% set turns = [] %}{% endif %}{{ turns }}", set()),
    ],
)
def test_variables_are_what_a_caller_can_set_not_what_the_template_sets_itself(
    template: str, expected: set[str]
) -> None:
    assert variables_of(template) - {"messages"} == expected
