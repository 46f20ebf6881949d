"""The layouts that are read: which keys a row has, and which messages it becomes. docs/data.md describes each.

Pure functions of one row. Must not import files, data sets, tokenizers or chat templates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from dense_reward_trainer.data.messages import alternating, is_transcript, messages_of, transcript_turns
from dense_reward_trainer.data.records import ChatMessage, LineError, RawRow
from dense_reward_trainer.data.row_values import is_empty, quoted_keys, string

Reader = Callable[[RawRow], tuple[ChatMessage, ...]]


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to write a demonstration. `keys`: the columns that it needs. `also`: columns that it reads if present."""

    keys: tuple[str, ...]
    read: Reader
    also: tuple[str, ...] = ()
    note: str = ""

    @property
    def name(self) -> str:
        return "+".join(self.keys)


def _chat(row: RawRow, key: str) -> tuple[ChatMessage, ...]:
    return messages_of(row[key], key)


def _conversations(row: RawRow, key: str) -> tuple[ChatMessage, ...]:
    """ShareGPT's list of objects, or LIMA's list of texts."""
    value = row[key]
    if isinstance(value, list | tuple) and value and all(isinstance(text, str) for text in value):
        return alternating(list(value), key)
    return messages_of(value, key)


def _from_texts(row: RawRow, prompt_key: str, response_key: str) -> tuple[ChatMessage, ...]:
    prompt, response = (string(row[key], f"`{key}`") for key in (prompt_key, response_key))
    if not is_transcript(prompt):
        return ChatMessage("user", prompt), ChatMessage("assistant", response)
    before = transcript_turns(prompt)
    if before[-1].role != "assistant" or before[-1].content.strip():
        detail = f"`{prompt_key}` is a transcript of turns, but it does not end with `Assistant:`: write `messages`"
        raise LineError("wrong type", detail)
    return *before[:-1], ChatMessage("assistant", response.removeprefix(" "))


def _from_instruction(row: RawRow, response_key: str) -> tuple[ChatMessage, ...]:
    parts = [string(row["instruction"], "`instruction`"), string(row.get("input", ""), "`input`")]
    prompt = "\n\n".join(part for part in parts if part.strip())
    return ChatMessage("user", prompt), ChatMessage("assistant", string(row[response_key], f"`{response_key}`"))


def _from_prompt(row: RawRow, response_key: str) -> tuple[ChatMessage, ...]:
    prompt, response = row["prompt"], row[response_key]
    if not isinstance(prompt, list | tuple) and not isinstance(response, list | tuple):
        return _from_texts(row, "prompt", response_key)
    if isinstance(response, str):
        return *messages_of(prompt, "prompt"), ChatMessage("assistant", response)
    answered = messages_of(response, response_key)
    if len(answered) != 1:
        # A demonstration has one response, and only its author can decide which of several to learn.
        detail = f"`{response_key}` has {len(answered)} messages, one is needed: `messages` trains on the last one"
        raise LineError("wrong type", detail)
    return *messages_of(prompt, "prompt"), *answered


def _from_chosen(row: RawRow) -> tuple[ChatMessage, ...]:
    chosen = row["chosen"]
    if isinstance(chosen, list | tuple):
        return messages_of(chosen, "chosen")
    text = string(chosen, "`chosen`")
    if not is_transcript(text):
        detail = "`chosen` is a text without turns (Human:, Assistant:), and there is no `prompt`: add one"
        raise LineError("wrong type", detail)
    return transcript_turns(text)


def _from_prompt_and_chosen(row: RawRow, prompt_key: str) -> tuple[ChatMessage, ...]:
    """UltraFeedback's and TRL's forms of a preference: `chosen` holds the whole chat, or the response alone."""
    prompt, chosen = row[prompt_key], row["chosen"]
    if isinstance(chosen, str):
        if is_transcript(chosen):
            return _whole(transcript_turns(chosen), prompt)
        return _from_texts(row, prompt_key, "chosen")
    messages = messages_of(chosen, "chosen")
    if len(messages) > 1:
        return _whole(messages, prompt)
    before = (ChatMessage("user", prompt),) if isinstance(prompt, str) else messages_of(prompt, prompt_key)
    return *before, *messages


