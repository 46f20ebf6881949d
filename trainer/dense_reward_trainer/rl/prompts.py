"""The prompts that a policy is trained and measured on, as token ids. Must not know rewards or jobs."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from dense_reward.records import IdArray, Report
from dense_reward.text.encode import Encoder

from dense_reward_trainer.configs.dpr import DprConfig
from dense_reward_trainer.data.sources import NO_SKIP, DataError, DataSource, Demonstration, load, split
from dense_reward_trainer.data.tokenised import TokenisedRow, encode_demonstrations
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.rl.policy import PolicyCheckpoint
from dense_reward_trainer.runs.progress import busy

Prompt = TypeVar("Prompt")


def prompts_and_held_out(
    config: DprConfig, checkpoint: PolicyCheckpoint, report: Report
) -> tuple[Sequence[IdArray], Sequence[TokenisedRow]]:
    """Prompts to train on, and rows to measure on. Raises DataError, also if they share a prompt."""
    encoder, limit_tokens = checkpoint.encoder, checkpoint.policy.limit_tokens
    prompts = training_prompts(config.prompts, encoder, limit_tokens, config.max_new_tokens, report)
    if config.held_out is None:
        return prompts, ()
    held_out = held_out_rows(config.held_out, encoder, limit_tokens, config.held_out_options.max_new_tokens, report)
    check_disjoint(prompts, held_out)
    return prompts, held_out


def training_prompts(
    source: DataSource, encoder: Encoder, limit_tokens: int, max_new_tokens: int, report: Report
) -> list[IdArray]:
    """The prompts on the training side of a source, in its order, each once.

    Raises DataError if one leaves no room for `max_new_tokens` (unless `skip_bad`), or if none is left.
    """
    with busy(f"reading {source.source}"):
        loaded = load(source, prompts_only=True)
    report(loaded.summary)
    demonstrations = split(loaded.demonstrations, source.held_out_fraction, source.seed).train
    with busy(f"encoding {len(demonstrations)} prompts"):
        encoded = encode_demonstrations(
            demonstrations, encoder, every_turn=False, limit_tokens=limit_tokens, skip_bad=source.skip_bad
        )
    fitting = [row for row in encoded.rows if len(row.encoded.prompt_P) + max_new_tokens <= limit_tokens]
    if not source.skip_bad:
        cure = "or add --skip-bad to the command" if fitting else "or shorten the prompts"
        check_room(encoded.rows, limit_tokens, max_new_tokens, "max_new_tokens", cure)
    left_out = len(encoded.dropped) + len(encoded.rows) - len(fitting)
    if left_out:
        report(f"{source.source}: left out {left_out} lines that the template refuses, or that are too long")
    prompts = {row.encoded.prompt_P.tobytes(): row.encoded.prompt_P for row in fitting}
    if not prompts:
        raise DataError(f"{source.source}: no prompt is left to train on")
    return list(prompts.values())


def held_out_rows(
    path: Path, encoder: Encoder, limit_tokens: int, max_new_tokens: int, report: Report
) -> Sequence[TokenisedRow]:
    """All demonstrations of a file. Raises DataError if one is bad or leaves no room for `max_new_tokens`."""
    return encoded_held_out(load_held_out(path, report), encoder, limit_tokens, max_new_tokens)


def load_held_out(path: Path, report: Report) -> Sequence[Demonstration]:
    """All demonstrations of a file. Raises DataError if it is missing, or a row is bad."""
    if path.suffix and not path.exists():
        raise DataError(f"held_out is {path}, but there is no such file: name held_out.jsonl of the SFT run")
    loaded = load(DataSource(source=str(path), held_out_fraction=0.0), cure=NO_SKIP)
    report(loaded.summary)
    return loaded.demonstrations


def encoded_held_out(
    demonstrations: Sequence[Demonstration], encoder: Encoder, limit_tokens: int, max_new_tokens: int
) -> Sequence[TokenisedRow]:
    """The demonstrations as ids. Raises DataError if one leaves no room for `max_new_tokens`."""
    rows = encode_demonstrations(
        demonstrations, encoder, every_turn=False, limit_tokens=limit_tokens, skip_bad=False, cure=NO_SKIP
    ).rows
    check_room(rows, limit_tokens, max_new_tokens, "held_out_options.max_new_tokens", "or remove such prompts")
    return rows


def check_room(rows: Sequence[TokenisedRow], limit_tokens: int, max_new_tokens: int, name: str, cure: str) -> None:
    """Raises DataError, naming the longest prompt, if it leaves no room for `max_new_tokens` below `limit_tokens`.

    `name`: the option that sets `max_new_tokens`. `cure`: what else the user can do.
    """
    longest = max(rows, key=lambda row: len(row.encoded.prompt_P), default=None)
    if longest is not None and len(longest.encoded.prompt_P) + max_new_tokens > limit_tokens:
        source, length = longest.demonstration.source, len(longest.encoded.prompt_P)
        raise DataError(
            f"{source}: its prompt has {length} tokens; with {name} {max_new_tokens} that is over "
            f"the limit of {limit_tokens}: set {name} to at most {limit_tokens - length}, {cure}"
        )


def check_room_at_service(limit_tokens: int, prompts: Sequence[IdArray], max_new_tokens: int) -> None:
    """Raises JobError if a prompt with its response could be longer than the service's limit."""
    longest = max(len(prompt) for prompt in prompts) + max_new_tokens
    if longest > limit_tokens:
        raise JobError(
            f"rollouts can have {longest} tokens with their prompts, the reward service takes {limit_tokens}: lower "
            "max_new_tokens, or raise the service's --max-length-tokens"
        )


def check_disjoint(prompts: Sequence[IdArray], held_out: Sequence[TokenisedRow]) -> None:
    """Raises DataError if a held-out prompt is trained on."""
    trained = {prompt.tobytes() for prompt in prompts}
    shared = [row for row in held_out if row.encoded.prompt_P.tobytes() in trained]
    if shared:
        raise DataError(
            f"{len(shared)} of {len(held_out)} held-out prompts are also trained on, the first is "
            f"{shared[0].demonstration.source}: give prompts the data settings (held_out_fraction, seed) of the SFT run"
        )


def prompts_of_step(prompts: Sequence[Prompt], step: int, count: int, seed: int) -> list[Prompt]:
    """The `count` prompts of step 1, 2, ...: epoch after epoch, each epoch in its own order, which `seed` decides."""
    places = range((step - 1) * count, step * count)
    orders = {epoch: _order(len(prompts), seed, epoch) for epoch in {place // len(prompts) for place in places}}
    return [prompts[orders[place // len(prompts)][place % len(prompts)]] for place in places]


def prompts_sha256(prompts: Sequence[IdArray]) -> str:
    """Hash of the prompts in their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(len(prompt).to_bytes(8, "little") + prompt.astype("<i4").tobytes())
    return digest.hexdigest()


def _order(count: int, seed: int, epoch: int) -> list[int]:
    return [int(i) for i in np.random.default_rng([seed, epoch]).permutation(count)]
