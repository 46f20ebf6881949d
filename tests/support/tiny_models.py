"""Tiny random models of many architectures, and whole checkpoints of them on disk.

Weights are enlarged, so that log-probs spread over nats: a model with default weights gives nearly the same log-prob to
every token, which hides mistakes.
"""

import shutil
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from dense_reward.checkpoints.probe import probe_of_texts
from dense_reward.checkpoints.write_manifest import ManifestFacts, write_manifest
from dense_reward.engines.torch.weights import plain_attention
from dense_reward.manifest import Manifest, Role
from dense_reward.records import Branch, IdArray, Trunk
from dense_reward.text.tokenizer import RendererName
from tiny_configs import CONFIGS, SPECIALS, VOCABULARY
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

CHAT = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ENLARGED = 16.0  # factor on all matrices
ENLARGED_LESS = {"minicpm3": 10.0, "hyperclovax": 10.0}  # their logits grow faster, and so does rounding


def tiny_model(name: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A model whose log-probs spread over nats."""
    torch.manual_seed(seed)
    exact = {"experts_implementation": "eager"} if dtype is torch.float64 else {}
    config = deepcopy(CONFIGS[name])
    attention = plain_attention(config)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention, **exact).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(ENLARGED_LESS.get(name, ENLARGED))
    return model


def plain_logprobs(model: PreTrainedModel, prompt: IdArray, response: IdArray) -> Tensor:
    """Log-probs over the vocabulary before each token of the response, [T, V], by one forward of one sequence."""
    ids_1L = torch.from_numpy(np.concatenate([prompt, response])).long()[None]
    with torch.inference_mode():
        logits_LV: Tensor = model(input_ids=ids_1L, use_cache=False).logits[0]
    return torch.log_softmax(logits_LV[len(prompt) - 1 : -1].double(), dim=-1)


def random_trunk(
    seed: int, prompt_tokens: int = 7, lengths: tuple[int, ...] = (5, 0, 11), *, masked: bool = False, k: int = 0
) -> Trunk:
    """A prompt with a branch of each length and `k` candidates a token; `masked`: about half of them are scored."""
    random = np.random.default_rng(seed)

    def ids(*shape: int) -> IdArray:
        return random.integers(0, VOCABULARY, shape).astype(np.int32)

    branches = []
    for length in lengths:
        scored = random.random(length) < 0.5 if masked else np.ones(length, dtype=bool)
        branches.append(Branch(ids(length), scored, ids(int(scored.sum()), k) if k else None))
    return Trunk(ids(prompt_tokens), tuple(branches))


def continued(first: Trunk, *turns: Trunk) -> list[Trunk]:
    """Later turns of a conversation: each prompt follows the prompt before it and the first response to that one."""
    found = [first]
    for turn in turns:
        prompt_P = np.concatenate([found[-1].prompt_P, found[-1].branches[0].ids_T, turn.prompt_P])
        found.append(Trunk(prompt_P, turn.branches))
    return found[1:]


def write_tokenizer(folder: Path, *, specials: tuple[str, ...] = SPECIALS, template: str | None = None) -> None:
    """Write a tokenizer with one id per byte, and the special tokens after them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(specials))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=specials[0], pad_token=specials[1])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def write_checkpoint(
    folder: Path,
    *,
    role: Role = "sft",
    run_id: str = "run",
    step: int | None = None,
    seed: int = 0,
    architecture: str = "llama",
    dtype: torch.dtype = torch.float32,
    specials: tuple[str, ...] = SPECIALS,
    renderer: RendererName = "plain",
) -> Manifest:
    """Write weights, tokenizer, and a manifest with a probe, as the trainer does."""
    folder.mkdir(parents=True)
    tiny_model(architecture, seed=seed, dtype=dtype).save_pretrained(folder)
    write_tokenizer(folder, specials=specials, template=CHAT if renderer == "chat" else None)
    return write_manifest(
        folder, ManifestFacts(role=role, run_id=run_id, renderer=renderer, optimiser_step=step), probe_of_texts
    )


def write_pair(folder: Path, architecture: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """Write an sft checkpoint and an earlier reference of the same run."""
    sft, reference = folder / "sft", folder / "reference"
    write_checkpoint(sft, role="sft", step=20, seed=1, architecture=architecture, dtype=dtype)
    write_checkpoint(reference, role="reference", step=10, seed=2, architecture=architecture, dtype=dtype)
    return sft, reference


def copy_pair(pair: tuple[Path, Path], folder: Path) -> tuple[Path, Path]:
    """A copy of a pair that a test can break."""
    sft, reference = folder / "sft", folder / "reference"
    shutil.copytree(pair[0], sft)
    shutil.copytree(pair[1], reference)
    return sft, reference
