"""How SFT renders its demonstrations: the encoder, with what the configuration decides about the chat template."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dense_reward.checkpoints.chat_choices import checked_choices, encoder_with
from dense_reward.checkpoints.kept import Wanted, differences_in_words, is_of
from dense_reward.checkpoints.turn_ends import TurnEnds, turn_ends, unclear_end
from dense_reward.engines.tokenizer import TransformersTokenizer
from dense_reward.errors import CheckpointError
from dense_reward.hashed_files import MANIFEST_NAME
from dense_reward.manifest import load_manifest
from dense_reward.text.encode import Encoder
from dense_reward.text.tokenizer import RendererName

from dense_reward_trainer.configs.sft import SftConfig

TEMPLATE_DATE = "template date"
"""Name under which a run pins the date, so that it is the same when the run is resumed on another day."""


@dataclass(frozen=True, slots=True)
class InitialFolder:
    """A base model: the folder that the configuration names, and that of its files; one folder in most cases."""

    named: Path
    files: Path


def training_encoder(
    config: SftConfig,
    tokenizer: TransformersTokenizer,
    renderer: RendererName,
    base: InitialFolder | None,
    pinned: Mapping[str, str],
) -> tuple[Encoder, list[str]]:
    """The encoder of the run and of its checkpoints, and what a user should know of it, one line each.

    `pinned`: what an earlier start of the run has recorded. The base model's manifest decides what the configuration
    leaves open. Raises CheckpointError, naming keys of the configuration, if it is not decided what precedes a response
    or what ends a turn.
    """
    chosen, lines = _chosen(config, tokenizer, renderer, base, pinned)
    choices = checked_choices(tokenizer, renderer, chosen.template_kwargs, chosen.response_prefix, chosen.template_date)
    place = Path(config.output_dir) if base is None else base.files
    encoder = encoder_with(tokenizer, renderer, choices, end_of_turn=chosen.end_of_turn, place=place)
    if renderer != "chat":
        return encoder, lines
    if base is not None and chosen.end_of_turn is None:
        lines += _end_of_turn(encoder, turn_ends(encoder, base.files), base.files)
    undecided = encoder.undecided("keys")
    if undecided is not None:
        raise CheckpointError(f"{place}: {undecided}")
    if choices.template_date is not None:
        lines.append(f"the chat template writes the date: it is {choices.template_date} in all checkpoints of the run")
    return encoder, lines


def _chosen(
    config: SftConfig,
    tokenizer: TransformersTokenizer,
    renderer: RendererName,
    base: InitialFolder | None,
    pinned: Mapping[str, str],
) -> tuple[Wanted, list[str]]:
    """The choices of the configuration, completed from the base model's manifest; a line that says so.

    Variables and response prefix are one decision: if the configuration gives either, the manifest's are not used.
    """
    date = pinned.get(TEMPLATE_DATE) if config.template_date is None else config.template_date.isoformat()
    given = Wanted(
        end_of_turn=config.end_of_turn,
        template_kwargs=config.template_kwargs,
        response_prefix=config.response_prefix,
        template_date=date,
    )
    if base is None or renderer != "chat" or not (base.named / MANIFEST_NAME).is_file():
        return given, []
    place = base.named / MANIFEST_NAME
    try:
        manifest = load_manifest(base.named)
    except CheckpointError:
        return given, [f"{place} is not a manifest of an adopted checkpoint: nothing is taken from it"]
    if not is_of(manifest, tokenizer, renderer):
        return given, [f"nothing is taken from {place}: its tokenizer, chat template or renderer differs"]
    chosen = given
    if given.template_kwargs is None and given.response_prefix is None:
        decided = manifest.choices
        chosen = replace(chosen, template_kwargs=decided.template_kwargs, response_prefix=decided.response_prefix)
    if given.template_date is None:
        chosen = replace(chosen, template_date=manifest.template_date)
    if given.end_of_turn is None:
        chosen = replace(chosen, end_of_turn=manifest.end_of_turn_id)
    taken = ", ".join(differences_in_words(given, chosen, tokenizer))
    return chosen, [f"as {place} decides: {taken} (other values for these keys change it)"] if taken else []


def _end_of_turn(encoder: Encoder, ends: TurnEnds, base: Path) -> list[str]:
    """A line if the run teaches an end of turn that the base model does not have. Raises CheckpointError."""
    if ends.agree:
        return []
    if not ends.is_a_base_models:
        raise unclear_end(ends, encoder, str(base), "end_of_turn=TOKEN")
    end = encoder.end_of_turn_id
    taught = "" if end is None else encoder.tokenizer.pieces([end])[0]
    return [f"the run teaches the chat template's end of turn {taught!r}, which did not end the base model's texts"]
