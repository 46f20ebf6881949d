"""Writes the end of turn into a checkpoint's files, so that `generate`, vLLM and other engines stop at it."""

import copy
from pathlib import Path

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

CHATS: tuple[list[dict[str, str]], ...] = tuple(
    [{"role": role, "content": text} for role, text in zip(roles, ("one", "two", "three", "four"), strict=False)]
    for roles in (("user",), ("user", "assistant"), ("user", "assistant", "user"), ("system", "user", "assistant"))
)


def tokenizer_with_end(tokenizer: PreTrainedTokenizerBase, end_of_turn_id: int | None) -> PreTrainedTokenizerBase:
    """The tokenizer with this EOS. Unchanged if its chat template would then render another text."""
    if end_of_turn_id is None or tokenizer.eos_token_id == end_of_turn_id:
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    changed.eos_token = tokenizer.convert_ids_to_tokens(end_of_turn_id)
    return changed if _renderings(changed) == _renderings(tokenizer) else tokenizer


def set_model_end(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end_of_turn_id: int | None) -> None:
    """Make the end of turn the model's EOS, and the first id at which generation stops, before those of its base.

    It does not become the padding too, unless it is the tokenizer's: a trainer would leave padding out of the loss.
    """
    if end_of_turn_id is None:
        return
    config = model.config.get_text_config()
    generation: GenerationConfig | None = getattr(model, "generation_config", None)
    present = [*_ids(None if generation is None else generation.eos_token_id), *_ids(config.eos_token_id)]
    if generation is not None:
        generation.eos_token_id = list(dict.fromkeys([end_of_turn_id, *present]))
    config.eos_token_id = end_of_turn_id
    for settings in (config, generation):
        if settings is not None and settings.pad_token_id == end_of_turn_id != tokenizer.pad_token_id:
            settings.pad_token_id = tokenizer.pad_token_id


def write_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """For an adapter, whose own files hold no configuration of generation."""
    generation: GenerationConfig | None = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)


def _ids(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _renderings(tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    """The texts of some chats; None for each that the template refuses."""
    if tokenizer.chat_template is None:
        return []
    return [_rendering(tokenizer, chat, generation) for chat in CHATS for generation in (False, True)]


def _rendering(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]], generation: bool) -> str | None:
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation))
    except (TemplateError, AttributeError, LookupError, TypeError, ValueError):
        return None
