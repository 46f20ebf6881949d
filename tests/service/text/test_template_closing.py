"""What a template writes after a response, and responses that it writes elsewhere in some chats."""

import pytest
from dense_reward.errors import RequestError
from dense_reward.text.encode import Encoder
from dense_reward.text.special_tokens import JsonValue, Message
from dense_reward.text.template import TemplateChoices
from dense_reward.text.undecided import choices_for
from tiny_tokenizers import chatml

HEADER = "<|im_start|>assistant\n"
USER = "{% for m in messages %}{% if m.role != 'assistant' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
PROMPT = "{% endif %}{% endfor %}{% if add_generation_prompt %}" + HEADER + "{% endif %}"
BLANK = USER + "{% else %}" + HEADER + "{{ m.content }}\n<|im_end|>\n" + PROMPT
TOKEN = USER + "{% else %}" + HEADER + "<|start|>{{ m.content }}<|stop|><|im_end|>\n" + PROMPT
# After a tool's result the turn of the assistant goes on, but the generation prompt begins another one.
GOES_ON = (
    USER
    + "{% else %}{% if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}"
    + HEADER
    + "{% endif %}{{ m.content }}"
    + "{% for call in m.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}"
    + "<|im_end|>\n"
    + PROMPT
)
CALL: JsonValue = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
AFTER_A_TOOL: tuple[Message, ...] = (
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "4 degrees", "tool_call_id": "a"},
    {"role": "assistant", "content": "It is cold."},
)


def encoder_of(template: str, prefix: str | None = None, end: str = "<|im_end|>") -> Encoder:
    tokenizer = chatml(template, "<|im_end|>", ("<|start|>", "<|stop|>"))
    end_id = tokenizer.encode(end, special=True).ids[0]
    return Encoder(tokenizer, "chat", end_id, choices=TemplateChoices(response_prefix=prefix))


def ids_of(encoder: Encoder, messages: tuple[Message, ...]) -> list[int]:
    encoded = encoder.conversation(messages, add_eos=True)
    return [*encoded.prompt_P.tolist(), *encoded.responses[0].ids_T.tolist()]


def own_ids(encoder: Encoder, messages: tuple[Message, ...]) -> list[int]:
    text = encoder.tokenizer.render_chat(messages, generation_prompt=False)
    ids = list(encoder.tokenizer.encode(text, special=True).ids)
    return ids[: len(ids) - ids[::-1].index(encoder.end_of_turn_id or -1)]


def chat(answer: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer})


@pytest.mark.parametrize("answer", ["It is 46", "It is 46.", "数学"])
@pytest.mark.parametrize(
    ("template", "prefix"), [(BLANK, None), (TOKEN, "<|start|>")], ids=["a line break", "a special token"]
)
def test_a_response_is_closed_as_the_template_closes_it(template: str, prefix: str | None, answer: str) -> None:
    encoder = encoder_of(template, prefix)
    assert encoder.undecided("flags") is None
    assert ids_of(encoder, chat(answer)) == own_ids(encoder, chat(answer))
    response = encoder.response(answer, add_eos=True)
    assert response.text == answer
    assert response.spans_S is not None
    assert response.spans_S[-1] == (len(answer), len(answer))
    assert all(0 <= start <= end <= len(answer) for start, end in response.spans_S)
    assert response.scored_T.all()


def test_a_response_that_goes_on_or_is_all_that_a_model_writes_is_not_closed() -> None:
    ids = encoder_of(BLANK).response("It is 46.", add_eos=False).ids_T.tolist()
    assert ids == list(encoder_of(BLANK).tokenizer.encode("It is 46.", special=False).ids)
    written = encoder_of(TOKEN, "").response("It is 46.", add_eos=True).ids_T.tolist()
    assert written == [*ids, encoder_of(TOKEN).end_of_turn_id]


def test_a_response_that_closes_itself_is_refused() -> None:
    with pytest.raises(RequestError, match=r"<\|stop\|>"):
        encoder_of(TOKEN, "<|start|>").response("It is 46.<|stop|>", add_eos=True)


def test_where_a_template_answers_elsewhere_after_a_tool_that_chat_is_refused_until_it_is_decided() -> None:
    encoder = encoder_of(GOES_ON)
    assert ids_of(encoder, chat("Hello")) == own_ids(encoder, chat("Hello"))
    with pytest.raises(RequestError, match="between the last message and a response") as refused:
        encoder.conversation(AFTER_A_TOOL, add_eos=True)
    assert refused.value.code == "undecided_template"
    assert "--response-prefix ''" in str(refused.value)
    decided = encoder_of(GOES_ON, "")
    prompt = decided.chat_prompt(AFTER_A_TOOL[:-1]).tolist()
    assert decided.tokenizer.text_and_spans(prompt)[0].endswith("4 degrees<|im_end|>\n<|im_start|>assistant\n")
    assert ids_of(decided, AFTER_A_TOOL)[: len(prompt)] == prompt


def test_a_call_whose_first_id_depends_on_the_generation_prompt_is_refused_until_it_is_decided() -> None:
    template = GOES_ON.replace("{{ call.function.name }}", "{{ '\\n\\nHello' ~ call.function.name }}")
    called = AFTER_A_TOOL[:2]
    with pytest.raises(RequestError, match="tokenised as one text"):
        encoder_of(template).conversation(called, add_eos=True)
    assert ids_of(encoder_of(template, ""), called)


def test_where_both_renderings_leave_a_thought_open_a_plain_answer_is_refused_until_it_is_decided() -> None:
    template = (USER + "{% else %}" + HEADER + "{{ m.content }}<|im_end|>\n" + PROMPT).replace(
        HEADER, HEADER + "<think>\n"
    )
    undecided = encoder_of(template).undecided("flags")
    assert undecided is not None
    assert "would be scored as a thought" in undecided
    decided = encoder_of(template, "")
    assert decided.undecided("flags") is None
    thought = "Norway is north.\n</think>\nOslo"
    assert ids_of(decided, chat(thought)) == own_ids(decided, chat(thought))
    closed = template.replace("<think>\n", "<think>\n\n</think>\n")
    assert encoder_of(closed).undecided("flags") is None


def test_variables_without_effect_are_not_offered() -> None:
    template = "{% if unused %}{% endif %}" + TOKEN
    offered = [choice.typed("flags") for choice in choices_for(encoder_of(template).chat)]
    assert offered == ["--response-prefix '<|start|>'", "--response-prefix ''"]


def test_a_blank_that_tokenizers_join_with_the_response_is_not_offered_as_context() -> None:
    template = USER + "{% else %}<|im_start|>assistant: {{ m.content }}<|im_end|>\n" + PROMPT.replace("nt\n", "nt:")
    offered = [choice.response_prefix for choice in choices_for(encoder_of(template).chat)]
    assert offered == [""]


def test_parts_that_a_template_prints_are_given_as_a_string() -> None:
    users = "{% for p in m.content %}{{ p.text }}{% endfor %}"
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'system' %}{{ m.content | trim }}"
    template += "{% else %}" + users + "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}" + HEADER
    encoder = encoder_of(template + "{% endif %}")
    messages: tuple[Message, ...] = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})
    text = encoder.tokenizer.text_and_spans(encoder.chat_prompt(messages).tolist())[0]
    assert text == f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n{HEADER}"
