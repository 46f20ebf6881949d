"""What the prompt of one chat opens for its response; a system message or tools can change it. Pure.

SmolLM3 writes an empty thought after a system message with /no_think, and nothing after others.
"""

from collections.abc import Mapping, Sequence

from dense_reward.errors import RequestError, refuse
from dense_reward.text.marks import MarkedChat
from dense_reward.text.special_tokens import JsonValue
from dense_reward.text.template import MARK, ChatTemplate


def checked_opening(template: ChatTemplate, chat: MarkedChat, template_kwargs: Mapping[str, JsonValue] | None) -> str:
    """What the prompt of this chat opens for its response.

    Raises RequestError(undecided_template) if that is not what a plain chat opens, and the template's own rendering of
    a response to this chat has something else there: then what the manifest decides does not hold for this chat.
    """
    plain = template.place(template_kwargs).opening
    if chat.tail is None:
        return plain
    end = template.end_string
    opening = chat.tail.rpartition(end)[2] if end else chat.tail
    if opening != plain and template.choices.response_prefix != "" and not _continues_in_own_rendering(chat):
        raise refuse(
            "undecided_template",
            f"for this chat the generation prompt ends in {opening[-80:]!r}, for a plain chat in {plain[-80:]!r}, and "
            "the template's own rendering of a response to this chat has something else: leave out of the chat what "
            "changes its generation prompt (such as a switch in the system message), or send ids",
            param="messages",
        )
    return opening


def _continues_in_own_rendering(chat: MarkedChat) -> bool:
    """Whether the template's own rendering of a response to this chat has it where the generation prompt ends."""
    answered: Sequence[Mapping[str, JsonValue]] = [*chat.chat.messages, {"role": "assistant", "content": MARK}]
    try:
        whole = chat.chat.render(generation_prompt=False, messages=answered)
    except RequestError:
        return False
    return f"{chat.last_mark}{chat.tail}{MARK}" in whole
