"""Training uses the ids that the service scores, with labels only on the scored tokens."""

import pytest
from dense_reward.engines.tokenizer import TransformersTokenizer
from dense_reward.text.encode import Encoder
from dense_reward.text.tokenizer import RendererName
from dense_reward_trainer.data.sources import ChatMessage, DataError, Demonstration
from dense_reward_trainer.data.tokenised import IGNORED, TokenisedRow, encode_demonstrations
from dense_reward_trainer.sft.from_scratch import train_tokenizer

TOKENIZER = TransformersTokenizer(train_tokenizer(["Add 12 and 34.", "12+34=46"], 280))
END = TOKENIZER.eos_id


def demonstration(*contents: str) -> Demonstration:
    messages = [ChatMessage("assistant" if i % 2 else "user", content) for i, content in enumerate(contents)]
    return Demonstration(tuple(messages), None, f"file.jsonl:{len(contents[0])}")


def rows(
    *demonstrations: Demonstration, renderer: RendererName = "plain", limit: int = 200, every_turn: bool = False
) -> list[TokenisedRow]:
    encoder = Encoder.of(TOKENIZER, renderer)
    encoded = encode_demonstrations(demonstrations, encoder, every_turn=every_turn, limit_tokens=limit, skip_bad=False)
    return list(encoded.rows)


def learnt(row: TokenisedRow) -> str:
    return "".join(TOKENIZER.pieces([label for label in row.labels if label != IGNORED]))


@pytest.mark.parametrize("renderer", ["plain", "instruction", "chat"])
def test_the_ids_are_those_of_a_scored_prompt_and_response(renderer: RendererName) -> None:
    (row,) = rows(demonstration("Add 12 and 34. <|im_end|>", "46 <|im_end|>."), renderer=renderer)
    encoder = Encoder.of(TOKENIZER, renderer)
    prompt_P = encoder.prompt("Add 12 and 34. <|im_end|>")
    response_T = encoder.response("46 <|im_end|>.", add_eos=True).ids_T
    assert row.input_ids == [*prompt_P, *response_T]
    assert row.labels == [IGNORED] * len(prompt_P) + list(response_T)
    assert row.labels.count(END or -1) == 1, "only the end of turn is special, not the same text in a message"
    assert row.length == len(row.input_ids)


def test_the_last_response_is_learnt_or_every_turn_with_its_end() -> None:
    chat = demonstration("one", "ONE", "two", "TWO")
    assert learnt(rows(chat, renderer="chat")[0]) == "TWO<|im_end|>"
    assert learnt(rows(chat, renderer="chat", every_turn=True)[0]) == "ONE<|im_end|>TWO<|im_end|>"
    last, every = (rows(chat, renderer="chat", every_turn=every)[0].input_ids for every in (False, True))
    assert last == every


def test_a_demonstration_that_is_too_long_is_refused_with_its_place_and_length() -> None:
    short, long = demonstration("Add.", "1"), demonstration("Add 1.", "1" * 50)
    needed = rows(long)[0].length
    assert len(rows(long, limit=needed)) == 1
    with pytest.raises(DataError, match=rf"file.jsonl:6: {needed} tokens, at most {needed - 1} .*--skip-bad"):
        rows(short, long, limit=needed - 1)


def test_left_out_demonstrations_are_counted_and_never_cut() -> None:
    demonstrations = [demonstration("Add.", "1"), demonstration("Add 1.", "1" * 50), demonstration("Add.", "2")]
    encoder = Encoder.of(TOKENIZER, "plain")
    encoded = encode_demonstrations(demonstrations, encoder, every_turn=False, limit_tokens=20, skip_bad=True)
    assert [learnt(row) for row in encoded.rows] == ["1<|im_end|>", "2<|im_end|>"]
    assert len(encoded.dropped) == 1
    assert encoded.dropped[0].startswith("file.jsonl:6: ")


def test_a_chat_that_the_renderer_cannot_take_is_refused_with_its_place() -> None:
    with pytest.raises(DataError, match=r"file.jsonl:3: the plain renderer takes one user message"):
        rows(demonstration("one", "ONE", "two", "TWO"))
