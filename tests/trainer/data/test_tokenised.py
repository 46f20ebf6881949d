"""Training uses the ids that the service scores, with labels only on the scored tokens."""

import pytest
from dense_reward.engines.tokenizer import TransformersTokenizer
from dense_reward.text.encode import Encoder
from dense_reward.text.tokenizer import RendererName
from dense_reward_trainer.data.records import JsonValue
from dense_reward_trainer.data.sources import ChatMessage, DataError, Demonstration
from dense_reward_trainer.data.tokenised import IGNORED, TokenisedRow, encode_demonstrations, rows_sha256
from dense_reward_trainer.sft.from_scratch import train_tokenizer

TOKENIZER = TransformersTokenizer(train_tokenizer(["Add 12 and 34.", "12+34=46"], 280))
END = TOKENIZER.eos_id
FORGETS = (
    "{% for m in messages %}[{{ m.role }}]"
    "{{ m.content if m.role == 'user' or loop.last else m.content[1:] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
WRITES_TOOLS = (
    "{% for tool in tools or [] %}<{{ tool.function.name }}>{% endfor %}{% for m in messages %}[{{ m.role }}]"
    "{{ m.content }}{% for call in m.tool_calls or [] %}({{ call.function.name }} {{ call.function.arguments.lake }})"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
CALLS = (
    ChatMessage("user", "How deep?"),
    ChatMessage("assistant", "", ({"type": "function", "function": {"name": "depth", "arguments": {"lake": "Como"}}},)),
    ChatMessage("tool", "106"),
    ChatMessage("assistant", "106 metres."),
)
TOOL: dict[str, JsonValue] = {"type": "function", "function": {"name": "depth"}}


def encoder_with(template: str) -> Encoder:
    tokenizer = train_tokenizer(["Add 12 and 34.", "12+34=46"], 280)
    tokenizer.chat_template = template
    return Encoder.of(TransformersTokenizer(tokenizer), "chat")


def encoded_by(encoder: Encoder, one: Demonstration, *, every_turn: bool = False, skip_bad: bool = False) -> str:
    """The whole text that the row is trained on."""
    found = encode_demonstrations([one], encoder, every_turn=every_turn, limit_tokens=400, skip_bad=skip_bad)
    return "".join(encoder.tokenizer.pieces(found.rows[0].input_ids))


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


def test_tools_and_their_calls_are_written_by_the_template_or_refused() -> None:
    chat = Demonstration(CALLS, None, "file.jsonl:1", (TOOL,))
    text = encoded_by(encoder_with(WRITES_TOOLS), chat)
    assert text.startswith("<depth>[user]How deep?[assistant](depth Como)[tool]106[assistant]106 metres.")
    with pytest.raises(DataError, match=r"file.jsonl:1: .*does not render all of its tool_calls"):
        rows(chat, renderer="chat")
    with pytest.raises(DataError, match=r"does not render all of its tool_calls"):
        rows(Demonstration(CALLS, None, "file.jsonl:1"), renderer="chat")


def test_a_template_that_forgets_earlier_answers_is_refused_with_the_cure_of_this_job() -> None:
    encoder, chat = encoder_with(FORGETS), demonstration("one", "ONE", "two", "TWO")
    with pytest.raises(DataError) as refusal:
        encoded_by(encoder, chat, every_turn=True)
    assert "set train_on=response" in str(refusal.value)
    assert 'score "last"' not in str(refusal.value)
    assert encoded_by(encoder, chat).startswith("[user]one[assistant]NE[user]two[assistant]TWO")


def test_every_turn_is_not_learnt_if_one_of_them_has_weight_0() -> None:
    chat = Demonstration(
        (ChatMessage("user", "a"), ChatMessage("assistant", "b", weight=0), *demonstration("c", "d").messages),
        None,
        "file.jsonl:1",
    )
    with pytest.raises(DataError, match=r"an earlier turn has weight 0, .*: set train_on=response"):
        rows(chat, renderer="chat", every_turn=True)
    assert learnt(rows(chat, renderer="chat")[0]) == "d<|im_end|>"


def test_a_weight_of_the_users_turn_does_not_hinder_every_turn() -> None:
    slim_orca = (ChatMessage("user", "a", weight=0), *demonstration("", "b", "c", "d").messages[1:])
    chat = Demonstration(slim_orca, None, "file.jsonl:1")
    assert learnt(rows(chat, renderer="chat", every_turn=True)[0]) == "b<|im_end|>d<|im_end|>"


def test_leaving_out_is_not_offered_if_nothing_would_be_left() -> None:
    with pytest.raises(DataError, match="Every demonstration is refused: correct") as refusal:
        rows(demonstration("Add 1.", "1" * 50), limit=10)
    assert "--skip-bad" not in str(refusal.value)


def test_the_hash_of_rows_changes_with_any_id_any_label_and_the_order() -> None:
    one, two = demonstration("one", "ONE", "two", "TWO"), demonstration("three", "THREE")
    last, every = (rows(one, two, renderer="chat", every_turn=every) for every in (False, True))
    assert [row.input_ids for row in last] == [row.input_ids for row in every]
    hashes = [rows_sha256(some) for some in (last, every, last[::-1], last[:1])]
    assert len(set(hashes)) == 4
    assert rows_sha256(rows(one, two, renderer="chat")) == hashes[0]
