"""Checkpoints whose answers have known probabilities, so that every figure of a preview can be computed by hand.

A model without attention: the next token depends only on the last one. After the last token of any prompt it answers
`1` or `2`, then it ends its turn.
"""

from collections.abc import Mapping
from math import log, sqrt
from pathlib import Path

import numpy as np
import torch
from dense_reward.checkpoints.probe import probe_of_texts
from dense_reward.checkpoints.write_manifest import ManifestFacts, write_manifest
from dense_reward.engines.tokenizer import load_tokenizer
from dense_reward.manifest import Role
from dense_reward.text.encode import Encoder
from tiny_models import write_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

NEVER = -20.0
"""The log-prob, up to a constant, of what is practically never sampled."""


def write_known_policy(folder: Path, one: float, *, role: Role = "sft", step: int = 20, positions: int = 64) -> None:
    """A checkpoint that answers `1` with probability `one`, and `2` otherwise; it reads `positions` tokens."""
    folder.mkdir(parents=True)
    write_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    encoder = Encoder.of(tokenizer, "plain")
    last = int(encoder.prompt("Q?")[-1])
    ids = {text: int(tokenizer.encode(text, special=False).ids[0]) for text in "12"}
    end = tokenizer.eos_id
    assert end is not None
    nexts = {last: {ids["1"]: one, ids["2"]: 1 - one}, ids["1"]: {end: 1.0}, ids["2"]: {end: 1.0}}
    model_of(nexts, tokenizer.vocab_size, positions).save_pretrained(folder)
    facts = ManifestFacts(role=role, run_id="known", renderer="plain", optimiser_step=step)
    write_manifest(folder, facts, probe_of_texts)


def model_of(nexts: Mapping[int, Mapping[int, float]], vocab_size: int, positions: int) -> LlamaForCausalLM:
    """A model with these probabilities of the next id, by last id; of other last ids, all are equal."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=vocab_size + vocab_size % 2,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    table_VH = np.zeros((vocab_size, config.hidden_size), dtype=np.float32)
    for last, probabilities in nexts.items():
        table_VH[:, last] = NEVER
        for following, probability in probabilities.items():
            table_VH[following, last] = log(probability)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight.copy_(torch.eye(vocab_size, config.hidden_size))
        # the last norm makes a one-hot state sqrt(hidden_size) times as long
        model.lm_head.weight.copy_(torch.from_numpy(table_VH) / sqrt(config.hidden_size))
    return model
