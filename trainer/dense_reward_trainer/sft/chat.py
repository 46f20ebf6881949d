"""How SFT renders its demonstrations: the encoder, with what the configuration decides about the chat template."""

from collections.abc import Mapping
from pathlib import Path

from dense_reward.checkpoints.chat_choices import checked_choices, encoder_with
from dense_reward.checkpoints.turn_ends import TurnEnds, turn_ends, unclear_end
from dense_reward.engines.tokenizer import TransformersTokenizer
from dense_reward.errors import CheckpointError
from dense_reward.text.encode import Encoder
from dense_reward.text.tokenizer import RendererName

from dense_reward_trainer.configs.sft import SftConfig

TEMPLATE_DATE = "template date"
"""Name under which a run pins the date, so that it is the same when the run is resumed on another day."""


def training_encoder(
    config: SftConfig,
    tokenizer: TransformersTokenizer,
    renderer: RendererName,
    base: Path | None,
    pinned: Mapping[str, str],
) -> tuple[Encoder, list[str]]:
    """The encoder of the run and of its checkpoints, and what a user should know of it, one line each.

    `base`: the folder of the base model. `pinned`: what an earlier start of the run has recorded. Raises
    CheckpointError, naming keys of the configuration, if it is not decided what a response stands after, or what ends
    a turn.
    """
    template_date = pinned.get(TEMPLATE_DATE) if config.template_date is None else config.template_date.isoformat()
    choices = checked_choices(tokenizer, renderer, config.template_kwargs, config.response_prefix, template_date)
    place = base or Path(config.output_dir)
    encoder = encoder_with(tokenizer, renderer, choices, end_of_turn=config.end_of_turn, place=place)
    lines: list[str] = []
    if renderer != "chat":
        return encoder, lines
    if base is not None and config.end_of_turn is None:
        lines += _end_of_turn(encoder, turn_ends(encoder, base), base)
    undecided = encoder.undecided("keys")
    if undecided is not None:
        raise CheckpointError(f"{place}: {undecided}")
    if choices.template_date is not None:
        lines.append(f"the chat template writes the date: it is {choices.template_date} in all checkpoints of the run")
    return encoder, lines


def _end_of_turn(encoder: Encoder, ends: TurnEnds, base: Path) -> list[str]:
    """A line if the run teaches an end of turn that the base model does not have. Raises CheckpointError."""
    if ends.agree:
        return []
    if not ends.is_a_base_models:
        raise unclear_end(ends, encoder, str(base), "end_of_turn=TOKEN")
    end = encoder.end_of_turn_id
    taught = "" if end is None else encoder.tokenizer.pieces([end])[0]
    return [f"the run teaches {taught!r}, the chat template's end of turn, which did not end the base model's texts"]
