"""The `sample` job: writes responses of a policy to `samples.jsonl`, in a layout that `sft` and `evaluate` read.

So a tilted or an extrapolated policy, which is no checkpoint, can be used: its answers can be read, ranked or learnt.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward.engines.torch.device import chosen_device
from dense_reward.manifest import load_manifest
from dense_reward.records import Report
from dense_reward.text.encode import Encoder

from dense_reward_trainer.configs.sample import SampleConfig
from dense_reward_trainer.configs.sft import SftConfig
from dense_reward_trainer.data.sources import NO_SKIP, DataSource, data_sha256, load
from dense_reward_trainer.data.tokenised import TokenisedRow, encode_demonstrations, rows_sha256
from dense_reward_trainer.policies.load import check_sampled, load_sampled
from dense_reward_trainer.rl.learner import seed_of
from dense_reward_trainer.rl.policy import PolicyCheckpoint
from dense_reward_trainer.rl.prompts import check_room
from dense_reward_trainer.rl.records import Rollout
from dense_reward_trainer.rl.sampling import Sampling, sample
from dense_reward_trainer.runs.next_step import finished, job, more_in
from dense_reward_trainer.runs.progress import Progress
from dense_reward_trainer.runs.run_folder import check_run, open_run, pin


def run(config: SampleConfig, report: Report) -> None:
    """Writes `samples.jsonl` to `config.output_dir`: a line for each response, in the order of the prompts.

    A stopped job goes on, to the samples of an unbroken one; a finished run is kept.
    Raises ConfigError, DataError, CheckpointError or JobError; the message states the cure.
    """
    check_run("sample", config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    manifests = check_sampled(config.policy)
    checkpoint = load_sampled(config.policy, report, precision=config.precision, device=chosen_device(config.device))
    rows = prompt_rows(config, checkpoint, report)[: config.limit]
    options = config.policy
    sampling = Sampling(
        config.max_new_tokens,
        config.samples_per_prompt,
        options.temperature,
        greedy=config.greedy,
        batch_size=config.batch_size,
        top_p=options.top_p,
        min_p=options.min_p,
    )
    opened = open_run("sample", config)
    weights = ", ".join(manifest.content_sha256 for manifest in manifests.values())
    data = data_sha256(row.demonstration for row in rows)
    pin(opened, {"policy": weights, "prompts": data, "encoded prompts": rows_sha256(rows)})
    path = opened.folder / "samples.jsonl"
    if path.is_file():
        report(f"{opened.folder} holds a finished run, so there is nothing to do")
    else:
        sample_parts(config, checkpoint, rows, sampling, opened.folder / "parts")
        parts = sorted((opened.folder / "parts").glob("*.jsonl"))
        write_whole(path, b"".join(part.read_bytes() for part in parts))
    shutil.rmtree(opened.folder / "parts", ignore_errors=True)
    report_samples(config, path, len(rows), report)


def sample_parts(
    config: SampleConfig, checkpoint: PolicyCheckpoint, rows: Sequence[TokenisedRow], sampling: Sampling, folder: Path
) -> None:
    """Writes a file for each batch, and leaves those of an earlier start as they are: each has its own seed."""
    size = max(sampling.batch_size // sampling.group_size, 1)
    folder.mkdir(exist_ok=True)
    done = sum((folder / _part(start)).is_file() for start in range(0, len(rows), size))
    with Progress(len(rows), "prompts", min(done * size, len(rows))) as progress:
        for index, start in enumerate(range(0, len(rows), size)):
            if (folder / _part(start)).is_file():
                continue
            chosen = rows[start : start + size]
            prompts = [row.encoded.prompt_P for row in chosen]
            rollouts = sample(checkpoint.policy, prompts, sampling, seed_of(config.seed, index))
            lines = [
                sample_line(chosen[b // sampling.group_size], rollout, checkpoint.encoder)
                for b, rollout in enumerate(rollouts)
            ]
            write_whole(folder / _part(start), "".join(f"{line}\n" for line in lines).encode())
            progress.advance(len(chosen), tokens=sum(len(rollout.response_T) for rollout in rollouts))


def _part(start: int) -> str:
    return f"{start:09d}.jsonl"


def report_samples(config: SampleConfig, path: Path, prompts: int, report: Report) -> None:
    """Reports how many responses there are and were cut off, and what to run next."""
    responses = [json.loads(line) for line in path.read_bytes().splitlines()]
    unfinished = sum(not response["finished"] for response in responses)
    report(f"{len(responses)} responses to {prompts} prompts, {unfinished} of them cut off")
    if unfinished:
        report(
            "a model that is trained on cut-off responses learns to stop there: raise max_new_tokens, or remove the "
            "lines with `finished` false before sft reads them"
        )
    manifest = load_manifest(config.policy.checkpoint)
    keys = {
        "base_model": config.policy.checkpoint,
        "data.source": path,
        "renderer": manifest.renderer,
        "device": config.device,
        "output_dir": more_in(config.output_dir, "sft"),
    }
    report(finished(path, "learn from them,", job("sft", SftConfig, keys, default="sft_full", match="data.source")))


def prompt_rows(config: SampleConfig, checkpoint: PolicyCheckpoint, report: Report) -> Sequence[TokenisedRow]:
    """All prompts of the file. Raises DataError if one is bad or leaves no room for `max_new_tokens`."""
    loaded = load(DataSource(source=str(config.prompts), held_out_fraction=0.0), cure=NO_SKIP, prompts_only=True)
    report(loaded.summary)
    encoder, limit_tokens = checkpoint.encoder, checkpoint.policy.limit_tokens
    rows = encode_demonstrations(
        loaded.demonstrations, encoder, every_turn=False, limit_tokens=limit_tokens, skip_bad=False, cure=NO_SKIP
    ).rows
    check_room(rows, limit_tokens, config.max_new_tokens, "max_new_tokens", "or remove such prompts")
    return rows


def sample_line(row: TokenisedRow, rollout: Rollout, encoder: Encoder) -> str:
    """One response as a line of JSON: the messages with the response, and whether it ended its turn."""
    body_T = rollout.response_T[:-1] if rollout.finished else rollout.response_T
    text = encoder.tokenizer.text_and_spans([int(i) for i in body_T])[0]
    messages = [message.as_mapping() for message in row.demonstration.prompt_messages]
    values: dict[str, object] = {
        "messages": [*messages, {"role": "assistant", "content": text}],
        "finished": rollout.finished,
    }
    if row.demonstration.answer is not None:
        values["final_answer"] = row.demonstration.answer
    if row.demonstration.tools:
        values["tools"] = row.demonstration.tools
    return json.dumps(values, ensure_ascii=False)
