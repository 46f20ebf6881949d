"""A decoded sequence -> the ids of its prompt and response: those that were decoded, or a refusal."""

import numpy as np
import pytest
from dense_reward.errors import RequestError
from dense_reward.text.continuation import split_ids
from tiny_tokenizers import FAMILIES, chatml, gemma_like, llama_like, made

PROMPTS = {
    "byte-level": "<|im_start|>user\nHello world!<|im_end|>\n<|im_start|>assistant\n",
    "byte-level that adds BOS": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>",
    "SentencePiece BPE": "<bos><start_of_turn>user\nHello world!<end_of_turn>\n<start_of_turn>model\n",
    "fake": "<bos>2+2=",
}
RESPONSES = ["12 + 34 = 46, carry 0", " the quick", "\n\nHello", "naïve café", "🚀🚀", ""]
ENDS = {
    "byte-level": "<|im_end|>",
    "byte-level that adds BOS": "<|eot_id|>",
    "SentencePiece BPE": "<end_of_turn>",
    "fake": "<eos>",
}


@pytest.mark.parametrize("family", PROMPTS)
@pytest.mark.parametrize("finished", [True, False])
def test_the_ids_that_were_decoded_are_found_again(family: str, finished: bool) -> None:
    tokenizer = made(family)
    for text in RESPONSES:
        prompt = tokenizer.encode(PROMPTS[family], special=True).ids
        end = tokenizer.encode(ENDS[family], special=True).ids if finished else ()
        response = (*tokenizer.encode(text, special=True, continues=True).ids, *end)
        query = tokenizer.text_and_spans((*prompt, *response))[0]
        found_P, found_T = split_ids(tokenizer, query, PROMPTS[family], 1000)
        assert tuple(found_P) == prompt
        assert tuple(found_T) == response
        assert found_T.dtype == np.int32


def test_neither_bos_nor_an_end_of_turn_is_added() -> None:
    prompt_P, response_T = split_ids(llama_like(), "Hello world", "Hello", 100)
    begin = llama_like().bos_id
    assert begin is not None
    assert begin not in prompt_P
    assert not llama_like().special_ids & set(response_T.tolist())


@pytest.mark.parametrize(
    ("query", "prompt", "reason"),
    [
        ("world!", "Hello world!", "does not start with its prompt"),
        ("Hello 🚀\ufffd", "Hello", "U\\+FFFD"),
        ("Hello" * 5000, "Hello", "more text than 100 tokens can hold"),
    ],
)
def test_a_text_without_its_ids_is_refused(query: str, prompt: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        split_ids(chatml(), query, prompt, 100)


def test_a_query_of_several_turns_is_refused() -> None:
    tokenizer, prompt = chatml(), PROMPTS["byte-level"]
    (end,) = tokenizer.encode(ENDS["byte-level"], special=True).ids
    first = prompt + "Hello<|im_end|>"
    assert split_ids(tokenizer, first, prompt, 100, {end, None})[1][-1] == end
    for more in ("\n", "\n<|im_start|>user\nHello", "<|im_end|>"):
        with pytest.raises(RequestError, match="goes on after an end of turn"):
            split_ids(tokenizer, first + more, prompt, 100, {end, None})


def test_a_text_that_the_tokenizer_changes_is_refused() -> None:
    unigram = FAMILIES["SentencePiece Unigram"]()
    with pytest.raises(RequestError, match="decode to another text"):
        split_ids(unigram, "Hello the world\ufb01", "Hello", 100)  # NFKC makes two letters of the ligature


def test_a_replacement_character_of_the_prompt_has_known_ids() -> None:
    prompt_P, response_T = split_ids(gemma_like(), "a\ufffd b", "a\ufffd", 100)
    assert len(prompt_P) > 0
    assert gemma_like().text_and_spans((*prompt_P.tolist(), *response_T.tolist()))[0] == "a\ufffd b"
