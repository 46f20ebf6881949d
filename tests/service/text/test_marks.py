"""Messages and tools that a chat template would drop are refused, not lost."""

import pytest
from dense_reward.errors import RequestError
from dense_reward.text.special_tokens import JsonValue, Message
from kinds_of_templates import decided
from tiny_tokenizers import CHATML, chatml
from tool_templates import TOOL_TEMPLATES

USER: Message = {"role": "user", "content": "Weather?"}
CALL: Message = {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": '{"a": 1}'}}]}
RESULT: Message = {"role": "tool", "content": "4", "tool_call_id": "c1"}
TOOL: JsonValue = {"type": "function", "function": {"name": "f", "parameters": {}}}
KNOWN_ROLES = (
    "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}<|im_start|>{{ m.content }}{% endif %}{% endfor %}"
)
FIRST_ONLY = "{% for m in messages %}{% if m.role != 'system' or loop.first %}{{ m.content }}{% endif %}{% endfor %}"


def refusal(template: str, messages: list[Message], tools: list[JsonValue] | None = None) -> RequestError:
    with pytest.raises(RequestError) as refused:
        decided(chatml(template)).chat_prompt(messages, tools)
    assert refused.value.code == "bad_template"
    return refused.value


@pytest.mark.parametrize("role", ["system", "tool", "critic", "developer"])
@pytest.mark.parametrize("content", ["be brief", "user", [{"type": "text", "text": "be brief"}, "  "]])
def test_a_role_that_the_template_ignores_is_refused(role: str, content: JsonValue) -> None:
    assert "messages.0: the chat template does not render this message" in str(
        refusal(KNOWN_ROLES, [{"role": role, "content": content}, USER])
    )


def test_a_message_in_a_place_that_the_template_ignores_is_refused() -> None:
    system: Message = {"role": "system", "content": "e"}  # also a letter of the other message
    assert "messages.1" in str(refusal(FIRST_ONLY, [USER, system]))
    assert len(decided(chatml(FIRST_ONLY)).chat_prompt([system, USER]))


def test_calls_that_the_template_ignores_are_refused() -> None:
    assert "messages.1: the chat template does not render all of its tool_calls" in str(
        refusal(CHATML.replace("message.content", "message.content or ''"), [USER, CALL, RESULT])
    )


def test_the_second_of_two_calls_may_not_be_lost_either() -> None:
    template = CHATML.replace("message.content", "message.content or message.tool_calls[0].function.name")
    calls: JsonValue = [{"function": {"name": "f", "arguments": {}}}] * 2
    assert "tool_calls" in str(refusal(template, [USER, {"role": "assistant", "tool_calls": calls}, RESULT]))


def test_tools_that_the_template_ignores_are_refused() -> None:
    error = refusal(KNOWN_ROLES, [USER], [TOOL])
    assert (error.faults[0].param, "tools.0" in str(error)) == ("tools", True)


def test_a_message_that_is_blank_has_nothing_to_lose() -> None:
    assert len(decided(chatml(KNOWN_ROLES)).chat_prompt([{"role": "system", "content": " "}, USER]))


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_templates_with_tools_lose_nothing(name: str) -> None:
    encoder = decided(TOOL_TEMPLATES[name].tokenizer())
    prompt = encoder.tokenizer.text_and_spans(encoder.chat_prompt([USER, CALL, RESULT], [TOOL]).tolist())[0]
    assert "DenseReward" not in prompt, "the marks are in another rendering"
