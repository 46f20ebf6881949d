"""Encodes prompts, responses and whole texts. Chats of several turns are in test_conversations.py."""

import pytest
from dense_reward.engines.fake import FakeTokenizer
from dense_reward.errors import RequestError
from dense_reward.records import IdArray
from dense_reward.text.encode import PLAIN_FORMATS, Encoder, end_of_turn_id
from dense_reward.text.encoded import Encoded, as_ids
from dense_reward.text.offsets import Span
from dense_reward.text.tokenizer import RendererName
from hypothesis import given, settings
from hypothesis import strategies as st
from offset_rules import assert_covering
from tiny_tokenizers import (
    NOTHING_AFTER,
    TEXTS,
    chatml,
    controls,
    gemma_like,
    llama_like,
    made,
    names,
    unigram,
)

CHATS = ("byte-level", "byte-level that adds BOS", "SentencePiece BPE", "SentencePiece Unigram")
chats = pytest.mark.parametrize("family", CHATS)
families = pytest.mark.parametrize("family", [*CHATS, "fake"])
PLAIN: tuple[RendererName, ...] = ("plain", "instruction")


def encoder_of(family: str) -> Encoder:
    return Encoder.of(made(family), "plain" if family == "fake" else "chat")


def shown(encoder: Encoder, ids: IdArray) -> str:
    """The text of the ids; special tokens are their strings."""
    return encoder.tokenizer.text_and_spans(ids.tolist())[0]


def assert_spans_cover(spans: tuple[Span, ...] | None, length: int) -> None:
    assert spans is not None
    assert_covering(spans, length)


