"""Generates a round's answers, by transformers or by vLLM, chunk by chunk; each chunk has its own seed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from dense_reward.engines.torch.device import chosen_device
from dense_reward.manifest import files_folder, load_manifest
from dense_reward.records import IdArray

from dense_reward_trainer.configs.irft import GenerationOptions, IrftConfig
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.rl.policy import PolicyCheckpoint, load_policy
from dense_reward_trainer.rl.records import Rollout
from dense_reward_trainer.rl.sampling import Sampling, sample
from dense_reward_trainer.runs.processes import in_processes
from dense_reward_trainer.runs.progress import Progress
from dense_reward_trainer.selfplay.pairs import PairFile
from dense_reward_trainer.selfplay.start import Start
from dense_reward_trainer.selfplay.vllm_answers import VllmTask, vllm_answers


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prompts that are answered together. `rows`: their rows in the round's file."""

    rows: range
    prompts: tuple[IdArray, ...]
    seed: int


@dataclass(frozen=True, slots=True, eq=False)
class Opponent:
    """The model at the start of round `number`: the checkpoint in `folder`, with the encoder and limits of `start`."""

    folder: Path
    number: int
    start: Start


def generate(config: IrftConfig, opponent: Opponent, pairs: PairFile) -> None:
    """Completes the round's file with the opponent's answers; does nothing if it is complete."""
    chunks = [_chunk(config.seed, opponent.number, rows, pairs) for rows in pairs.missing()]
    if not chunks:
        return
    missing = sum(len(chunk.rows) for chunk in chunks)
    unit = f"answers of round {opponent.number}"
    with Progress(len(pairs.rows), unit, len(pairs.rows) - missing) as progress:
        for chunk, rollouts in zip(chunks, _answers(config, opponent, chunks), strict=True):
            pairs.append(chunk.rows, rollouts, opponent.start.encoder)
            progress.advance(len(chunk.rows), tokens=sum(len(rollout.response_T) for rollout in rollouts))


def check_engine(config: IrftConfig, start: Start) -> None:
    """Raises ConfigError if vLLM is wanted but not installed, or could not load the checkpoint."""
    if config.generation.engine != "vllm":
        return
    if find_spec("vllm") is None:
        raise ConfigError(
            "generation.engine is vllm, but vllm is not installed: pip install '.[vllm]' in the project's "
            "folder, or set generation.engine=transformers"
        )
    if start.manifest.adapter_base is not None:
        raise ConfigError(
            f"{start.folder} is an adapter, which generation.engine vllm does not load here: set "
            "generation.engine=transformers, or merge it into its base model and adopt the result"
        )


def sampling_of(options: GenerationOptions) -> Sampling:
    return Sampling(
        options.max_new_tokens,
        temperature=options.temperature,
        greedy=options.greedy,
        batch_size=options.batch_size,
        top_p=options.top_p,
    )


def _chunk(seed: int, number: int, rows: range, pairs: PairFile) -> Chunk:
    own = int(np.random.SeedSequence([seed, number, rows.start]).generate_state(1)[0])
    return Chunk(rows, tuple(pairs.rows[i].encoded.prompt_P for i in rows), own)


def _answers(config: IrftConfig, opponent: Opponent, chunks: Sequence[Chunk]) -> Iterator[list[Rollout]]:
    """The answers of each chunk, in order."""
    if config.generation.engine == "transformers":
        checkpoint = load_policy(opponent.folder, precision=config.precision, device=chosen_device(config.device))
        yield from (_sampled(checkpoint, chunk, config.generation) for chunk in chunks)
        return
    tasks = [_vllm_task(config, opponent, chunk) for chunk in chunks]
    # a process of its own: when it ends, all of the GPU's memory is free for training
    yield from in_processes(1, vllm_answers, tasks)


def _sampled(checkpoint: PolicyCheckpoint, chunk: Chunk, options: GenerationOptions) -> list[Rollout]:
    return sample(checkpoint.policy, chunk.prompts, sampling_of(options), chunk.seed)


def _vllm_task(config: IrftConfig, opponent: Opponent, chunk: Chunk) -> VllmTask:
    folder, start = opponent.folder, opponent.start
    return VllmTask(
        files=files_folder(folder, load_manifest(folder)),
        dtype=config.precision,
        options=config.generation,
        end_of_turn_id=start.end_of_turn_id,
        vocab_size=start.vocab_size,
        limit_tokens=start.limit_tokens,
        prompts=chunk.prompts,
        seed=chunk.seed,
    )
