"""Makes the pair of a shape: random weights, seeded, stored in bfloat16, with a tokenizer that knows every id.

`python -m bench.speed.models SHAPE FOLDER` in a process of its own, whose memory is free again afterwards.
"""

import shutil
import sys
from pathlib import Path

import torch
from dense_reward.checkpoints.probe import probe_of_texts
from dense_reward.checkpoints.write_manifest import Facts, seal
from dense_reward.manifest import MANIFEST_NAME, Role
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from bench.speed.shapes import SHAPES, Shape

ROLES: tuple[Role, ...] = ("sft", "reference")
EOS, PAD = "<eos>", "<pad>"


def main() -> None:
    shape, folder = sys.argv[1:]
    for seed, role in enumerate(ROLES):
        make(SHAPES[shape], Path(folder) / role, role, seed)


def make(shape: Shape, folder: Path, role: Role, seed: int) -> None:
    """A checkpoint as the trainer leaves it; one that is complete is taken as it is."""
    if (folder / MANIFEST_NAME).exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    with torch.device(device):
        AutoModelForCausalLM.from_config(configuration(shape), dtype=torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder, shape.vocabulary)
    facts = Facts(role=role, run_id="speed", renderer="plain", optimiser_step=2 - seed)
    seal(folder, facts, probe_of_texts, device=device)


def configuration(shape: Shape) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=32_768,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=257,
    )


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """An id for each byte, two specials, and pieces that no text becomes, up to the size of the vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, EOS, PAD, *(f"piece{i}" for i in range(len(alphabet) + 2, vocabulary))]
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([EOS, PAD])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=PAD).save_pretrained(folder)


if __name__ == "__main__":
    main()
