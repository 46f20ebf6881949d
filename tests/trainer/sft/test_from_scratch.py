"""From scratch: only demonstrations, options and seed determine the tokenizer and the model."""

import torch
from dense_reward.engines.tokenizer import TransformersTokenizer
from dense_reward.text.encode import Encoder
from dense_reward_trainer.configs.sft import ScratchOptions
from dense_reward_trainer.sft.from_scratch import SPECIAL_TOKENS, random_model, train_tokenizer
from hypothesis import given
from hypothesis import strategies as st

TEXTS = ["Add 123 and 456.", "3+6=9 write 9 carry 0", "Add 77 and 12. The sum of the two is what?"] * 5
OPTIONS = ScratchOptions(vocabulary=290, hidden_size=16, layers=1, heads=2, intermediate_size=16)
TOKENIZER = train_tokenizer(TEXTS, 290)


def test_two_trainings_give_the_same_tokenizer_and_the_same_weights() -> None:
    again = train_tokenizer(iter(TEXTS), 290)
    assert TransformersTokenizer(again).sha256() == TransformersTokenizer(TOKENIZER).sha256()
    first = random_model(OPTIONS, TOKENIZER, seed=3).state_dict()
    torch.manual_seed(99)
    second = random_model(OPTIONS, again, seed=3).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = random_model(OPTIONS, again, seed=4).state_dict()
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_making_a_model_leaves_the_random_numbers_of_others_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    random_model(OPTIONS, TOKENIZER, seed=3)
    assert torch.equal(torch.rand(3), expected)


def test_other_demonstrations_give_another_tokenizer() -> None:
    other = train_tokenizer(["wholly different words, wholly different merges"] * 5, 290)
    assert TransformersTokenizer(other).sha256() != TransformersTokenizer(TOKENIZER).sha256()


def test_digits_are_tokens_of_their_own_and_words_are_merged() -> None:
    pieces = [TOKENIZER.decode([i]) for i in TOKENIZER("Add 123 and", add_special_tokens=False)["input_ids"]]
    assert [piece for piece in pieces if piece.strip().isdigit()] == ["1", "2", "3"]
    assert len(pieces) < len("Add 123 and")


def test_the_special_tokens_are_four_and_apart() -> None:
    assert [TOKENIZER.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3]
    assert (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (0, 1, 3)
    assert TransformersTokenizer(TOKENIZER).bos_id is None
    assert len(TOKENIZER) == 290


def test_the_chat_template_ends_each_turn_with_the_end_of_sequence() -> None:
    tokenizer = TransformersTokenizer(TOKENIZER)
    turns = [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "5"}]
    whole = tokenizer.render_chat(turns, generation_prompt=False)
    assert whole == "<|im_start|>user\nAdd.<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n"
    assert tokenizer.render_chat(turns[:1], generation_prompt=True) == whole[: whole.index("5")]
    assert Encoder.of(tokenizer, "chat").end_of_turn_id == 3


@given(st.text())
def test_any_text_comes_back_from_its_ids(text: str) -> None:
    """This also holds for texts unlike the training data: every byte has an id."""
    ids = TransformersTokenizer(TOKENIZER).encode(text, special=False).ids
    assert TOKENIZER.decode(ids) == text


def test_the_model_has_a_row_for_each_id_and_no_dropout() -> None:
    model = random_model(OPTIONS, TOKENIZER, seed=0)
    assert model.config.vocab_size == len(TOKENIZER)
    assert model.config.attention_dropout == 0.0
    assert model.config.eos_token_id == TOKENIZER.eos_token_id
