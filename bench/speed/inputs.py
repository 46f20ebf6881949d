"""Makes inputs of the benchmark: a shape's two checkpoints, and gsm8k_lengths.json.

`python -m bench.speed.inputs SHAPE FOLDER` makes the checkpoints in a separate process, so that its memory is free
afterwards.
"""

import json
import random
import shutil
import sys
from pathlib import Path

import torch
from dense_reward.checkpoints.probe import probe_of_texts
from dense_reward.checkpoints.write_manifest import ManifestFacts, write_manifest
from dense_reward.hashed_files import MANIFEST_NAME
from dense_reward.manifest import Role
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from bench.speed.workload import LENGTHS_FILE, SHAPES, Shape

ROLES: tuple[Role, ...] = ("sft", "reference")
EOS, PAD = "<eos>", "<pad>"
PAIRS, SEED, VOCABULARY = 32, 0, 32_000
NOTE = (
    "[prompt, solution] lengths in tokens of {pairs} problems drawn without replacement (random.Random({seed})) from "
    "the {problems} of GSM8K's training split; tokens of a byte-level BPE of at most {vocabulary} entries, trained on "
    "all of its questions and answers. Made by `python -m bench.speed lengths FILE`."
)


def main() -> None:
    shape, folder = sys.argv[1:]
    for seed, role in enumerate(ROLES):
        make_checkpoint(SHAPES[shape], Path(folder) / role, role, seed)


def make_checkpoint(shape: Shape, folder: Path, role: Role, seed: int) -> None:
    """Makes a checkpoint like the trainer's: seeded random weights in bfloat16. Keeps one that is complete."""
    if (folder / MANIFEST_NAME).exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    with torch.device(device):
        AutoModelForCausalLM.from_config(configuration(shape), dtype=torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder, shape.vocab_size)
    facts = ManifestFacts(role=role, run_id="speed", renderer="plain", optimiser_step=2 - seed)
    write_manifest(folder, facts, probe_of_texts, device=device)


def configuration(shape: Shape) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=32_768,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=257,
    )


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Writes a tokenizer that has every id: the bytes, two special tokens, and filler tokens that no text produces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, EOS, PAD, *(f"piece{i}" for i in range(len(alphabet) + 2, vocab_size))]
    backend = _byte_level(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    backend.add_special_tokens([EOS, PAD])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=PAD).save_pretrained(folder)


def make_lengths(source: Path, target: Path = LENGTHS_FILE) -> None:
    """Writes lengths of prompts and solutions, without their text.

    `source` is GSM8K's training file: a JSON line of question and answer for each problem.
    """
    problems = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    tokenizer = _trained([problem[part] for problem in problems for part in ("question", "answer")])
    drawn = random.Random(SEED).sample(problems, PAIRS)
    pairs = [[len(tokenizer.encode(problem[part]).ids) for part in ("question", "answer")] for problem in drawn]
    note = NOTE.format(pairs=PAIRS, seed=SEED, problems=len(problems), vocabulary=VOCABULARY)
    target.write_text(f'{{\n  "note": {json.dumps(note)},\n  "pairs": {json.dumps(pairs)}\n}}\n')


def _trained(texts: list[str]) -> Tokenizer:
    tokenizer = _byte_level(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


if __name__ == "__main__":
    main()
