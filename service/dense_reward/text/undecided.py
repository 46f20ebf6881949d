"""The error for a chat template whose generation prompt and own rendering differ before a response. Pure."""

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from dense_reward.errors import RequestError
from dense_reward.text.repetition import is_unclosed_thought
from dense_reward.text.special_tokens import JsonValue
from dense_reward.text.template import MARK, ChatTemplate, ResponsePlace

Style = Literal["flags", "keys"]
"""How a choice is made: flags of `dense-reward adopt`, or keys of the configuration of SFT."""
MAX_TRIED = 64
KNOWN_VALUES: Mapping[str, tuple[str, ...]] = {
    "reasoning_effort": ("none", "minimal", "low", "medium", "high"),
    "thinking_mode": ("off", "on", "chat", "thinking", "disabled", "enabled"),
    "reasoning": ("off", "on"),
}
SHOWN_CHARACTERS = 400


_CURE = (
    "Adopt both checkpoints again with --response-prefix '' (to train: response_prefix='') if a response continues the "
    "generation prompt, as a policy's does; or send ids"
)
TOKENISED_AS_ONE = (
    "the chat template's rendering of this turn, tokenised as one text, has other ids than its generation prompt and "
    f"the turn. {_CURE}"
)


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the decisions that a user can make. None: as the manifest has it. `note`: what the decision means."""

    template_kwargs: Mapping[str, JsonValue] | None
    response_prefix: str | None
    note: str

    def typed(self, style: Style) -> str:
        """The choice as it is typed in a shell."""
        given = {"template_kwargs": self.template_kwargs, "response_prefix": self.response_prefix}
        return " ".join(choice_argument(name, value, style) for name, value in given.items() if value is not None)


def explanation(template: ChatTemplate, style: Style, template_kwargs: Mapping[str, JsonValue] | None = None) -> str:
    """Both renderings side by side, and each choice as it is typed. Several lines."""
    place = template.place(template_kwargs)
    lines = [
        "the chat template's own rendering puts other text around a response than its generation prompt and end of "
        "turn, so it must be decided once what precedes a response:",
        f"  generation prompt + response: {_shown(place.prompt)}",
        f"  the template's own rendering: {_shown(place.own)}",
    ]
    if place.starts_alike and is_unclosed_thought(MARK, place.opening):
        lines.append("Both open a thought and do not close it, so a plain answer would be scored as a thought.")
    elif place.prompt == place.own:
        lines.append("Both are the same text, but tokenised as one text it has other ids where the response begins.")
    elif "".join(place.prompt.split()) == "".join(place.own.split()):
        lines.append(
            "The two differ only in spaces and line breaks. If these are the indentation of the template's file, "
            "remove it there and train again."
        )
    if template_kwargs and template.choices.response_prefix is not None:
        lines.append(f"The checkpoint decides this for other template_kwargs than {json.dumps(template_kwargs)}.")
    cure = "Adopt both checkpoints with" if style == "flags" else "Add to the command"
    lines.append(f"{cure} one of:")
    lines += [f"  {choice.typed(style)}   ({choice.note})" for choice in choices_for(template, template_kwargs)]
    if style == "flags":
        lines.append("Token ids are served without a decision.")
    return "\n".join(lines)


def stands_elsewhere(prompt: str, own: str) -> str:
    """Why one chat is refused, although a plain one is not: see turns.elsewhere."""
    return (
        "in this chat the template's generation prompt is not what its own rendering puts between the last message and "
        f"a response: {_shown(prompt)} and {_shown(own)}. {_CURE}"
    )


def choices_for(template: ChatTemplate, template_kwargs: Mapping[str, JsonValue] | None = None) -> Iterator[Choice]:
    """The decisions after which texts are served, the likeliest first. `template_kwargs`: those of a request."""
    place = template.place(template_kwargs)
    agreeing = [variables for variables in _variables(template) if _same_text(template, variables)]
    for variables in agreeing:
        prefix = None if template.place(variables).agrees else ""
        yield Choice(_merged(template, variables), prefix, "both renderings are then the same")
    between = _between(template, {})
    given = dict(template.choices.template_kwargs) or None  # adoption takes a decision as a whole
    if between is not None:
        yield Choice(given, between, "this text is context, and is not scored")
    if not agreeing and between is None:
        yield from _pairs_of_choices(template)
    note = "as the generation prompt has it: a response then holds all that the model writes"
    blank = _text_between(place)
    if blank and blank.isspace():
        note += f", with {_shown(blank)} at its start"
    yield Choice(given, "", note)


def _pairs_of_choices(template: ChatTemplate) -> Iterator[Choice]:
    """Variables with which the template's own rendering continues its generation prompt, and the text between."""
    for variables in _variables(template):
        between = _between(template, variables)
        if between is not None:
            yield Choice(_merged(template, variables), between, "that text is context, and is not scored")
            return