def _whole(messages: tuple[ChatMessage, ...], prompt: object) -> tuple[ChatMessage, ...]:
    """The chat in `chosen`, if it holds the prompt."""
    if isinstance(prompt, str):
        wanted = transcript_turns(prompt) if is_transcript(prompt) else (ChatMessage("user", prompt),)
    else:
        wanted = messages_of(prompt, "prompt")
    held = {message.content.strip() for message in messages}
    if not {message.content.strip() for message in wanted} <= held | {""}:
        raise LineError("two formats", "`chosen` is a whole chat, but it does not hold the `prompt`: keep one of them")
    return messages


_TEXTS = (("question", "answer"), ("question", "response"), ("query", "response"), ("problem", "solution"))
_CHOSEN = "chosen is learnt, rejected is not read"
LAYOUTS: tuple[Layout, ...] = (
    Layout(("messages",), partial(_chat, key="messages")),
    Layout(("conversations",), partial(_conversations, key="conversations")),
    Layout(("prompt", "response"), partial(_from_prompt, response_key="response")),
    Layout(("prompt", "completion"), partial(_from_prompt, response_key="completion")),
    Layout(("instruction", "output"), partial(_from_instruction, response_key="output"), ("input",)),
    Layout(("instruction", "response"), partial(_from_instruction, response_key="response"), ("input",)),
    *(Layout((a, b), partial(_from_texts, prompt_key=a, response_key=b)) for a, b in _TEXTS),
    Layout(("prompt", "chosen"), partial(_from_prompt_and_chosen, prompt_key="prompt"), note=_CHOSEN),
    Layout(("question", "chosen"), partial(_from_prompt_and_chosen, prompt_key="question"), note=_CHOSEN),
    Layout(("chosen",), _from_chosen, note=_CHOSEN),
)


def prompt_without_response(row: RawRow) -> tuple[Layout, tuple[ChatMessage, ...]] | None:
    """The messages of a row that has only a prompt, such as verl's and TRL's; None if it has no `prompt`."""
    prompt = row.get("prompt")
    if is_empty(prompt):
        return None
    layout = Layout(("prompt",), lambda _: ())
    if isinstance(prompt, str) and not is_transcript(prompt):
        return layout, (ChatMessage("user", string(prompt, "`prompt`")),)
    messages = transcript_turns(prompt) if isinstance(prompt, str) else messages_of(prompt, "prompt")
    if messages[-1].role == "assistant" and not messages[-1].content.strip():
        messages = messages[:-1]
    return layout, messages


def matching(row: RawRow) -> list[Layout]:
    """The layouts whose keys the row has; a layout with more keys hides the one that it extends."""
    found = [layout for layout in LAYOUTS if row.keys() >= set(layout.keys)]
    return [one for one in found if not any(set(one.keys) < set(other.keys) for other in found)]


def read_messages(row: RawRow) -> tuple[tuple[Layout, ...], tuple[ChatMessage, ...]]:
    """The layouts of a row, which must agree, and its messages. Raises LineError; `row` has a layout."""
    layouts = matching(row)
    if len(layouts) == 1:
        return tuple(layouts), layouts[0].read(row)
    both = " and ".join(layout.name for layout in layouts)
    refusal = LineError(
        "two formats",
        f"has {quoted_keys(row)}, which reads as {both}: keep one, and name "
        "the columns of the other in ignore_columns (beside `source`)",
    )
    try:
        readings = [layout.read(row) for layout in layouts]
    except LineError:
        raise refusal from None
    if any(reading != readings[0] for reading in readings):
        raise refusal
    return tuple(layouts), readings[0]


def formats() -> str:
    """The layouts, for a message."""
    return "; ".join(layout.name for layout in LAYOUTS)
