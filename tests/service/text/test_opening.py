"""What the prompt of each chat opens for its response: a switch in a message can change it; nothing is doubled."""

import pytest
from dense_reward.errors import RequestError
from dense_reward.text.encode import Encoder
from dense_reward.text.special_tokens import Message
from dense_reward.text.template import TemplateChoices
from kinds_of_templates import tokenizer_of
from tiny_tokenizers import CHATML, chatml

SWITCH = (
    "{% set off = messages[0].role == 'system' and '/no_think' in messages[0].content %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and off and OWN %}<think>\n\n</think>\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if off %}<think>\n\n</think>\n{% endif %}{% endif %}"
)
OFF: Message = {"role": "system", "content": "Be brief. /no_think"}
USER: Message = {"role": "user", "content": "Hi"}


def answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def switch(own: bool, prefix: str | None = None) -> Encoder:
    template = SWITCH.replace("OWN", str(own).lower())
    return Encoder.of(chatml(template, "<|im_end|>"), "chat", TemplateChoices(response_prefix=prefix))


def refused(encoder: Encoder, messages: list[Message], *, add_eos: bool = True) -> tuple[str, str]:
    with pytest.raises(RequestError) as error:
        encoder.conversation(messages, add_eos=add_eos)
    return error.value.code, str(error.value)


def test_a_thought_is_not_doubled_if_a_message_makes_the_prompt_open_it() -> None:
    encoder = switch(own=True)
    assert len(encoder.conversation([OFF, USER, answer("Yes")], add_eos=True).responses) == 1
    thought = answer("<think>\nhm\n</think>\nYes")
    assert encoder.conversation([USER, thought], add_eos=True).responses[0].text == thought["content"]
    code, message = refused(encoder, [OFF, USER, thought])
    assert code == "repeated_text"
    assert "<think>" in message


@pytest.mark.parametrize("prefix", [None, "<think>\n\n</think>\n"])
def test_a_chat_is_refused_if_a_message_moves_its_response_away_from_the_templates_own_place(
    prefix: str | None,
) -> None:
    encoder = switch(own=False, prefix=prefix)
    assert encoder.undecided("flags") is None
    code, message = refused(encoder, [OFF, USER, answer("Yes")])
    assert code == "undecided_template"
    assert "send ids" in message


def test_as_the_generation_prompt_has_it_holds_for_every_chat() -> None:
    encoder = switch(own=False, prefix="")
    prompt = encoder.chat_prompt([OFF, USER]).tolist()
    assert encoder.tokenizer.text_and_spans(prompt)[0].endswith("<|im_start|>assistant\n<think>\n\n</think>\n")


def test_a_thought_that_the_prompt_has_closed_is_not_closed_again() -> None:
    code, message = refused(switch(own=True), [OFF, USER, answer("hm\n</think>\nYes")])
    assert (code, "has </think>" in message) == ("repeated_text", True)


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", "<|endoftext|>", "<|im_end|><|endoftext|>"])
@pytest.mark.parametrize("add_eos", [True, False])
def test_no_end_of_a_turn_or_a_text_is_scored_as_plain_text(end: str, *, add_eos: bool) -> None:
    encoder = Encoder.of(chatml(CHATML, "<|endoftext|>"), "chat")
    code, message = refused(encoder, [USER, answer(f"Yes{end}")], add_eos=add_eos)
    assert code == "repeated_text"
    assert ("send add_eos true" in message) == (not add_eos)
    assert encoder.without_repetition(f"Yes{end}") == "Yes"


def test_special_tokens_that_the_model_writes_itself_are_parsed_if_a_response_holds_all_that_it_writes() -> None:
    tokenizer = tokenizer_of("a channel")
    encoder = Encoder.of(tokenizer, "chat", TemplateChoices(response_prefix=""))
    typed = "<|channel|>thoughts<|text|>hm<|channel|>final<|text|>Yes"
    for add_eos, text in ((True, typed), (False, f"{typed}<|im_end|>")):
        ids = encoder.response(text, add_eos=add_eos).ids_T.tolist()
        assert ids == list(tokenizer.encode(f"{typed}<|im_end|>", special=True).ids)
    own = tokenizer.render_chat([USER, answer("Yes")], generation_prompt=False)
    whole = encoder.conversation([USER, answer("<|channel|>final<|text|>Yes")], add_eos=True)
    ids = [*whole.prompt_P.tolist(), *whole.responses[0].ids_T.tolist()]
    assert ids == list(tokenizer.encode(own.rstrip("\n"), special=True).ids)


def test_special_tokens_of_a_response_are_plain_text_where_the_template_writes_them() -> None:
    tokenizer = tokenizer_of("a channel")
    encoder = Encoder.of(tokenizer, "chat", TemplateChoices(response_prefix="<|channel|>final<|text|>"))
    ids = encoder.response("say <|channel|> twice", add_eos=False).ids_T.tolist()
    assert ids == list(tokenizer.encode("say <|channel|> twice", special=False).ids)


def test_a_tools_result_must_not_end_in_the_tag_that_the_template_writes_after_it() -> None:
    content = "{{ message.content }}"
    wrapped = f"<result>\n{content}\n</result>"
    template = CHATML.replace(
        content, "{% if message.role == 'tool' %}" + wrapped + "{% else %}" + content + "{% endif %}"
    )
    encoder = Encoder.of(chatml(template, "<|im_end|>"), "chat")
    result: Message = {"role": "tool", "content": "4"}
    assert len(encoder.chat_prompt([USER, answer("ask"), result]))
    doubled: Message = {"role": "tool", "content": "<result>\n4\n</result>\n"}
    with pytest.raises(RequestError, match=r"messages.2 ends in </result>, which the chat template writes"):
        encoder.chat_prompt([USER, answer("ask"), doubled])


def test_a_variable_that_the_template_does_not_read_is_refused_in_a_request_too() -> None:
    encoder = Encoder.of(chatml(CHATML, "<|im_end|>"), "chat")
    with pytest.raises(RequestError, match="reads no variable 'enable_thinking'"):
        encoder.chat_prompt([USER], None, {"enable_thinking": False})
    with pytest.raises(RequestError, match="reads no variable 'documents'"):
        encoder.chat_prompt([USER], None, {"documents": [{"text": "Oslo"}]})


def test_a_template_for_chats_with_tools_is_asked_for_its_date_and_variables_too() -> None:
    tokenizer = chatml(CHATML, "<|im_end|>")
    own = tokenizer.transformers_tokenizer
    own.chat_template = {"default": CHATML, "tool_use": "{{ strftime_now('%d') }}{{ effort }}" + CHATML}
    assert tokenizer.asks_for_the_date
    assert "effort" in tokenizer.template_variables
