"""A response stands where the chat template's own rendering has it, or where the manifest decides, or is refused."""

from collections.abc import Mapping

import pytest
from dense_reward.errors import RequestError
from dense_reward.text.encode import Encoder
from dense_reward.text.special_tokens import JsonValue, Message
from dense_reward.text.template import TemplateChoices
from kinds_of_templates import AGREE, DIFFER, KINDS, tokenizer_of
from tiny_tokenizers import CHATML, chatml

THINKING = "an empty thought"


def encoder_of(kind: str, prefix: str | None = None, **template_kwargs: bool) -> Encoder:
    return Encoder.of(tokenizer_of(kind), "chat", TemplateChoices(template_kwargs, prefix))


def chat(prompt: str, response: str, **more: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response, **more}]


def ids_of(encoder: Encoder, messages: list[Message], variables: Mapping[str, JsonValue] | None = None) -> list[int]:
    encoded = encoder.conversation(messages, add_eos=True, template_kwargs=variables)
    return [*encoded.prompt_P.tolist(), *encoded.responses[0].ids_T.tolist()]


def own_ids(encoder: Encoder, messages: list[Message], variables: Mapping[str, JsonValue] | None = None) -> list[int]:
    """The ids of the template's own rendering up to the last end of turn."""
    tokenizer = encoder.tokenizer
    text = tokenizer.render_chat(messages, generation_prompt=False, template_kwargs=variables)
    ids = list(tokenizer.encode(text, special=True).ids)
    last = len(ids) - 1 - ids[::-1].index(encoder.end_of_turn_id or -1)
    return ids[: last + 1]


def refusal(encoder: Encoder, **variables: bool) -> str:
    with pytest.raises(RequestError) as refused:
        encoder.chat_prompt([{"role": "user", "content": "Hi"}], None, variables or None)
    assert (refused.value.code, refused.value.status) == ("undecided_template", 422)
    return str(refused.value)


@pytest.mark.parametrize("kind", AGREE)
def test_where_both_renderings_agree_texts_have_the_ids_of_the_templates_own(kind: str) -> None:
    encoder = encoder_of(kind)
    assert encoder.undecided("flags") is None
    messages = chat("What is 12 + 34?", "It is 46, carry 0.")
    assert ids_of(encoder, messages) == own_ids(encoder, messages)


@pytest.mark.parametrize("kind", DIFFER)
def test_where_they_differ_every_text_is_refused_until_it_is_decided(kind: str) -> None:
    encoder = encoder_of(kind)
    message = refusal(encoder)
    assert message.count("What is the capital of Norway?") == 2, "both renderings are shown"
    assert "--response-prefix ''" in message
    for call in (lambda: encoder.prompt("Hi"), lambda: encoder.conversation(chat("Hi", "Hello"), add_eos=True)):
        with pytest.raises(RequestError, match="must be decided once"):
            call()
    assert len(encoder.prompt("Hi", raw=True)) > 0, "raw text is rendered already"
    assert Encoder.of(tokenizer_of(kind), "plain").undecided("flags") is None
    assert encoder_of(kind, "").undecided("flags") is None


@pytest.mark.parametrize(
    ("kind", "offered"),
    [
        (THINKING, "--template-kwargs '{\"enable_thinking\": false}'"),
        (THINKING, "--response-prefix $'<think>\\n\\n</think>\\n'"),
        ("a channel", "--response-prefix '<|channel|>final<|text|>'"),
        (
            "a blank of difference",
            "--response-prefix ''   (as the generation prompt has it: ",
        ),
    ],
)
def test_each_choice_is_offered_as_it_is_typed(kind: str, offered: str) -> None:
    assert offered in refusal(encoder_of(kind))


def test_a_difference_of_spaces_alone_is_named_because_an_indented_template_has_it_by_mistake() -> None:
    named = "differ only in spaces and line breaks"
    assert [kind for kind in DIFFER if named in refusal(encoder_of(kind))] == ["a blank of difference"]


def test_a_prefix_that_would_give_other_ids_is_not_offered() -> None:
    assert "--response-prefix ' '" not in refusal(encoder_of("a blank of difference"))


def test_renderings_of_one_text_with_other_ids_are_told_apart() -> None:
    template = KINDS[THINKING].replace("</think>\n", "</think>\n\n")
    encoder = Encoder.of(chatml(template, "<|im_end|>"), "chat", TemplateChoices({"enable_thinking": False}))
    assert "Both are the same text" in refusal(encoder), "this tokenizer joins line breaks at the end of a text"
    offered = Encoder.of(chatml(template, "<|im_end|>"), "chat").undecided("flags") or ""
    assert "--template-kwargs '{\"enable_thinking\": false}' --response-prefix ''" in offered


