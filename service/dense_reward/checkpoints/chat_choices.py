"""What a user decides about a checkpoint's chat template, checked against the template: for adoption and for SFT."""

from collections.abc import Mapping
from datetime import date
from pathlib import Path

from pydantic import JsonValue

from dense_reward.checkpoints.turn_ends import turn_ends, unclear_end
from dense_reward.engines.tokenizer import TransformersTokenizer
from dense_reward.errors import CheckpointError, RequestError
from dense_reward.text.encode import Encoder
from dense_reward.text.template import TemplateChoices
from dense_reward.text.tokenizer import RendererName


def checked_choices(
    tokenizer: TransformersTokenizer,
    renderer: RendererName,
    template_kwargs: Mapping[str, JsonValue] | None,
    response_prefix: str | None,
    template_date: str | None,
) -> TemplateChoices:
    """The choices, with today's date if the template asks for one and none is given.

    Raises CheckpointError for a variable that the template does not read, or a date that is none; also for any choice
    if the renderer is not chat.
    """
    given = {
        "template_kwargs": template_kwargs or None,
        "response_prefix": response_prefix,
        "template_date": template_date,
    }
    if renderer != "chat":
        unused = [name for name, value in given.items() if value is not None]
        if unused:
            raise CheckpointError(f"{unused[0]} is for chat templates, but the renderer is {renderer}: leave it out")
        return TemplateChoices()
    variables = tokenizer.template_variables
    unknown = sorted((template_kwargs or {}).keys() - variables)
    if unknown:
        known = f"it reads {', '.join(sorted(variables))}" if variables else "it reads none"
        raise CheckpointError(f"template_kwargs: the chat template reads no variable {unknown[0]!r}; {known}")
    if template_date is not None:
        _check_date(template_date)
    elif tokenizer.asks_for_the_date:
        template_date = date.today().isoformat()  # noqa: DTZ011 - the user's day, as a template writes it
    return TemplateChoices(dict(template_kwargs or {}), response_prefix, template_date)


def encoder_with(
    tokenizer: TransformersTokenizer,
    renderer: RendererName,
    choices: TemplateChoices,
    *,
    end_of_turn: str | int | None,
    place: Path,
) -> Encoder:
    """The encoder of a checkpoint in `place`. `end_of_turn` is a token or its id, None: the template's, else the EOS.

    Raises CheckpointError if the template cannot render a chat, or `end_of_turn` is not one token.
    """
    try:
        encoder = Encoder.of(tokenizer, renderer, choices)
    except RequestError as error:
        raise CheckpointError(
            f"{place}: {error}: correct the template (chat_template.jinja), or adopt with --renderer plain (in a "
            "configuration, renderer: plain)"
        ) from None
    if end_of_turn is None:
        return encoder
    end_id = end_of_turn if isinstance(end_of_turn, int) else _token_id(tokenizer, end_of_turn)
    return Encoder(tokenizer, renderer, end_id, choices=choices)


def check_end_of_turn(encoder: Encoder, weights: Path, place: Path, *, named: bool) -> None:
    """`named`: the user has named the end of turn.

    Raises CheckpointError if it is not named, and template, tokenizer and generation_config.json disagree.
    """
    if encoder.renderer == "chat" and not named:
        ends = turn_ends(encoder, weights)
        if not ends.agree:
            raise unclear_end(ends, encoder, str(place), "--end-of-turn TOKEN")


def _check_date(text: str) -> None:
    try:
        date.fromisoformat(text)
    except ValueError:
        raise CheckpointError(f"template_date is {text!r}, which is not a date: write it as YYYY-MM-DD") from None


def _token_id(tokenizer: TransformersTokenizer, token: str) -> int:
    ids = tokenizer.encode(token, special=True).ids
    if len(ids) != 1:
        raise CheckpointError(f"the end of turn must be one token, but {token!r} is {len(ids)}")
    return ids[0]
