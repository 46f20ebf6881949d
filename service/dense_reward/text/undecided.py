"""What to say if a chat template puts a response elsewhere than its own generation prompt does. Pure."""

import json
import shlex
from collections.abc import Iterator, Mapping
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
        "the chat template's generation prompt is not what its own rendering puts before and after a response, so "
        "it must be decided once what a response stands after:",
        f"  generation prompt + response: {_shown(place.prompt)}",
        f"  the template's own rendering: {_shown(place.own)}",
    ]
    if template_kwargs and template.choices.response_prefix is not None:
        lines.append(f"The checkpoint decides this for other template_kwargs than {json.dumps(template_kwargs)}.")
    cure = "Adopt both checkpoints again with" if style == "flags" else "Add to the command"
    lines.append(f"{cure} one of:")
    lines += [f"  {choice}" for choice in _choices(template, place, style)]
    lines.append("Token ids are served without a decision.")
    return "\n".join(lines)


def _choices(template: ChatTemplate, place: ResponsePlace, style: Style) -> Iterator[str]:
    for variables in _agreeing_variables(template):
        merged = {**template.choices.template_kwargs, **variables}
        yield f"{_argument('template_kwargs', merged, style)}   (both renderings then agree)"
    between = _between(template, place)
    if between is not None:
        yield f"{_argument('response_prefix', between, style)}   (this text is context, and is not scored)"
    yield (
        f"{_argument('response_prefix', '', style)}   (as the generation prompt has it: a response then holds all "
        "that the model writes)"
    )


def _agreeing_variables(template: ChatTemplate) -> Iterator[dict[str, JsonValue]]:
    """Variables of the template, each with the first value that makes both renderings agree."""
    tried = 0
    for name in sorted(template.tokenizer.template_variables - template.choices.template_kwargs.keys()):
        values: tuple[JsonValue, ...] = (False, True, *KNOWN_VALUES.get(name, ()))
        for value in values:
            tried += 1
            if tried > MAX_TRIED:
                return
            try:
                agrees = template.place({name: value}).agrees
            except RequestError:
                continue
            if agrees:
                yield {name: value}
                break


def _between(template: ChatTemplate, place: ResponsePlace) -> str | None:
    """The text that the template itself puts between its generation prompt and a response; None if there is none."""
    prompt = place.prompt.rpartition(MARK)[0]
    own = place.own.rpartition(MARK)[0]
    if not own.startswith(prompt) or len(own) == len(prompt):
        return None
    return (template.choices.response_prefix or "") + own[len(prompt) :]


def _argument(name: str, value: JsonValue, style: Style) -> str:
    """The choice as it is typed in a shell."""
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