def test_for_training_the_choices_are_keys_of_the_configuration() -> None:
    explained = encoder_of(THINKING).undecided("keys") or ""
    assert "'template_kwargs={\"enable_thinking\": false}'" in explained
    assert "'response_prefix=\"<think>\\n\\n</think>\\n\"'" in explained


@pytest.mark.parametrize(
    ("kind", "prefix", "variables"),
    [
        (THINKING, None, {"enable_thinking": False}),
        (THINKING, "<think>\n\n</think>\n", {}),
        ("a channel", "<|channel|>final<|text|>", {}),
    ],
)
def test_decided_texts_have_the_ids_of_the_templates_own_rendering(
    kind: str, prefix: str | None, variables: dict[str, bool]
) -> None:
    encoder = encoder_of(kind, prefix, **variables)
    messages = chat("What is 12 + 34?", "It is 46, carry 0.")
    assert ids_of(encoder, messages) == own_ids(encoder, messages)
    first = encoder.conversation(messages, add_eos=True).responses[0].ids_T[0]
    assert encoder.tokenizer.pieces([int(first)]) == ["I"], "what stands between is not scored"


def test_variables_of_a_request_replace_those_of_the_manifest_one_by_one() -> None:
    messages = chat("Hi", "Hello")
    decided = encoder_of(THINKING, None, enable_thinking=False)
    assert ids_of(encoder_of(THINKING), messages, {"enable_thinking": False}) == ids_of(decided, messages)
    assert "must be decided" in refusal(decided, enable_thinking=True)


def test_a_decision_holds_for_variables_that_change_nothing_around_a_response() -> None:
    template = KINDS[THINKING].replace("{% for m", "{{ mood }}{% for m", 1)
    encoder = Encoder.of(chatml(template, "<|im_end|>"), "chat", TemplateChoices({}, ""))
    hi: list[Message] = [{"role": "user", "content": "Hi"}]
    calm = encoder.chat_prompt(hi, None, {"mood": "calm"}).tolist()
    assert encoder.tokenizer.text_and_spans(calm)[0].startswith("calm")
    assert encoder.chat_prompt(hi, None, {"enable_thinking": False}).tolist() != encoder.chat_prompt(hi).tolist()


def test_a_prefix_is_part_of_every_prompt_of_a_chat() -> None:
    encoder = encoder_of("a channel", "<|channel|>final<|text|>")
    messages = [*chat("a", "b"), *chat("c", "d")]
    whole = encoder.conversation(messages, add_eos=True, every_turn=True)
    assert [*whole.prompt_P, *whole.responses[0].ids_T] == own_ids(encoder, messages)
    assert whole.responses[0].text == "bd"


def test_the_date_is_the_manifests_on_every_day() -> None:
    tokenizer = tokenizer_of("the date")
    assert tokenizer.asks_for_the_date
    assert not tokenizer_of("plain ChatML").asks_for_the_date
    pinned = Encoder.of(tokenizer, "chat", TemplateChoices(template_date="2024-07-26"))
    assert "Today is 26 Jul 2024." in tokenizer.text_and_spans(pinned.prompt("Hi").tolist())[0]


def test_templates_that_take_parts_get_parts() -> None:
    encoder = encoder_of("parts alone")
    prompts = [encoder.tokenizer.text_and_spans(encoder.prompt(text).tolist())[0] for text in ("Hi", "Ho")]
    assert prompts[0] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n" != prompts[1]


def test_a_role_that_the_template_drops_is_refused() -> None:
    messages: list[Message] = [{"role": "system", "content": "Be brief."}, *chat("Hi", "Hello")]
    assert ids_of(encoder_of("plain ChatML"), messages)
    with pytest.raises(RequestError, match="does not render this message of role 'system'"):
        ids_of(encoder_of("no system"), messages)


