"""Pairs of small models that have lower layers in common, and what tests of sharing compare and count."""

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields

import numpy as np
import torch
from dense_reward.engines.torch.model import TorchModel
from dense_reward.records import Scores, TokenScores, Wants
from tiny_configs import VOCABULARY
from tiny_models import random_trunk
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

ALL = Wants(kl=True, entropy=True, varentropy=True, top_k=3)
TRUNKS = [random_trunk(seed, 6, (8, 3, 14), masked=seed > 1, k=2) for seed in range(4)]
LAYERS = 4


def llama(layers: int = LAYERS, **changes: object) -> PreTrainedModel:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **sizes, **changes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def changed(model: PreTrainedModel, parts: Iterable[str], seed: int = 0) -> PreTrainedModel:
    """A copy with other numbers in the parameters whose names contain one of the parts."""
    other, random = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if any(part in name for part in parts):
                parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.1)
    return other


def upper(first: int, layers: int = LAYERS) -> list[str]:
    return [f".{place}." for place in range(first, layers)]


def decoder_layers(model: TorchModel) -> list[torch.nn.Module]:
    return list(model.transformers_model.model.layers)


def counted(models: Sequence[TorchModel]) -> Counter[tuple[int, int]]:
    """Counts the attentions of each layer that are computed from now on, by model and layer."""
    computed: Counter[tuple[int, int]] = Counter()
    for which, model in enumerate(models):
        for place, layer in enumerate(decoder_layers(model)):
            at = which, place
            layer.self_attn.register_forward_pre_hook(lambda *_, at=at: computed.update([at]))  # type: ignore[union-attr]
    return computed


def assert_same_bits(found: Scores, expected: Scores) -> None:
    flat = [[scores for of_trunk in each for scores in of_trunk] for each in (found, expected)]
    for a, b in zip(*flat, strict=True):
        for column in fields(TokenScores):
            assert np.array_equal(getattr(a, column.name), getattr(b, column.name)), column.name
