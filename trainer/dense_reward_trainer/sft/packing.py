"""Packs demonstrations into rows without padding, and tests that a model computes each of them as if it were alone.

TRL packs (best fit decreasing) and lets position ids restart; nothing is ever cut, because no demonstration is longer
than a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset, disable_progress_bars
from dense_reward.engines.torch.packing_check import TOLERANCE_NATS, proxy_model
from transformers import PreTrainedConfig, PreTrainedModel
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from dense_reward_trainer.errors import ConfigError

_LENGTHS = (19, 5, 23, 11)
"""Tokens of the test's sequences: some are longer than the window of the proxy model."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedRows:
    """Rows as the trainer reads them, and for each row the number of its demonstrations."""

    dataset: Dataset
    samples: tuple[int, ...]


def packed_rows(rows: Dataset, max_tokens: int) -> PackedRows:
    """Joins rows of `input_ids` and `labels`, each of at most `max_tokens`, into rows of at most `max_tokens`."""
    disable_progress_bars()
    dataset = pack_dataset(rows, max_tokens, "bfd", {"batch_size": len(rows), "keep_in_memory": True})
    samples = tuple(len(lengths) for lengths in dataset["seq_lengths"])
    if sum(samples) != len(rows):
        raise RuntimeError(f"TRL packed {sum(samples)} of {len(rows)} demonstrations")
    return PackedRows(dataset, samples)


def check_packing(config: PreTrainedConfig) -> None:
    """Raises ConfigError if a model of this architecture computes a packed demonstration differently from a lone one.

    Some models ignore position ids, or carry a state from one demonstration to the next; their loss would look normal.
    """
    reason = _difference(config)
    if reason is not None:
        raise ConfigError(f"packing: {reason}, so demonstrations in one row would change each other: set packing=false")


def _difference(config: PreTrainedConfig) -> str | None:
    """Why this architecture cannot train on packed rows, from an experiment on a small model of it; None if it can."""
    try:
        model = proxy_model(config).eval()
        generator = torch.Generator().manual_seed(0)
        vocab_size = model.config.get_text_config().vocab_size
        sequences = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in _LENGTHS]
        alone = torch.cat([_logprobs(model, [ids]) for ids in sequences])
        off = float((_logprobs(model, sequences) - alone).abs().max())
    except Exception as error:  # an architecture can break anything here; it trains without packing
        return f"{config.model_type} cannot be tested ({type(error).__name__}: {' '.join(str(error).split())})"
    if off <= TOLERANCE_NATS:
        return None
    return f"log-probs of {config.model_type} change by {off:.2g} nats in a packed row"


def _logprobs(model: PreTrainedModel, sequences: Sequence[list[int]]) -> torch.Tensor:
    """Log-probs of all ids that follow each position, [tokens, vocabulary], of sequences packed into one row."""
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    row = [token for ids in sequences for token in ids]
    lengths = [len(ids) for ids in sequences]
    inputs = collate([{"input_ids": row, "labels": row, "seq_lengths": lengths}])
    inputs.pop("labels")
    with torch.no_grad():
        logits_TV = model(**inputs, use_cache=False).logits[0]
    return torch.log_softmax(logits_TV.double(), dim=1)
