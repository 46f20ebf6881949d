"""The `sample` job: writes responses of a policy to `samples.jsonl`, in a layout that `sft` and `evaluate` read.

So a tilted or an extrapolated policy, which is no checkpoint, can be used: its answers can be read, ranked or learnt.
"""

import json
from collections.abc import Sequence

import torch
from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward.engines.torch.device import chosen_device
from dense_reward.records import Report
from dense_reward.text.encode import Encoder

from dense_reward_trainer.configs.sample import SampleConfig
from dense_reward_trainer.data.sources import NO_SKIP, DataSource, load
from dense_reward_trainer.data.tokenised import TokenisedRow, encode_demonstrations
from dense_reward_trainer.policies.load import load_sampled
from dense_reward_trainer.rl.policy import PolicyCheckpoint
from dense_reward_trainer.rl.prompts import check_room
from dense_reward_trainer.rl.records import Rollout
from dense_reward_trainer.rl.sampling import Sampling, sample
from dense_reward_trainer.runs.run_folder import check_run, open_run


def run(config: SampleConfig, report: Report) -> None:
    """Writes `samples.jsonl` to `config.output_dir`: a line for each response, in the order of the prompts.

    Raises ConfigError, DataError, CheckpointError or JobError; the message states the cure.
    """
    check_run("sample", config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
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
    rollouts = sample(checkpoint.policy, [row.encoded.prompt_P for row in rows], sampling, config.seed)
    lines = [
        sample_line(rows[b // config.samples_per_prompt], rollout, checkpoint.encoder)
        for b, rollout in enumerate(rollouts)
    ]
    path = open_run("sample", config).folder / "samples.jsonl"
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())
    unfinished = sum(not rollout.finished for rollout in rollouts)
    report(f"{len(rollouts)} responses to {len(rows)} prompts, {unfinished} of them cut off: {path}")
    if unfinished:
        report(
            "a model that is trained on cut-off responses learns to stop there: raise max_new_tokens, or remove the "
            "lines with `finished` false before sft reads them"
        )


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
