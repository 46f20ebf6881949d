"""The checkpoint that self-play starts from, without its weights: encoder and limits; and the demonstrations."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from dense_reward.engines.proof import encoder_of
from dense_reward.engines.tokenizer import load_tokenizer
from dense_reward.engines.torch.architecture import load_config
from dense_reward.engines.torch.weights import weight_folders
from dense_reward.errors import CheckpointError
from dense_reward.manifest import Manifest, load_manifest
from dense_reward.records import Report
from dense_reward.text.encode import Encoder
from transformers import AutoModelForCausalLM

from dense_reward_trainer.configs.irft import IrftConfig
from dense_reward_trainer.data.sources import DataError, load, split
from dense_reward_trainer.data.tokenised import TokenisedRow, encode_demonstrations
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.rl.prompts import check_room
from dense_reward_trainer.runs.progress import busy
from dense_reward_trainer.sft.memory_check import adapter_parameters


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """A checkpoint. `vocab_size`: ids of the tokenizer. `limit_tokens`: of a prompt with its response."""

    folder: Path
    manifest: Manifest
    encoder: Encoder
    end_of_turn_id: int
    vocab_size: int
    limit_tokens: int


def read_start(config: IrftConfig) -> Start:
    """Reads the checkpoint without its weights. Raises CheckpointError or ConfigError, naming the cure."""
    folder = config.policy
    manifest = load_manifest(folder)
    if manifest.end_of_turn_id is None:
        raise CheckpointError(f"{folder}: its tokenizer has no end of turn, so no response could ever finish")
    files, weights = weight_folders(folder, manifest)
    tokenizer = load_tokenizer(files)
    encoder = encoder_of(tokenizer, manifest, folder)
    undecided = encoder.undecided("flags")
    if undecided is not None:
        raise CheckpointError(f"{folder}: {undecided}")
    model_config = load_config(weights)
    if config.lora is not None:  # before anything is generated
        adapter_parameters(lambda: AutoModelForCausalLM.from_config(deepcopy(model_config)), config.lora)
    own = int(getattr(model_config.get_text_config(), "max_position_embeddings", None) or 1 << 20)
    if config.max_length_tokens is not None and config.max_length_tokens > own:
        raise ConfigError(
            f"max_length_tokens is {config.max_length_tokens}, but the model takes at most {own}: "
            f"set max_length_tokens to {own}, or to null, which takes the model's limit"
        )
    vocab_size = min(tokenizer.vocab_size, manifest.vocabulary)
    limit_tokens = config.max_length_tokens or own
    return Start(folder, manifest, encoder, manifest.end_of_turn_id, vocab_size, limit_tokens)


def training_rows(
    config: IrftConfig, start: Start, report: Report
) -> tuple[Sequence[TokenisedRow], Sequence[TokenisedRow]]:
    """Demonstrations to train on, and those that are held out. Raises DataError, naming file and line."""
    with busy(f"reading {config.data.source}"):
        loaded = load(config.data)
    report(loaded.summary)
    parts = split(loaded.demonstrations, config.data.held_out_fraction, config.data.seed)
    with busy(f"encoding {len(loaded.demonstrations)} demonstrations"):
        train, held_out = (
            encode_demonstrations(
                side,
                start.encoder,
                every_turn=False,
                limit_tokens=start.limit_tokens,
                skip_bad=config.data.skip_bad,
            )
            for side in (parts.train, parts.held_out)
        )
    rows = _with_room(config, start, train.rows)
    left_out = len(train.dropped) + len(train.rows) - len(rows)
    if left_out:
        first = f", the first is {train.dropped[0]}" if train.dropped else ""
        report(f"left out {left_out} demonstrations that the template refuses, or that are too long{first}")
    if not rows:
        raise DataError(
            f"{config.data.source}: no demonstration is left to train on: give more rows, raise max_length_tokens "
            "if rows were left out, or lower held_out_fraction"
        )
    return rows, held_out.rows


def _with_room(config: IrftConfig, start: Start, rows: Sequence[TokenisedRow]) -> Sequence[TokenisedRow]:
    """The rows whose prompt leaves room for an answer. Raises DataError if one does not, unless skip_bad."""
    room = config.generation.max_new_tokens
    fitting = [row for row in rows if len(row.encoded.prompt_P) + room <= start.limit_tokens]
    if not config.data.skip_bad:
        cure = "or add --skip-bad to the command" if fitting else "or shorten the prompts"
        check_room(rows, start.limit_tokens, room, "generation.max_new_tokens", cure)
    return fitting
