"""The error for a chat template whose generation prompt and own rendering differ before a response. Pure."""

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal

from dense_reward.errors import RequestError
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


def explanation(template: ChatTemplate, style: Style, template_kwargs: Mapping[str, JsonValue] | None = None) -> str:
    """Both renderings side by side, and each choice as it is typed. Several lines."""
    place = template.place(template_kwargs)
    lines = [
        "the chat template's own rendering puts other text around a response than its generation prompt and end of "
        "turn, so it must be decided once what precedes a response:",
        f"  generation prompt + response: {_shown(place.prompt)}",
        f"  the template's own rendering: {_shown(place.own)}",
    ]
    if place.prompt == place.own:
        lines.append("Both are the same text, but their ids differ where the response begins.")
    if template_kwargs and template.choices.response_prefix is not None:
        lines.append(f"The checkpoint's decision does not hold for template_kwargs {json.dumps(template_kwargs)}.")
    cure = "Adopt both checkpoints again with" if style == "flags" else "Add to the command"
    lines.append(f"{cure} one of:")
    lines += [f"  {choice}" for choice in _choices(template, place, style)]
    if style == "flags":
        lines.append("Token ids are served without a decision.")
    return "\n".join(lines)


def _choices(template: ChatTemplate, place: ResponsePlace, style: Style) -> Iterator[str]:
    agreeing = [variables for variables in _variables(template) if _same_text(template, variables)]
    for variables in agreeing:
        choice = choice_argument("template_kwargs", {**template.choices.template_kwargs, **variables}, style)
        if not template.place(variables).agrees:
            choice += f" {choice_argument('response_prefix', '', style)}"
        yield f"{choice}   (both renderings are then the same)"
    between = _between(template, {})
    given = _given(template, style)
    if between is not None:
        choice = given + choice_argument("response_prefix", between, style)
        yield f"{choice}   (this text is context, and is not scored)"
    if not agreeing and between is None:
        yield from _pairs_of_choices(template, style)
    note = "the response follows the generation prompt directly: it is all that the model writes"
    blank = _text_between(place)
    if blank and blank.isspace():
        note += f", and starts with {_shown(blank)}"
    yield f"{given}{choice_argument('response_prefix', '', style)}   ({note})"


def _given(template: ChatTemplate, style: Style) -> str:
    """The variables that are decided already, repeated because adoption replaces the decision as a whole."""
    variables = dict(template.choices.template_kwargs)
    return choice_argument("template_kwargs", variables, style) + " " if variables and style == "flags" else ""


def _pairs_of_choices(template: ChatTemplate, style: Style) -> Iterator[str]:
    """Variables with which the template's own rendering continues its generation prompt, and the text between."""
    for variables in _variables(template):
        between = _between(template, variables)
        if between is not None:
            merged = {**template.choices.template_kwargs, **variables}
            choices: dict[str, JsonValue] = {"template_kwargs": merged, "response_prefix": between}
            both = " ".join(choice_argument(name, value, style) for name, value in choices.items())
            yield f"{both}   (that text is context, and is not scored)"
            return


def _variables(template: ChatTemplate) -> Iterator[dict[str, JsonValue]]:
    """For each template variable, the first value with which both renderings agree or one continues the other."""
    tried = 0
    for name in sorted(template.tokenizer.template_variables - template.choices.template_kwargs.keys()):
        values: tuple[JsonValue, ...] = (False, True, *KNOWN_VALUES.get(name, ()))
        for value in values:
            tried += 1
            if tried > MAX_TRIED:
                return
            variables = {name: value}
            try:
                useful = _same_text(template, variables) or _between(template, variables) is not None
            except RequestError:
                continue
            if useful:
                yield variables
                break


def _same_text(template: ChatTemplate, variables: Mapping[str, JsonValue]) -> bool:
    place = template.place(variables)
    return place.agrees or place.prompt == place.own


def _between(template: ChatTemplate, variables: Mapping[str, JsonValue]) -> str | None:
    """The text that the template itself puts between its generation prompt and a response.

    None if there is none, or if it is a blank that the tokenizer joins with the response: as a part of the prompt it
    would give other ids.
    """
    text = _text_between(template.place(variables))
    if text is None:
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
