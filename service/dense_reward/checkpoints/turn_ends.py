"""The tokens that end a turn by a checkpoint's template, tokenizer and generation_config.json; they can disagree."""

from dataclasses import dataclass
from pathlib import Path

from dense_reward.engines.weight_files import read_json
from dense_reward.errors import CheckpointError
from dense_reward.text.encode import Encoder

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True, slots=True)
class TurnEnds:
    """The ids that each source names. `written_ids`: everything that the template writes after a response."""

    template_id: int | None
    written_ids: tuple[int, ...]
    tokenizer_id: int | None
    generation_ids: tuple[int, ...]

    @property
    def other_ids(self) -> frozenset[int]:
        """The ends that the tokenizer and generation_config.json name."""
        return frozenset({*self.generation_ids, *({self.tokenizer_id} - {None})})  # type: ignore[arg-type]

    @property
    def agree(self) -> bool:
        """Whether the template's end of turn is also an end for the tokenizer or generation_config.json."""
        return self.template_id is not None and self.template_id in self.other_ids

    @property
    def is_a_base_models(self) -> bool:
        """Whether the template has an end of its own and never writes the others: those end a base model's texts."""
        return self.template_id is not None and not self.other_ids & set(self.written_ids)


def turn_ends(encoder: Encoder, weights: Path) -> TurnEnds:
    """`weights`: the folder of the model, or of an adapter's base model. The encoder's renderer must be chat."""
    template_id, written_ids = encoder.chat.own_end()
    return TurnEnds(template_id, written_ids, encoder.tokenizer.eos_id, generation_eos_ids(weights))


def generation_eos_ids(folder: Path) -> tuple[int, ...]:
    """The ids at which `generate` and other engines stop. Raises CheckpointError if the file cannot be read."""
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return ()
    found = read_json(path).get("eos_token_id")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    for one in ids:
        if not isinstance(one, int) or isinstance(one, bool) or one < 0:
            raise CheckpointError(
                f"{path}: eos_token_id is {found!r}, not an id or a list of ids: correct or remove it"
            )
    return tuple(ids)


def unclear_end(ends: TurnEnds, encoder: Encoder, place: str, cure: str) -> CheckpointError:
    """The refusal of a checkpoint whose end of turn must be named. Returns the error and does not raise it."""
    said = [
        f"the chat template writes {_shown(encoder, ends.template_id)} after a response",
        f"the tokenizer's eos_token is {_shown(encoder, ends.tokenizer_id)}",
        f"{GENERATION_CONFIG} stops at {', '.join(_shown(encoder, i) for i in ends.generation_ids) or 'nothing'}",
    ]
    return CheckpointError(f"{place}: what ends a turn is not clear: {'; '.join(said)}. Name it: {cure}")


def _shown(encoder: Encoder, token: int | None) -> str:
    return "no special token" if token is None else repr(encoder.tokenizer.pieces([token])[0])