def _merged(template: ChatTemplate, variables: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    return {**template.choices.template_kwargs, **variables}


def _variables(template: ChatTemplate) -> Iterator[dict[str, JsonValue]]:
    """For each template variable, the first value with which both renderings agree or one continues the other."""
    tried = 0
    for name in sorted(template.tokenizer.template_variables - {"documents"} - template.choices.template_kwargs.keys()):
        values: tuple[JsonValue, ...] = (False, True, *KNOWN_VALUES.get(name, ()))
        for value in values:
            tried += 1
            if tried > MAX_TRIED:
                return
            variables = {name: value}
            try:
                useful = _changes(template, variables) and (
                    _same_text(template, variables) or _between(template, variables) is not None
                )
            except RequestError:
                continue
            if useful:
                yield variables
                break


def _changes(template: ChatTemplate, variables: Mapping[str, JsonValue]) -> bool:
    """Whether the variables do anything to a plain chat. Templates also set variables of their own."""
    place, plain = template.place(variables), template.place()
    return (place.prompt, place.own) != (plain.prompt, plain.own)


def _same_text(template: ChatTemplate, variables: Mapping[str, JsonValue]) -> bool:
    place = template.place(variables)
    return place.agrees or place.prompt == place.own


def _between(template: ChatTemplate, variables: Mapping[str, JsonValue]) -> str | None:
    """The text that the template itself puts between its generation prompt and a response.

    None if there is none, or if it is a blank that tokenizers join with the response: as a part of the prompt it would
    give other ids.
    """
    text = _text_between(template.place(variables))
    if text is None or (text.isspace() and "\n" not in text):
        return None
    prefix = (template.choices.response_prefix or "") + text
    choices = replace(template.choices, response_prefix=prefix)
    decided = ChatTemplate(template.tokenizer, choices, template.end_of_turn_id)
    return prefix if not text.isspace() or decided.place(variables).starts_alike else None


def _text_between(place: ResponsePlace) -> str | None:
    prompt, own = place.prompt.rpartition(MARK)[0], place.own.rpartition(MARK)[0]
    return own[len(prompt) :] if own.startswith(prompt) and len(own) > len(prompt) else None


def choice_argument(name: str, value: JsonValue, style: Style) -> str:
    """A choice about a template as it is typed in a shell."""
    if style == "keys":
        return shlex.quote(f"{name}={json.dumps(value, ensure_ascii=False)}")
    quoted = _shell(value) if isinstance(value, str) else shlex.quote(json.dumps(value, ensure_ascii=False))
    return f"--{name.replace('_', '-')} {quoted}"


def _shell(text: str) -> str:
    if text.isprintable():
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + escaped.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t") + "'"


def _shown(text: str) -> str:
    """The end of a rendering on one line."""
    cut = text if len(text) <= SHOWN_CHARACTERS else "..." + text[-SHOWN_CHARACTERS:]
    return json.dumps(cut, ensure_ascii=False)