@pytest.mark.parametrize(
    ("prefix", "response", "learnt"),
    [
        ("", "<think>\nEasy.\n</think>\n\nOslo.", "Easy.\n</think>\n\nOslo."),
        ("", " \n<think>  Easy.\n</think>Oslo.", "Easy.\n</think>Oslo."),
        ("", "<think>\n\n  x", "\n  x"),
        ("", "Easy <think>.", "Easy <think>."),
        ("", "Oslo.<|im_end|>\n", "Oslo."),
        ("", "<think>\nOslo.<|im_end|><|im_end|>", "Oslo."),
        ("\n</think>\n\n", "<think>\n</think>\nOslo.", "Oslo."),
        ("", "<|im_start|>assistant\n<think>\nOslo.", "Oslo."),
    ],
)
def test_what_a_response_repeats_of_its_prompt_is_refused_and_can_be_left_out(
    prefix: str, response: str, learnt: str
) -> None:
    encoder = encoder_of("an opened thought", prefix)
    assert encoder.without_repetition(response) == learnt
    if response == learnt:
        assert encoder.response(response, add_eos=True).text == learnt
        return
    with pytest.raises(RequestError, match="leave that out of the response") as refused:
        encoder.conversation(chat("Capital?", response), add_eos=True)
    assert refused.value.code == "repeated_text"
    assert encoder.response(learnt, add_eos=True).text == learnt


def test_a_thought_after_a_prompt_that_has_closed_it_is_refused_everywhere() -> None:
    encoder = encoder_of(THINKING, None, enable_thinking=False)
    for call in (encoder.without_repetition, lambda text: encoder.response(text, add_eos=False)):
        with pytest.raises(RequestError, match="has <think>, which its prompt has already opened and closed"):
            call("<think>\nHm.\n</think>\n\nOslo.")


def test_a_thought_that_a_response_leaves_open_is_seen() -> None:
    opened, closed = encoder_of("an opened thought", ""), encoder_of(THINKING, None, enable_thinking=False)
    assert [opened.leaves_thought_open(text) for text in ("Oslo.", "Hm.</think>Oslo.")] == [True, False]
    assert not closed.leaves_thought_open("Oslo.")
    assert not encoder_of("plain ChatML").leaves_thought_open("Oslo.")


def test_a_raw_response_does_not_hold_the_end_of_turn_that_is_added() -> None:
    encoder = encoder_of("plain ChatML")
    with pytest.raises(RequestError, match=r"ends in <\|im_end\|>"):
        encoder.response("Hello<|im_end|>", add_eos=True, raw=True)
    assert encoder.response("Hello<|im_end|>", add_eos=False, raw=True).ids_T[-1] == encoder.end_of_turn_id


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_a_thought_is_scored_as_the_policy_writes_it(key: str) -> None:
    encoder = encoder_of(THINKING, "")
    messages = chat("Capital?", "Oslo.", **{key: "Easy."})
    assert encoder.conversation(messages, add_eos=True).responses[0].text == "<think>\nEasy.\n</think>\nOslo."
    assert ids_of(encoder, messages) == own_ids(encoder, chat("Capital?", "Oslo.", reasoning_content="Easy."))


def test_a_thought_that_the_template_does_not_render_is_refused() -> None:
    with pytest.raises(RequestError, match="does not write reasoning_content"):
        ids_of(encoder_of("plain ChatML"), chat("Capital?", "Oslo.", reasoning_content="Easy."))


def test_the_last_turn_is_right_where_earlier_thoughts_are_dropped() -> None:
    encoder = encoder_of("earlier thoughts dropped")
    messages = [*chat("a", "<think>x</think>b"), *chat("c", "<think>y</think>d")]
    assert ids_of(encoder, messages) == own_ids(encoder, messages)
    with pytest.raises(RequestError, match="one item for each assistant turn"):
        encoder.conversation(messages, add_eos=True, every_turn=True)


def test_the_checkpoints_end_of_turn_can_be_the_templates_second() -> None:
    tokenizer = tokenizer_of("two ends")
    assert encoder_of("two ends").end_of_turn_id == tokenizer.encode("<|stop|>", special=True).ids[0]
    assert encoder_of("two ends").chat.own_end()[1][:2] == tokenizer.encode("<|stop|><|im_end|>", special=True).ids


def test_variables_of_a_template_are_found() -> None:
    assert tokenizer_of(THINKING).template_variables == {"enable_thinking"}
    assert tokenizer_of("plain ChatML").template_variables == frozenset()
    marked = CHATML.replace(
        "{{ message.content }}", "{% generation %}{{ message.content }}{% endgeneration %}{{ mood }}"
    )
    assert chatml(marked).template_variables == {"mood"}


def test_names_that_the_template_sets_itself_are_no_variables_unless_it_asks_for_them() -> None:
    own = "{% for m in messages %}{% if m.content %}{% set content = m.content %}{% endif %}{{ content }}{% endfor %}"
    asked = "{% if effort is not defined %}{% set effort = 1 %}{% endif %}{% set tone = tone or 2 %}{{ effort ~ tone }}"
    assert chatml(own + asked).template_variables == {"effort", "tone"}
