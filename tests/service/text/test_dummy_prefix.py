"""SentencePiece puts a space before a text; a response has it only where a policy would write it."""

from collections.abc import Callable

import pytest
from dense_reward.engines.tokenizer import TransformersTokenizer
from dense_reward.text.encode import PLAIN_FORMATS, Encoder
from dense_reward.text.tokenizer import RendererName
from hypothesis import given, settings
from tiny_tokenizers import MISTRAL_LIKE, TEXTS, chatml, gemma_like, llama_like, unigram
from transformers import PreTrainedTokenizerFast

RESPONSES = ("4", "Hello world!", "12 + 34 = 46", "\nHello", "  Hello", "the fox", "数学", "")


def with_template(template: str) -> TransformersTokenizer:
    """The SentencePiece tokenizer with another template."""
    made: PreTrainedTokenizerFast = gemma_like().transformers_tokenizer
    copied = PreTrainedTokenizerFast(
        tokenizer_object=made.backend_tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    copied.chat_template = template
    return TransformersTokenizer(copied)


def ids_of(encoder: Encoder, prompt: str, response: str) -> tuple[list[int], list[int]]:
    return encoder.prompt(prompt).tolist(), encoder.response(response, add_eos=False).ids_T.tolist()


def test_tokenizers_with_a_dummy_prefix_are_recognised() -> None:
    assert [made().has_dummy_prefix for made in (gemma_like, unigram, llama_like, chatml)] == [True, True, False, False]


# Two characters that no token joins, whatever the trained vocabulary; Unigram joins unknown ones, so these are known.
@pytest.mark.parametrize(("made", "first", "second"), [(gemma_like, "&", ")"), (unigram, "w", "d")])
def test_a_text_that_continues_has_no_space_before_it_but_keeps_its_own(
    made: Callable[[], TransformersTokenizer], first: str, second: str
) -> None:
    tokenizer = made()
    for text in (second, f" {second}"):
        ids = tokenizer.encode(text, special=False, continues=True).ids
        whole = tokenizer.encode(first + text, special=False).ids
        assert whole == tokenizer.encode(first, special=False).ids + ids, "as the second part of a text"


def test_after_a_special_token_a_text_has_what_it_has_in_the_whole() -> None:
    tokenizer = gemma_like()
    text = "Hello<end_of_turn>\n<start_of_turn>model\nHello"
    whole = tokenizer.encode("the" + text, special=True)
    first = tokenizer.encode("the", special=True).ids
    continued = tokenizer.encode(text, special=True, continues=True)
    assert whole.ids == first + continued.ids
    assert [(start + 3, end + 3) for start, end in continued.offsets] == list(whole.offsets[len(first) :])


@pytest.mark.parametrize("response", ["4", "12 + 34 = 46", "  Hello", "the fox", "数学", ""])
def test_after_a_line_break_a_response_has_the_ids_of_the_whole_rendering(response: str) -> None:
    encoder = Encoder.of(gemma_like(), "chat")
    assert encoder.chat.place().continues
    prompt, ids = ids_of(encoder, "Hi", response)
    rendered = encoder.chat.render_chat(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": response}], generation_prompt=False
    )
    assert list(encoder.tokenizer.encode(rendered, special=True).ids[: len(prompt) + len(ids)]) == prompt + ids


@given(response=TEXTS)
@settings(deadline=None, max_examples=50)
def test_what_a_policy_adds_to_the_text_is_the_response(response: str) -> None:
    encoder = Encoder.of(gemma_like(), "chat")
    response = encoder.without_repetition(response.replace("▁", ""))
    prompt, ids = ids_of(encoder, "Hi", response)
    if encoder.tokenizer.special_ids & set(ids):
        return  # unknown characters
    decoded = encoder.tokenizer.text_and_spans(prompt + ids)[0]
    assert decoded == encoder.tokenizer.text_and_spans(prompt)[0] + response


@pytest.mark.parametrize("response", ["4", "Hello world!", "the fox"])
def test_where_the_template_writes_a_space_before_a_response_the_response_has_it(response: str) -> None:
    encoder = Encoder.of(with_template("{{ bos_token }}" + MISTRAL_LIKE), "chat")
    assert encoder.undecided("flags") is None
    assert not encoder.chat.place().continues
    prompt, ids = ids_of(encoder, "Hi", response)
    assert encoder.tokenizer.text_and_spans(prompt + ids)[0].endswith(f"[/INST] {response}")


@pytest.mark.parametrize("renderer", ["plain", "instruction"])
@pytest.mark.parametrize("response", RESPONSES)
def test_plain_renderers_continue_their_text(renderer: RendererName, response: str) -> None:
    encoder = Encoder.of(gemma_like(), renderer)
    prompt, ids = ids_of(encoder, "Hi", response)
    before = encoder.tokenizer.text_and_spans(prompt)[0]
    assert before == "<bos> " + PLAIN_FORMATS[renderer].replace("{prompt}", "Hi")
    assert encoder.tokenizer.text_and_spans(prompt + ids)[0] == before + response


@pytest.mark.parametrize(("prompt", "written"), [("Hi ", "Hi 4"), ("", "4"), ("Hi<end_of_turn>", "Hi<end_of_turn> 4")])
def test_a_raw_response_continues_its_raw_prompt(prompt: str, written: str) -> None:
    """At the start, and after a special token, this tokenizer has the space in every text."""
    encoder = Encoder.of(gemma_like(), "plain")
    response = encoder.response("4", add_eos=False, raw=True, raw_prompt=prompt)
    ids = [*encoder.prompt(prompt, raw=True).tolist(), *response.ids_T.tolist()]
    assert ids == [encoder.tokenizer.bos_id, *encoder.tokenizer.encode(prompt + "4", special=True).ids]
    assert encoder.tokenizer.text_and_spans(ids)[0].removeprefix("<bos>").lstrip() == written
