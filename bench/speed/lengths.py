"""Makes gsm8k_lengths.json from GSM8K's training file: how long prompts and solutions are, and nothing of their text.

`python -m bench.speed lengths FILE`, with a JSON line of question and answer for each problem.
"""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bench.speed.workloads import LENGTHS_FILE

PAIRS, SEED, VOCABULARY = 32, 0, 32_000
NOTE = (
    "[prompt, solution] lengths in tokens of {pairs} problems drawn without replacement (random.Random({seed})) from "
    "the {problems} of GSM8K's training split; tokens of a byte-level BPE of at most {vocabulary} entries, trained on "
    "all of its questions and answers. Made by `python -m bench.speed lengths FILE`."
)


def make(source: Path, target: Path = LENGTHS_FILE) -> None:
    problems = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    tokenizer = _trained([problem[part] for problem in problems for part in ("question", "answer")])
    drawn = random.Random(SEED).sample(problems, PAIRS)
    pairs = [[len(tokenizer.encode(problem[part]).ids) for part in ("question", "answer")] for problem in drawn]
    note = NOTE.format(pairs=PAIRS, seed=SEED, problems=len(problems), vocabulary=VOCABULARY)
    target.write_text(f'{{\n  "note": {json.dumps(note)},\n  "pairs": {json.dumps(pairs)}\n}}\n')


def _trained(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
