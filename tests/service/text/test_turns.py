"""A response with tool calls is scored as its chat template writes it, up to the end of the turn."""

import pytest
from dense_reward.engines.fake import FakeTokenizer
from dense_reward.errors import RequestError
from dense_reward.text.encode import Encoder
from dense_reward.text.encoded import Encoded
from dense_reward.text.special_tokens import JsonValue, Message
from dense_reward.text.turns import after_prompt
from kinds_of_templates import decided
from tiny_tokenizers import CHATML, chatml
from tool_templates import CHANNELS, HEADERS_ONLY, LIST, MACRO, ONE_OBJECT, PARTS, TAGS, TOOL_TEMPLATES, ToolTemplate

USER: Message = {"role": "user", "content": "Weather?"}
RESULT: Message = {"role": "tool", "content": "4", "tool_call_id": "c1"}
TOOL: JsonValue = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}


def calling(arguments: JsonValue = '{"x": 1}', content: JsonValue = None, name: str = "f") -> Message:
    call: JsonValue = {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def encoder_of(template: ToolTemplate) -> Encoder:
    return decided(template.tokenizer())


def pieces(encoder: Encoder, encoded: Encoded) -> list[str]:
    return encoder.tokenizer.pieces(encoded.responses[0].ids_T.tolist())


@pytest.mark.parametrize(
    ("template", "written", "end"),
    [
        (TAGS, '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', "<|im_end|>"),
        (ONE_OBJECT, '{"name": "f", "parameters": {"x": 1}}', "<|eot|>"),
        (LIST, '[CALLS][{"name": "f", "arguments": {"x": 1}, "id": "c1"}]', "</s>"),
        (
            PARTS,
            '<call>{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}</call>',
            "<|im_end|>",
        ),
        (MACRO, "<function=f><parameter=x>1</parameter></function>", "<|im_end|>"),
        (HEADERS_ONLY, "<tool_call>f\n<key>x</key>\n<value>1</value>\n</tool_call>", "<|observation|>"),
        (CHANNELS, ' to=functions.f<|message|>{"x": 1}', "<|call|>"),
    ],
    ids=list(TOOL_TEMPLATES),
)
@pytest.mark.parametrize("add_eos", [True, False])
def test_a_call_is_scored_as_the_template_writes_it(
    template: ToolTemplate, written: str, end: str, add_eos: bool
) -> None:
    encoder = encoder_of(template)
    encoded = encoder.conversation([USER, calling()], add_eos=add_eos, tools=[TOOL])
    assert encoded.prompt_P.tolist() == encoder.chat_prompt([USER], [TOOL]).tolist()
    response = encoded.responses[0]
    assert response.text == written
    assert response.scored_T.all()
    assert "".join(pieces(encoder, encoded)) == written + (end if add_eos else "")
    assert response.spans_S is not None
    assert len(response.spans_S) == len(response.ids_T)
    assert response.spans_S[-1][1] == len(written)


@pytest.mark.parametrize("name", [name for name in TOOL_TEMPLATES if name != "headers only"])
def test_the_conversation_goes_on_after_prompt_and_call(name: str) -> None:
    encoder = encoder_of(TOOL_TEMPLATES[name])
    encoded = encoder.conversation([USER, calling()], add_eos=True)
    ids = [*encoded.prompt_P.tolist(), *encoded.responses[0].ids_T.tolist()]
    longer = encoder.chat_prompt([USER, calling(), RESULT]).tolist()
    # As text: in the longer prompt, line breaks before the call can become other tokens.
    assert encoder.tokenizer.text_and_spans(longer)[0].startswith(encoder.tokenizer.text_and_spans(ids)[0])


def test_text_beside_a_call_is_scored_with_it() -> None:
    encoder = encoder_of(TAGS)
    encoded = encoder.conversation([USER, calling(content="I look.")], add_eos=False)
    assert encoded.responses[0].text == 'I look.\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


def test_every_turn_of_a_chat_with_calls_is_scored() -> None:
    encoder = encoder_of(TAGS)
    chat = [USER, calling(), RESULT, {"role": "assistant", "content": "It is 4."}]
    encoded = encoder.conversation(chat, add_eos=True, every_turn=True)
    response = encoded.responses[0]
    assert response.text == '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>It is 4.'
    assert not response.scored_T.all(), "the result of the tool is context"


def test_special_tokens_in_arguments_are_text_and_those_of_the_template_are_special() -> None:
    encoder = encoder_of(LIST)
    encoded = encoder.conversation([USER, calling({"x": "</s>[CALLS]"})], add_eos=True)
    specials = [t for t in encoded.responses[0].ids_T.tolist() if t in encoder.tokenizer.special_ids]
    assert encoder.tokenizer.pieces(specials) == ["[CALLS]", "</s>"]
    assert '{"x": "</s>[CALLS]"}' in (encoded.responses[0].text or "")


def refusal(encoder: Encoder, *messages: Message, add_eos: bool = True) -> str:
    with pytest.raises(RequestError) as refused:
        encoder.conversation(messages, add_eos=add_eos)
    assert refused.value.code == "bad_template"
    return str(refused.value)


def test_text_that_the_template_drops_beside_a_call_is_refused_as_a_response_but_not_in_the_prompt() -> None:
    encoder = encoder_of(ONE_OBJECT)
    assert "does not write content of the last message" in refusal(encoder, USER, calling(content="I look."))
    answered: list[Message] = [USER, calling(content="I look."), RESULT, {"role": "assistant", "content": "4"}]
    assert encoder.conversation(answered, add_eos=True), "policies behind this template never see that text"


def test_calls_that_the_template_does_not_write_are_refused() -> None:
    encoder = decided(chatml())
    assert "does not write tool_calls of the last message" in refusal(encoder, USER, calling(content="a"))


def test_a_turn_that_does_not_begin_with_the_generation_prompt_is_refused() -> None:
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    template = template.replace("message.content", "message.content ~ (message.tool_calls or '')")
    assert "'<think>\\n' before a response" in refusal(decided(chatml(template)), USER, calling(content="a"))


@pytest.mark.parametrize("prompt", ["<|im_start|>assistant\n", ""], ids=["always", "never"])
def test_a_template_that_ignores_add_generation_prompt_does_not_tell_where_a_turn_ends(prompt: str) -> None:
    template = TAGS.source.partition("{%- if add_generation_prompt %}")[0] + prompt
    encoder = decided(chatml(template))
    assert "ignores add_generation_prompt" in refusal(encoder, USER, calling())


def test_a_call_without_an_end_needs_add_eos_false() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    encoder = decided(chatml(template))
    assert "no end of turn" in refusal(encoder, USER, calling())
    assert encoder.conversation([USER, calling()], add_eos=False).responses[0].text == 'f({"x": 1})'


def test_renderers_without_a_template_refuse_calls() -> None:
    assert "no place for tool_calls" in refusal(Encoder.of(FakeTokenizer(), "plain"), USER, calling())


def test_what_follows_the_prompt_is_found() -> None:
    assert after_prompt("ab", "abc") == "c"
    with pytest.raises(RequestError, match="'x' before a response, 'yc' in the finished chat"):
        after_prompt("abx", "abyc")
    with pytest.raises(RequestError, match="'b' before a response, '' in"):
        after_prompt("ab", "a")