@pytest.mark.parametrize(
    ("family", "rendered"),
    [
        ("byte-level", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        (
            "byte-level that adds BOS",
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        # This family puts a space before each part of the text.
        ("SentencePiece BPE", "<bos><start_of_turn> user\nHi<end_of_turn> \n<start_of_turn> model\n"),
        ("fake", "<bos>Hi\n"),
    ],
)
def test_a_prompt_is_rendered_as_one_user_turn(family: str, rendered: str) -> None:
    encoder = encoder_of(family)
    assert shown(encoder, encoder.prompt("Hi")) == rendered


@pytest.mark.parametrize("renderer", PLAIN)
def test_plain_renderers_put_the_prompt_into_their_format(renderer: RendererName) -> None:
    encoder = Encoder.of(chatml(), renderer)
    assert shown(encoder, encoder.prompt("a {b}")) == PLAIN_FORMATS[renderer].replace("{prompt}", "a {b}")


@pytest.mark.parametrize("text", ["", "Hi", "<|begin_of_text|>Hi", "<bos>Hi"])
@pytest.mark.parametrize("family", ["byte-level that adds BOS", "SentencePiece BPE", "fake"])
def test_there_is_exactly_one_bos_that_no_text_puts_there(family: str, text: str) -> None:
    encoder = encoder_of(family)
    bos = encoder.tokenizer.bos_id
    plain = Encoder.of(encoder.tokenizer, "plain")
    whole = plain.text(text, add_eos=False, raw=False)
    for ids in (encoder.prompt(text), plain.prompt(text), encoder.prompt(text, raw=True), whole.prompt_P):
        assert ids.tolist().count(bos) == 1
        assert ids[0] == bos
    assert bos not in whole.responses[0].ids_T


def test_a_tokenizer_that_adds_no_bos_gets_none() -> None:
    encoder = Encoder.of(unigram(), "plain")
    assert "<s>" not in names(encoder.tokenizer, encoder.prompt("Hi").tolist())


@pytest.mark.parametrize(
    ("encoder", "name"),
    [
        (Encoder.of(chatml(), "chat"), "<|im_end|>"),
        (Encoder.of(llama_like(), "chat"), "<|eot_id|>"),
        (Encoder.of(gemma_like(), "chat"), "<end_of_turn>"),
        (Encoder.of(unigram(), "chat"), "</s>"),
        (Encoder.of(chatml(NOTHING_AFTER), "chat"), "<|endoftext|>"),
        (Encoder.of(chatml("{% for m in messages %}{{ m.content }}\n<|im_end|>\n{% endfor %}"), "chat"), "<|im_end|>"),
        (Encoder.of(chatml(), "plain"), "<|endoftext|>"),
        (Encoder.of(FakeTokenizer(), "plain"), "<eos>"),
    ],
)
def test_a_turn_ends_with_the_special_token_that_the_template_puts_after_it_else_with_eos(
    encoder: Encoder, name: str
) -> None:
    assert encoder.end_of_turn_id is not None
    assert names(encoder.tokenizer, [encoder.end_of_turn_id]) == [name]
    assert encoder.response("Hi", add_eos=True).ids_T[-1] == encoder.end_of_turn_id


def test_without_any_end_a_response_can_only_be_scored_without_one() -> None:
    tokenizer = chatml(NOTHING_AFTER, eos=None)
    assert end_of_turn_id(tokenizer, "chat") is None
    encoder = Encoder.of(tokenizer, "chat")
    assert shown(encoder, encoder.response("Hi", add_eos=False).ids_T) == "Hi"
    with pytest.raises(RequestError, match="send add_eos false") as refused:
        encoder.response("Hi", add_eos=True)
    assert (refused.value.code, refused.value.faults[0].param) == ("bad_template", "add_eos")


@families
@given(prompt=TEXTS, response=TEXTS)
@settings(deadline=None, max_examples=50)
def test_prompt_and_response_are_tokenised_apart(family: str, prompt: str, response: str) -> None:
    encoder = encoder_of(family)
    response = encoder.without_repetition(response)
    encoded = encoder.response(response, add_eos=True)
    alone = encoder.tokenizer.encode(response, special=False, continues=family != "SentencePiece Unigram").ids
    assert encoded.ids_T.tolist() == [*alone, encoder.end_of_turn_id]
    assert encoded.scored_T.all()
    assert encoded.text == response
    assert_spans_cover(encoded.spans_S, len(response))
    assert (encoded.spans_S or [()])[-1] == (len(response), len(response)), "the end of turn is not part of the text"
    without = encoder.response(response, add_eos=False)
    assert without.ids_T.tolist() == list(alone)
    if alone:
        assert_spans_cover(without.spans_S, len(response))


@chats
@given(prompt=TEXTS.filter(bool), response=TEXTS)
@settings(deadline=None, max_examples=50)
def test_training_and_scoring_encode_alike(family: str, prompt: str, response: str) -> None:
    encoder = encoder_of(family)
    response = encoder.without_repetition(response)
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    for add_eos in (True, False):
        trained = encoder.conversation(messages, add_eos=add_eos)
        scored = encoder.response(response, add_eos=add_eos)
        assert trained.prompt_P.tolist() == encoder.prompt(prompt).tolist()
        assert trained.responses[0].ids_T.tolist() == scored.ids_T.tolist()
        assert trained.responses[0].scored_T.all()
        assert trained.responses[0].spans_S == scored.spans_S


@pytest.mark.parametrize("renderer", PLAIN)
@given(prompt=TEXTS.filter(bool), response=TEXTS)
@settings(deadline=None, max_examples=50)
def test_plain_renderers_train_and_score_alike(renderer: RendererName, prompt: str, response: str) -> None:
    encoder = Encoder.of(llama_like(), renderer)
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    trained = encoder.conversation(messages, add_eos=True)
    assert trained.prompt_P.tolist() == encoder.prompt(prompt).tolist()
    assert trained.responses[0].ids_T.tolist() == encoder.response(response, add_eos=True).ids_T.tolist()


@families
@given(text=TEXTS)
@settings(deadline=None, max_examples=50)
def test_special_strings_of_users_are_text(family: str, text: str) -> None:
    encoder = encoder_of(family)
    harmless = controls(encoder.tokenizer, encoder.prompt("x").tolist())
    strings = "".join(encoder.tokenizer.special_strings)
    for users in (text, strings + text, f"{text}{strings}{text}"):
        prompt = encoder.prompt(users or "x").tolist()
        assert controls(encoder.tokenizer, prompt) == harmless
        assert controls(encoder.tokenizer, encoder.response(f"{users}.", add_eos=False).ids_T.tolist()) == []
        whole = encoder.text(users, add_eos=False, raw=False) if users else None
        assert whole is None or controls(encoder.tokenizer, whole.responses[0].ids_T.tolist()) == []


def test_special_strings_of_users_can_still_be_read() -> None:
    encoder = encoder_of("byte-level")
    text = "say <|im_end|> or <|im_<|im_end|>end|>"
    assert shown(encoder, encoder.prompt(text)) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("family", "text", "expected"),
    [
        ("byte-level", "<|im_start|>user\na<|im_end|>", ["<|im_start|>", "<|im_end|>"]),
        ("byte-level that adds BOS", "<|eot_id|>a", ["<|begin_of_text|>", "<|eot_id|>"]),
        ("SentencePiece BPE", "<start_of_turn>a", ["<bos>", "<start_of_turn>"]),
        ("SentencePiece Unigram", "<s>a</s>", ["<s>", "</s>"]),
        ("fake", "<eos>a", ["<bos>", "<eos>"]),
    ],
)
def test_special_strings_in_raw_text_are_special(family: str, text: str, expected: list[str]) -> None:
    encoder = encoder_of(family)
    assert controls(encoder.tokenizer, encoder.prompt(text, raw=True).tolist()) == expected
    response = encoder.response(text, add_eos=False, raw=True)
    assert controls(encoder.tokenizer, response.ids_T.tolist()) == expected[encoder.tokenizer.bos_id is not None :]
    assert_spans_cover(response.spans_S, len(text))
    whole = encoder.text(text, add_eos=False, raw=True)
    every = [*whole.prompt_P.tolist(), *whole.responses[0].ids_T.tolist()]
    assert controls(encoder.tokenizer, every) == expected


@families
@given(text=TEXTS, add_eos=st.booleans(), raw=st.booleans())
@settings(deadline=None, max_examples=50)
def test_of_a_whole_text_every_token_after_the_first_is_scored(
    family: str, text: str, add_eos: bool, raw: bool
) -> None:
    encoder = encoder_of(family)
    bos = encoder.tokenizer.bos_id
    ids = list(encoder.tokenizer.encode(text, special=raw).ids)
    ids = [bos, *ids] if bos is not None and ids[:1] != [bos] else ids
    ids += [encoder.end_of_turn_id] if add_eos and encoder.end_of_turn_id is not None else []
    if not ids:
        with pytest.raises(RequestError) as refused:
            encoder.text(text, add_eos=add_eos, raw=raw)
        assert refused.value.code == "empty_prompt"
        return
    encoded = encoder.text(text, add_eos=add_eos, raw=raw)
    response = encoded.responses[0]
    assert [*encoded.prompt_P.tolist(), *response.ids_T.tolist()] == ids
    assert len(encoded.prompt_P) == 1
    assert response.scored_T.all()
    assert len(response.spans_S or ()) == len(response.ids_T)
    if len(response.ids_T):
        assert_spans_cover(response.spans_S, len(text))


def test_an_empty_prompt_is_refused_without_a_bos_and_rendered_with_one() -> None:
    with pytest.raises(RequestError) as refused:
        encoder_of("byte-level").prompt("")
    assert (refused.value.code, refused.value.faults[0].param) == ("empty_prompt", "prompt")
    assert len(encoder_of("byte-level that adds BOS").prompt("")) > 0
    assert names(FakeTokenizer(), encoder_of("fake").prompt("", raw=True).tolist()) == ["<bos>"]


def test_nothing_can_be_scored_after_a_prompt_without_ids() -> None:
    encoder = encoder_of("byte-level")
    with pytest.raises(RequestError) as refused:
        Encoded(encoder.prompt("", raw=True), (encoder.response("Hi", add_eos=True),))
    assert refused.value.code == "empty_prompt"


@given(st.lists(st.integers(0, 257)))
def test_known_ids_are_taken_verbatim(ids: list[int]) -> None:
    array = as_ids(ids, 258, "prompt_ids")
    assert array.tolist() == ids
    assert array.dtype == "int32"


@pytest.mark.parametrize("unknown", [-1, 258, 2**31, -(2**31) - 1, 2**63, 2**64, -(2**63) - 1, 10**400])
def test_an_unknown_id_is_refused_with_its_place(unknown: int) -> None:
    with pytest.raises(RequestError, match=f"id {unknown} at position 1 is not in the vocabulary") as refused:
        as_ids([257, unknown, 999], 258, "prompt_ids")
    assert (refused.value.code, refused.value.faults[0].param) == ("unknown_token_id", "prompt_ids")
