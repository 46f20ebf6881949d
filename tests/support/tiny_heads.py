"""Tiny token heads on disk, and their values by transformers' own forward, one text at a time."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from dense_reward.checkpoints.probe import probe_of_texts
from dense_reward.checkpoints.write_manifest import ManifestFacts, write_manifest
from dense_reward.engines.torch.weights import plain_attention
from dense_reward.manifest import Manifest
from dense_reward.text.tokenizer import RendererName
from tiny_configs import CONFIGS
from tiny_models import CHAT, write_tokenizer
from transformers import AutoModelForSequenceClassification, PreTrainedModel

ENLARGED = 8.0


def tiny_head(architecture: str = "llama", *, seed: int = 0, labels: int = 1) -> PreTrainedModel:
    """A reward model in float32 whose values spread over units, by enlarged random weights."""
    torch.manual_seed(seed)
    config = deepcopy(CONFIGS[architecture])
    config.num_labels = labels
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=plain_attention(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(ENLARGED)
    return model


def write_files(folder: Path, model: PreTrainedModel, renderer: RendererName = "plain") -> None:
    """Weights and tokenizer, without a manifest."""
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    write_tokenizer(folder, template=CHAT if renderer == "chat" else None)


def write_head(
    folder: Path, architecture: str = "llama", *, seed: int = 0, renderer: RendererName = "plain"
) -> Manifest:
    """A token head with its manifest and probe."""
    write_files(folder, tiny_head(architecture, seed=seed), renderer)
    return write_manifest(folder, ManifestFacts(role="token_head", run_id="run", renderer=renderer), probe_of_texts)


@torch.inference_mode()
def values_of_prefixes(folder: Path, prompt: Sequence[int], response: Sequence[int]) -> list[float]:
    """For each token of a response, transformers' own score of the text that ends with it."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [*prompt, *response]
    ends = range(len(prompt) + 1, len(ids) + 1)
    return [float(model(input_ids=torch.tensor([ids[:end]]), use_cache=False).logits[0, 0]) for end in ends]
