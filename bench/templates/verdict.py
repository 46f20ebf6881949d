"""What the service does with a chat template: its own code gives the verdict, transformers checks the ids."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from dense_reward.checkpoints.chat_choices import check_end_of_turn, checked_choices, encoder_with
from dense_reward.engines.tokenizer import TransformersTokenizer
from dense_reward.errors import CheckpointError, RequestError
from dense_reward.text.encode import Encoder
from dense_reward.text.template import TemplateChoices
from dense_reward.text.undecided import Choice, choices_for
from pydantic import JsonValue
from transformers import PreTrainedTokenizerFast

from bench.templates.chats import CHATS, is_own, own_texts
from bench.templates.vocabulary import Family, family_of, tokenizer_for

EQUAL, REFUSED, DIFFERENT, NO_RENDERING = "equal", "refused", "DIFFERENT", "-"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One decision (`flags` of adopt; empty: none was needed), and for each chat whether its ids are right.

    A chat is "equal", "DIFFERENT", "refused" (the reason is in `reasons`), or "-" if the template itself refuses it or
    drops a message.
    """

    flags: str
    chats: Mapping[str, str]
    reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """`verdict`: served, decision or refused. `end_of_turn`: the token, which has to be named if `end_is_named`."""

    verdict: str
    reason: str = ""
    end_of_turn: str = ""
    end_is_named: bool = False
    date: bool = False
    outcomes: tuple[Outcome, ...] = ()

    @property
    def different(self) -> list[str]:
        """The chats that are served with ids that are not those of the template."""
        return [f"{o.flags}: {name}" for o in self.outcomes for name, is_ in o.chats.items() if is_ == DIFFERENT]


def verdict_on(template: str, *, spaced: bool = False) -> Verdict:
    """The verdict on a template with a tokenizer for it. See family_of."""
    family = family_of(template, spaced=spaced)
    hf = tokenizer_for(template, family)
    tokenizer = TransformersTokenizer(hf)
    place = Path("checkpoint")
    try:
        choices = checked_choices(tokenizer, "chat", None, None, None)
        encoder = encoder_with(tokenizer, "chat", choices, end_of_turn=None, place=place)
    except CheckpointError as error:
        return Verdict("refused", str(error).removeprefix(f"{place}: "))
    named = not _end_is_clear(encoder, family)
    if named:
        end = family.ends or (family.stops or (family.eos,))[0]
        encoder = encoder_with(tokenizer, "chat", choices, end_of_turn=end, place=place)
    found = Verdict(
        "decision" if named else "served",
        end_of_turn=encoder.chat.end_string,
        end_is_named=named,
        date=choices.template_date is not None,
    )
    if encoder.undecided("flags") is None:
        return replace(found, outcomes=(Outcome("", *_chats(encoder, hf, choices)),))
    outcomes = tuple(_decided(encoder, hf, choice) for choice in choices_for(encoder.chat))
    return replace(found, verdict="decision", outcomes=outcomes)


def _end_is_clear(encoder: Encoder, family: Family) -> bool:
    """Whether adoption takes the end of turn, with the generation_config.json of the family."""
    with tempfile.TemporaryDirectory() as folder:
        ids = [encoder.tokenizer.encode(stop, special=True).ids[0] for stop in family.stops]
        Path(folder, "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        try:
            check_end_of_turn(encoder, Path(folder), Path("checkpoint"), named=False)
        except CheckpointError:
            return False
    return True


def _decided(encoder: Encoder, hf: PreTrainedTokenizerFast, choice: Choice) -> Outcome:
    variables: dict[str, JsonValue] = json.loads(json.dumps(choice.template_kwargs or {}))
    choices = replace(encoder.choices, template_kwargs=variables, response_prefix=choice.response_prefix)
    decided = Encoder(encoder.tokenizer, "chat", encoder.end_of_turn_id, choices=choices)
    flags = choice.typed("flags")
    if decided.undecided("flags") is not None:
        return Outcome(flags, dict.fromkeys(CHATS, REFUSED), dict.fromkeys(CHATS, "undecided with its own decision"))
    return Outcome(flags, *_chats(decided, hf, choices))


def _chats(
    encoder: Encoder, hf: PreTrainedTokenizerFast, choices: TemplateChoices
) -> tuple[dict[str, str], dict[str, str]]:
    reasons: dict[str, str] = {}
    found = {name: _compared(encoder, hf, choices, name, reasons) for name in CHATS}
    return found, reasons


def _compared(
    encoder: Encoder, hf: PreTrainedTokenizerFast, choices: TemplateChoices, name: str, reasons: dict[str, str]
) -> str:
    chat = CHATS[name]
    try:
        encoded = encoder.conversation(chat.messages, add_eos=encoder.end_of_turn_id is not None, tools=chat.tools)
    except RequestError as error:
        reasons[name] = str(error)
        return REFUSED
    prompt = encoded.prompt_P.tolist()
    is_prompt = choices.response_prefix == ""  # a response is all that a model writes: only its prompt is compared
    texts = own_texts(hf, chat, choices.template_kwargs, prompt=is_prompt)
    ours = [*prompt, *encoded.responses[0].ids_T.tolist()]
    if is_prompt:
        right = any(list(hf(text, add_special_tokens=False)["input_ids"]) == prompt for text in texts)
    else:
        right = any(is_own(hf, text, ours) for text in texts)
    return NO_RENDERING if not texts else EQUAL if right else DIFFERENT
