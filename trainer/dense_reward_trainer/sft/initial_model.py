"""The model that training starts from: a base model with its tokenizer, or random weights and a new tokenizer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from dense_reward.checkpoints.adopt import files_of_side_folder, locate
from dense_reward.checkpoints.write_manifest import default_renderer
from dense_reward.engines.tokenizer import TransformersTokenizer, adapted_tokenizer, read_tokenizer
from dense_reward.engines.torch.architecture import load_config
from dense_reward.engines.torch.weights import load_weights
from dense_reward.errors import CheckpointError
from dense_reward.text.encode import Encoder
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dense_reward_trainer.configs.sft import SftConfig
from dense_reward_trainer.data.sources import Demonstration
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.sft.chat import InitialFolder, training_encoder
from dense_reward_trainer.sft.from_scratch import random_model, train_tokenizer
from dense_reward_trainer.sft.quantised import QUANTISED, quantised_model


@dataclass(frozen=True, slots=True, eq=False)
class InitialModel:
    """A model to train, its tokenizer and its encoder.

    `base`: the folder of a base model, None for random weights. `notes`: what a user should know of the encoder.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    tokenizer_sha256: str
    base: Path | None
    limit_tokens: int
    notes: tuple[str, ...]


def initial_model_of(config: SftConfig, train: Sequence[Demonstration], pinned: Mapping[str, str]) -> InitialModel:
    """Loads or creates the model that `config` names. `pinned`: what an earlier start of the run has recorded.

    Raises CheckpointError or ConfigError, naming the cure.
    """
    if config.scratch is not None:
        tokenizer = train_tokenizer(_texts(train), config.scratch.vocabulary)
        model, base = random_model(config.scratch, tokenizer, config.seed), None
    else:
        named = locate(str(config.base_model)).folder
        base = InitialFolder(named, files_of_side_folder(named) or named)
        model, tokenizer = _load_base_model(base.files, config)
    text_to_ids = TransformersTokenizer(tokenizer) if base is None else adapted_tokenizer(tokenizer, base.files)
    renderer = config.renderer or ("plain" if base is None else default_renderer(text_to_ids, base.files))
    encoder, notes = training_encoder(config, text_to_ids, renderer, base, pinned)
    if config.lora is not None and config.lora.quantise is not None:
        notes = [*notes, QUANTISED]
    files = None if base is None else base.files
    limit_tokens = _limit_tokens(config, model)
    return InitialModel(model, tokenizer, encoder, text_to_ids.sha256(), files, limit_tokens, tuple(notes))


def _weights_dtype(config: SftConfig) -> torch.dtype:
    """bfloat16 only for frozen weights: a small fine-tuning step rounds to nothing in bfloat16."""
    return torch.bfloat16 if config.lora is not None and config.precision == "bfloat16" else torch.float32


def _load_base_model(folder: Path, config: SftConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder} is an adapter: merge it into its base model, and start from the merged model")
    load_config(folder)  # before the tokenizer, which reads config.json too
    tokenizer = read_tokenizer(folder)
    if config.lora is not None and config.lora.quantise is not None:
        return quantised_model(folder, _weights_dtype(config)), tokenizer
    return load_weights(folder, folder, _weights_dtype(config)), tokenizer


def _limit_tokens(config: SftConfig, model: PreTrainedModel) -> int:
    own = int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 20)
    if config.max_length_tokens is not None and config.max_length_tokens > own:
        raise ConfigError(
            f"max_length_tokens is {config.max_length_tokens}, but the model takes at most {own}: "
            f"set max_length_tokens to {own}, or to null, which takes the model's limit"
        )
    return config.max_length_tokens or own


def _texts(train: Sequence[Demonstration]) -> list[str]:
    return [message.content for demonstration in train for message in demonstration.messages]
